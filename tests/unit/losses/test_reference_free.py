from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.reference_free import odds_ratio_loss, simpo_loss

LOG = math.log


def test_simpo_by_hand() -> None:
    """Means -2 and -4 a token lead by 2; beta 1 and margin 2 - log 3 leave log 3: log 4/3. With
    margin 2 nothing is left: log 2.
    """
    sums = torch.tensor([-6.0]), torch.tensor([-20.0])
    counts = torch.tensor([3]), torch.tensor([5])
    left = simpo_loss(*sums, *counts, beta=1.0, margin=2 - LOG(3))
    assert left.item() == pytest.approx(LOG(4 / 3))
    assert simpo_loss(*sums, *counts, beta=1.0, margin=2.0).item() == pytest.approx(LOG(2))


def test_simpo_gradient_is_shared_among_tokens() -> None:
    """At log 2: -beta / (2 tokens) on the chosen sum, +beta / (2 tokens) on the rejected one."""
    chosen = torch.tensor([-6.0], requires_grad=True)
    rejected = torch.tensor([-10.0], requires_grad=True)
    simpo_loss(chosen, rejected, torch.tensor([3]), torch.tensor([5]), 2.0, 0.0).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-1 / 3, 1 / 5))


def test_odds_ratio_by_hand() -> None:
    """Probabilities a token of 3/4 and 1/2: odds 3 and 1, a ratio of 3, so log 4/3; turned, log 4;
    1/4 against 1/2 has odds 1/3 and 1: log 4 again.
    """
    sums = torch.tensor([2 * LOG(0.75), 3 * LOG(0.5), 2 * LOG(0.25)])
    others = torch.tensor([3 * LOG(0.5), 2 * LOG(0.75), 3 * LOG(0.5)])
    counts, other_counts = torch.tensor([2, 3, 2]), torch.tensor([3, 2, 3])
    losses = odds_ratio_loss(sums, others, counts, other_counts)
    assert losses.tolist() == pytest.approx([LOG(4 / 3), LOG(4), LOG(4)], rel=1e-5)


def test_odds_ratio_gradient_by_hand() -> None:
    """d log odds / d log p = 1 / (1 - p): at p = 3/4 against 1/2, -(1 - 3/4) 4 = -1 on the chosen
    mean and +(1/4) 2 = 1/2 on the rejected one.
    """
    chosen = torch.tensor([LOG(0.75)], requires_grad=True)
    rejected = torch.tensor([LOG(0.5)], requires_grad=True)
    one = torch.tensor([1])
    odds_ratio_loss(chosen, rejected, one, one).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-1, 0.5), rel=1e-5)


def test_a_certain_completion_has_finite_odds() -> None:
    """p = 1 counts as 1 - 1e-7; far below, log odds are the log-probability; no NaN anywhere."""
    chosen = torch.tensor([0.0, -1e4, 0.0, -1e-30], requires_grad=True)
    rejected = torch.tensor([-1e4, 0.0, 0.0, -1.0], requires_grad=True)
    counts = torch.tensor([1, 1, 0, 1])
    losses = odds_ratio_loss(chosen, rejected, counts, counts)
    assert losses.tolist()[:3] == pytest.approx([0, 1e4 + LOG(1e7), LOG(2)], rel=1e-4)
    losses.sum().backward()
    for logprobs in (chosen, rejected):
        assert logprobs.grad is not None
        assert torch.isfinite(logprobs.grad).all()


def test_simpo_at_the_extremes() -> None:
    """Means of -1e4 and 0 cost 1e4 and 0."""
    sums = torch.tensor([-1e5, 0.0]), torch.tensor([0.0, -1e5])
    counts = torch.tensor([10, 10])
    assert simpo_loss(*sums, counts, counts, 1.0, 0.0).tolist() == [1e4, 0]


def test_gradients() -> None:
    a = torch.tensor([-0.5, -3.0, -40.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([-6.0, -0.9, -2.0], dtype=torch.float64, requires_grad=True)
    counts, others = torch.tensor([2, 3, 9]), torch.tensor([4, 1, 5])
    assert gradcheck(lambda x, y: simpo_loss(x, y, counts, others, 2.0, 0.5), (a, b))
    assert gradcheck(lambda x, y: odds_ratio_loss(x, y, counts, others), (a, b))


@pytest.mark.parametrize("settings", [(), (2.0, 0.5)], ids=["orpo", "simpo"])
def test_wrong_inputs_are_refused(settings) -> None:
    function = simpo_loss if settings else odds_ratio_loss
    sums, counts = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"policy_chosen \(3,\), policy_rejected \(1,\)"):
        function(sums, sums[:1], counts, counts[:1], *settings)
    with pytest.raises(ValueError, match=r"sequence_logprobs \(3,\), tokens \(1,\)"):
        function(sums, sums, counts, counts[:1], *settings)
    with pytest.raises(ValueError, match="sequence_logprobs must be float32 or float64"):
        function(sums, sums.half(), counts, counts, *settings)
    with pytest.raises(ValueError, match="tokens must be int32 or int64"):
        function(sums, sums, counts.bool(), counts, *settings)
    with pytest.raises(ValueError, match="tokens must not be negative, has -1"):
        function(sums, sums, -counts, counts, *settings)


def test_wrong_simpo_settings_are_refused() -> None:
    sums, counts = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="beta must be above 0, is 0"):
        simpo_loss(sums, sums, counts, counts, 0, 0.5)
    with pytest.raises(ValueError, match="margin must not be negative, is -1"):
        simpo_loss(sums, sums, counts, counts, 2.0, -1)
