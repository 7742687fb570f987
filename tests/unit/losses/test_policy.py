from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.aggregation import token_weights
from amenable.losses.policy import (
    clipped_tokens,
    gspo_clipped_tokens,
    gspo_policy_loss,
    importance_weights,
    ppo_policy_loss,
    ratios,
    sequence_ratios,
)

LOG = math.log
NAN = float("nan")
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


def test_decoupled_clip_by_hand() -> None:
    """Low 0.2, high 0.4: the good token at 1.5 counts as 1.4, the bad one at 0.5 as 0.8."""
    losses = ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, (0.2, 0.4))
    assert losses.tolist()[0] == pytest.approx([-2.8, 3.0, -1.0, 1.6, -3.3])
    wide = ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, (0.2, 3.0))
    assert wide.tolist()[0] == pytest.approx([-3.0, 3.0, -1.0, 1.6, -3.3])
    clipped = clipped_tokens(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, (0.2, 3.0))
    assert clipped.tolist() == [[False, False, False, True, False]]


def test_equal_sides_are_the_plain_clip() -> None:
    plain = ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, 0.2)
    assert torch.equal(ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, (0.2, 0.2)), plain)


def test_dual_clip_by_hand() -> None:
    """Dual clip 1.25: the bad token at ratio 1.5 costs 2.5 in place of 3 and gets no gradient; good
    ones, and bad ones below it, are as before.
    """
    logprobs = LOGPROBS.clone().requires_grad_()
    losses = ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, 0.2, dual_clip=1.25)
    assert losses.tolist()[0] == pytest.approx([-2.4, 2.5, -1.0, 1.6, -3.3])
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist()[0] == pytest.approx([0, 0, -1, 0, -3.3])
    clipped = clipped_tokens(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, 0.2, dual_clip=1.25)
    assert clipped.tolist() == [[True, True, False, True, False]]


def test_dual_clip_holds_what_would_explode() -> None:
    """A = -2 at ratio exp(80), and A = 0: 2 x 3 and 0, no gradient, no NaN."""
    logprobs = torch.zeros(1, 2, requires_grad=True)
    old = torch.full((1, 2), -1000.0)
    losses = ppo_policy_loss(logprobs, old, torch.tensor([[-2.0, 0.0]]), 0.2, dual_clip=3.0)
    assert losses.tolist() == [[6, 0]]
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0, 0]]


ROWS = torch.tensor([[LOG(4), 0.0, NAN], [LOG(0.25), LOG(0.25), LOG(0.25)], [NAN, NAN, NAN]])
OLD_ROWS = torch.zeros(3, 3)
ROW_MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def test_sequence_ratios_by_hand() -> None:
    """Ratios 4 and 1 have the geometric mean 2; three of 1/4 have 1/4; no token gives 1."""
    ratio = sequence_ratios(ROWS, OLD_ROWS, ROW_MASK)
    torch.testing.assert_close(ratio, torch.tensor([[2.0] * 3, [0.25] * 3, [1.0] * 3]))


def test_gspo_by_hand() -> None:
    """Clip 0.2 and A = 3: a ratio of 2 counts as 1.2 and is clipped, one of 1/4 counts in full;
    with A = -3 the first counts in full and the second as 0.8.
    """
    good = torch.full((3, 3), 3.0)
    losses = gspo_policy_loss(ROWS, OLD_ROWS, good, ROW_MASK, 0.2)[:2, 0]
    assert losses.tolist() == pytest.approx([-3.6, -0.75])
    losses = gspo_policy_loss(ROWS, OLD_ROWS, -good, ROW_MASK, (0.2, 0.3))[:2, 0]
    assert losses.tolist() == pytest.approx([6, 2.4])
    clipped = gspo_clipped_tokens(ROWS, OLD_ROWS, good, ROW_MASK, 0.2)[:2, 0]
    assert clipped.tolist() == [True, False]


