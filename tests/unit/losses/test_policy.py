from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.policy import clipped_tokens, ppo_policy_loss, ratios

LOG = math.log
# ratio:                       1.5  1.5   0.5   0.5  1.1
LOGPROBS = torch.tensor([[LOG(x) for x in (0.75, 0.75, 0.25, 0.25, 0.55)]])
OLD_LOGPROBS = torch.full((1, 5), LOG(0.5))
ADVANTAGES = torch.tensor([[2.0, -2.0, 2.0, -2.0, 3.0]])


def test_ratios_by_hand() -> None:
    assert ratios(LOGPROBS, OLD_LOGPROBS).tolist()[0] == pytest.approx([1.5, 1.5, 0.5, 0.5, 1.1])


def test_policy_loss_by_hand() -> None:
    """Clip 0.2. A good token that rose to 1.5 counts as 1.2, a bad one in full; one that fell to
    0.5 counts in full if good and as 0.8 if bad; 1.1 is inside the range.
    """
    losses = ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, 0.2)
    assert losses.tolist()[0] == pytest.approx([-2.4, 3.0, -1.0, 1.6, -3.3])


def test_only_the_side_the_advantage_pushes_to_is_clipped() -> None:
    clipped = clipped_tokens(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, 0.2)
    assert clipped.dtype == torch.bool
    assert clipped.tolist() == [[True, False, False, True, False]]


def test_clipped_tokens_get_no_gradient() -> None:
    """d loss / d logprob = -A ratio where not clipped, else 0."""
    logprobs = LOGPROBS.clone().requires_grad_()
    ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, 0.2).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist()[0] == pytest.approx([0, 3, -1, 0, -3.3])


def test_at_ratio_one_it_is_the_plain_policy_gradient() -> None:
    """Loss -A and gradient -A, nothing clipped, ratio exactly 1."""
    logprobs = OLD_LOGPROBS.clone().requires_grad_()
    assert torch.equal(ratios(logprobs, OLD_LOGPROBS), torch.ones(1, 5))
    losses = ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, 0.2)
    assert torch.equal(losses, -ADVANTAGES)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -ADVANTAGES)
    assert not clipped_tokens(logprobs, OLD_LOGPROBS, ADVANTAGES, 0.2).any()


def test_extreme_differences_stay_finite() -> None:
    """Neither exp(1000) nor its gradient may turn into inf or NaN beside other tokens."""
    logprobs = torch.tensor([[0.0, -1000.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1000.0, 0.0, -1000.0]])
    losses = ppo_policy_loss(logprobs, old, torch.tensor([[1.0, 1.0, 0.0]]), 0.2)
    assert losses.tolist()[0] == pytest.approx([-1.2, 0.0, 0.0])
    losses.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


def test_gradients() -> None:
    logprobs = LOGPROBS.double().requires_grad_()
    old, advantages = OLD_LOGPROBS.double(), ADVANTAGES.double()
    assert gradcheck(lambda x: ppo_policy_loss(x, old, advantages, 0.2), logprobs)
    assert gradcheck(lambda x: ratios(x, old), logprobs)


@pytest.mark.parametrize("function", [ppo_policy_loss, clipped_tokens])
def test_wrong_inputs_are_refused(function) -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="clip_range must be above 0, is 0"):
        function(good, good, good, 0)
    with pytest.raises(ValueError, match=r"clip_range must be at most 1, is 1\.5"):
        function(good, good, good, 1.5)
    with pytest.raises(ValueError, match=r"advantages \(2, 1\)"):
        function(good, good, good[:, :1], 0.2)
    with pytest.raises(ValueError, match="advantages must be float32 or float64"):
        function(good, good, good.half(), 0.2)
    with pytest.raises(ValueError, match=r"old_logprobs \(1, 3\)"):
        function(good, good[:1], good, 0.2)
    with pytest.raises(ValueError, match="old_logprobs must be float32 or float64"):
        function(good, good.bfloat16(), good, 0.2)


def test_ratios_of_wrong_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="logprobs must have 2 dimensions"):
        ratios(torch.zeros(3), torch.zeros(3))