def test_gspo_gradient_by_hand() -> None:
    """Under the sequence's weights, d / d logprob_t = -A s / (M L): s = 2, L = 2, M = 2 and A = -3
    give 6/4, s = 1/4 and L = 3 nothing where A = -3 (clipped); pads get none, NaN or not.
    """
    logprobs = ROWS.clone().requires_grad_()
    bad = torch.full((3, 3), -3.0)
    losses = gspo_policy_loss(logprobs, OLD_ROWS, bad, ROW_MASK, 0.2)
    (losses * token_weights(ROW_MASK, "sequence")).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([1.5, 1.5, *[0] * 7])


def test_gspo_gradient_equals_gspo_token_s() -> None:
    """GSPO-token (eq. 13 and 14 of the paper) has the ratio sg(s) p_t / sg(p_t), and the same
    gradient where a completion has one advantage.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64) / 10
    old = torch.zeros(3, 4, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 1, 3]).unsqueeze(1)
    advantages = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64).expand(3, 4)
    weights = token_weights(mask, "sequence", dtype=torch.float64)
    grads = []
    for variant in ("sequence", "token"):
        logprobs = start.clone().requires_grad_()
        if variant == "sequence":
            losses = gspo_policy_loss(logprobs, old, advantages, mask, 0.9)
        else:
            mean = (start * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            losses = -advantages * mean.exp() * (logprobs - logprobs.detach()).exp()
        grads.append(torch.autograd.grad((losses * weights).sum(), logprobs)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_gradients_of_the_variants() -> None:
    logprobs = LOGPROBS.double().requires_grad_()
    old, advantages = OLD_LOGPROBS.double(), ADVANTAGES.double()
    mask = torch.tensor([[True, True, True, False, True]])
    assert gradcheck(lambda x: ppo_policy_loss(x, old, advantages, (0.1, 0.7), 1.2), logprobs)
    assert gradcheck(lambda x: sequence_ratios(x, old, mask), logprobs)
    assert gradcheck(lambda x: gspo_policy_loss(x, old, advantages, mask, 0.7), logprobs)


def test_extreme_sequences_stay_finite() -> None:
    logprobs = torch.tensor([[1000.0, 1000.0], [-1000.0, -1000.0]], requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    gspo_policy_loss(logprobs, torch.zeros(2, 2), torch.ones(2, 2), mask, 0.2).sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("function", [ppo_policy_loss, clipped_tokens])
def test_wrong_clips_are_refused(function) -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="clip_range_low must be above 0, is 0"):
        function(good, good, good, (0, 0.2))
    with pytest.raises(ValueError, match="clip_range_high must be above 0, is -1"):
        function(good, good, good, (0.2, -1))
    with pytest.raises(ValueError, match=r"clip_range_low must be at most 1, is 1\.5"):
        function(good, good, good, (1.5, 0.2))
    for bad in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="dual_clip must be above 1, is"):
            function(good, good, good, 0.2, bad)


@pytest.mark.parametrize("function", [gspo_policy_loss, gspo_clipped_tokens])
def test_wrong_gspo_inputs_are_refused(function) -> None:
    good, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"mask \(1, 3\)"):
        function(good, good, good, mask[:1], 0.2)
    with pytest.raises(ValueError, match="mask must be bool"):
        function(good, good, good, mask.int(), 0.2)
    with pytest.raises(ValueError, match=r"advantages \(2, 1\)"):
        function(good, good, good[:, :1], mask, 0.2)
    with pytest.raises(ValueError, match="old_logprobs must be float32 or float64"):
        function(good, good.half(), good, mask, 0.2)
    with pytest.raises(ValueError, match="clip_range must be above 0"):
        function(good, good, good, mask, 0)


def test_importance_weights_by_hand() -> None:
    """exp of the difference, up to the cap, and constant."""
    own = LOGPROBS.clone().requires_grad_()
    weights = importance_weights(own, OLD_LOGPROBS, 1.2)
    assert weights.tolist()[0] == pytest.approx([1.2, 1.2, 0.5, 0.5, 1.1])
    assert not weights.requires_grad
    assert importance_weights(own, own, 1.0).tolist()[0] == [1.0] * 5


def test_a_cap_below_one_would_shrink_every_loss() -> None:
    with pytest.raises(ValueError, match=r"cap must be at least 1, not 0\.5"):
        importance_weights(LOGPROBS, OLD_LOGPROBS, 0.5)
