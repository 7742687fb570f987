from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.advantages import (
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    shape_rewards,
)

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_rewards_by_hand() -> None:
    """Coefficient 0.5. Row 0: -0.5, -1 and 1.5 + the score 10; row 1: one token, -2 - 7; row 2 has
    no token, so its score falls nowhere. Pads hold NaN and come out 0.
    """
    kl = torch.tensor([[1.0, 2.0, -3.0], [4.0, NAN, NAN], [NAN, NAN, NAN]])
    rewards = shape_rewards(torch.tensor([10.0, -7.0, 3.0]), kl, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 11.5], [-9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_without_kl_the_score_is_the_only_reward() -> None:
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 3), MASK, kl_coef=0.0)
    assert rewards.tolist() == [[0, 0, 1], [2, 0, 0], [0, 0, 0]]


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5, so a discount of 1/4. Row 0: rewards 1, 2, 4, values 2, 4, 8:
    deltas 1 + 2 - 2 = 1, 2 + 4 - 4 = 2, 4 - 8 = -4; A2 = -4, A1 = 2 - 1 = 1, A0 = 1 + 1/4.
    Row 1 ends after one token, whose next value counts as 0: 1 - 2 = -1. Returns are A + V.
    """
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, NAN, 5.0], [9.0, 9.0, 9.0]])
    values = torch.tensor([[2.0, 4.0, 8.0], [2.0, 7.0, NAN], [9.0, 9.0, 9.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.25, 1.0, -4.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.25, 5.0, 4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_lambda_one_gives_rewards_to_go_minus_value() -> None:
    """gamma 1: rewards to go 7, 6, 4, whatever the values."""
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[5.0, -3.0, 0.5]])
    advantages, returns = gae(rewards, values, MASK[:1], gamma=1.0, gae_lambda=1.0)
    assert returns.tolist()[0] == pytest.approx([7, 6, 4])
    assert advantages.tolist()[0] == pytest.approx([2, 9, 3.5])


def test_lambda_zero_gives_the_td_error() -> None:
    """gamma 1: 1 - 3 - 5, 2 + 0.5 + 3, 4 - 0.5."""
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[5.0, -3.0, 0.5]])
    advantages, _ = gae(rewards, values, MASK[:1], gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist()[0] == pytest.approx([-7, 5.5, 3.5])


def test_a_perfect_critic_leaves_no_advantage() -> None:
    """Only a last reward of 3 and values of 3 throughout (gamma 1): every delta is 0."""
    rewards = torch.tensor([[0.0, 0.0, 3.0]])
    advantages, returns = gae(rewards, torch.full((1, 3), 3.0), MASK[:1], 1.0, 0.95)
    assert advantages.tolist() == [[0, 0, 0]]
    assert returns.tolist() == [[3, 3, 3]]


def test_no_columns_give_no_advantages() -> None:
    empty = torch.zeros(2, 0)
    advantages, returns = gae(empty, empty, empty.bool(), 1.0, 0.95)
    assert advantages.shape == returns.shape == (2, 0)
    assert shape_rewards(torch.zeros(2), empty, empty.bool(), 0.1).shape == (2, 0)


def test_masking_equals_slicing() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 1, 6, generator=generator)
    mask = torch.tensor([[True, True, True, True, False, False]])
    padded, _ = gae(rewards, values, mask, 0.9, 0.8)
    cut, _ = gae(rewards[:, :4], values[:, :4], mask[:, :4], 0.9, 0.8)
    assert torch.equal(padded[:, :4], cut)


def test_group_relative_by_hand() -> None:
    """1, 2, 3 less 2, over a sample deviation of 1 + 1e-4; equal scores give 0."""
    scores = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    scaled = group_relative(scores)
    assert scaled[0].tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001])
    assert scaled[1].tolist() == [0, 0, 0]
    assert group_relative(scores, scale=None).tolist() == [[-1, 0, 1], [0, 0, 0]]


def test_leave_one_out_by_hand() -> None:
    """1 - (2 + 6)/2 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5; of two the difference either way."""
    assert leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3, -1.5, 4.5]]
    assert leave_one_out(torch.tensor([[1.0, 4.0]])).tolist() == [[-3, 3]]


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert gradcheck(lambda r, v: gae(r, v, MASK, 0.9, 0.8), (a, b))
    assert gradcheck(lambda s, kl: shape_rewards(s[0], kl, MASK, 0.3), (a, b))
    assert gradcheck(leave_one_out, (a,))
    assert gradcheck(group_relative, (a,))


def test_extreme_rewards_stay_finite() -> None:
    rewards = torch.tensor([[1e30, -1e30, 1e30]])
    advantages, returns = gae(rewards, torch.zeros(1, 3), MASK[:1], 1.0, 1.0)
    assert torch.isfinite(advantages).all()
    assert torch.isfinite(returns).all()
    assert math.isfinite(group_relative(torch.tensor([[1e15, -1e15]])).sum().item())


def test_wrong_rewards_are_refused() -> None:
    scores, kl, gap = torch.zeros(3), torch.zeros(3, 3), torch.tensor([[True, False, True]] * 3)
    with pytest.raises(ValueError, match=r"scores must be \[N\] for kl \[N, C\], are \(3, 1\)"):
        shape_rewards(scores.unsqueeze(1), kl, MASK, 0.1)
    with pytest.raises(ValueError, match=r"scores must be \[N\].*are \(2,\)"):
        shape_rewards(scores[:2], kl, MASK, 0.1)
    with pytest.raises(ValueError, match=r"mask \(1, 3\)"):
        shape_rewards(scores, kl, MASK[:1], 0.1)
    with pytest.raises(ValueError, match="kl must be float32 or float64"):
        shape_rewards(scores, kl.half(), MASK, 0.1)
    with pytest.raises(ValueError, match="mask row 0 has a gap"):
        shape_rewards(scores, kl, gap, 0.1)


def test_wrong_gae_inputs_are_refused() -> None:
    good, gap = torch.zeros(3, 3), torch.tensor([[True, False, True]] * 3)
    with pytest.raises(ValueError, match=r"values \(3, 1\)"):
        gae(good, good[:, :1], MASK, 1.0, 0.95)
    with pytest.raises(ValueError, match="values must be float32 or float64"):
        gae(good, good.bfloat16(), MASK, 1.0, 0.95)
    with pytest.raises(ValueError, match="mask row 0 has a gap"):
        gae(good, good, gap, 1.0, 0.95)
    with pytest.raises(ValueError, match="mask must be bool"):
        gae(good, good, MASK.int(), 1.0, 0.95)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], is 1\.5"):
        gae(good, good, MASK, 1.5, 0.95)
    with pytest.raises(ValueError, match=r"gae_lambda must be in \[0, 1\], is -1"):
        gae(good, good, MASK, 1.0, -1)


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
def test_wrong_groups_are_refused(function) -> None:
    with pytest.raises(ValueError, match="a group needs at least 2 completions a prompt, has 1"):
        function(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="scores must have 2 dimensions"):
        function(torch.zeros(4))
    with pytest.raises(ValueError, match="scores must be float32 or float64"):
        function(torch.zeros(4, 2, dtype=torch.float16))


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be 'std' or None, is 'mad'"):
        group_relative(torch.zeros(4, 2), scale="mad")


def test_reinforce_plus_plus_by_hand() -> None:
    """Returns 3, 2 in row 0 and -1 in row 1: mean 4/3, variance (25 + 4 + 49) / 27 = 26/9. A row
    without tokens and what lies on pads have no say.
    """
    rewards = torch.tensor([[1.0, 2.0, NAN], [-1.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    scale = math.sqrt(26 / 9)
    expected = [5 / 3 / scale, 2 / 3 / scale, 0, -7 / 3 / scale, 0, 0, 0, 0, 0]
    assert reinforce_plus_plus(rewards, mask).flatten().tolist() == pytest.approx(expected)


def test_reinforce_plus_plus_discounts() -> None:
    """gamma 1/2: returns 1 + 2/2 = 2 and 2 are equal, so nothing is left of them."""
    rewards, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool()
    assert reinforce_plus_plus(rewards, mask, gamma=0.5).tolist() == [[0, 0]]


def test_wrong_reinforce_plus_plus_inputs_are_refused() -> None:
    good, mask = torch.zeros(4, 3), torch.ones(4, 3).bool()
    with pytest.raises(ValueError, match=r"mask \(1, 3\)"):
        reinforce_plus_plus(good, mask[:1])
    with pytest.raises(ValueError, match="rewards must be float32 or float64"):
        reinforce_plus_plus(good.half(), mask)
    with pytest.raises(ValueError, match="mask row 0 has a gap"):
        reinforce_plus_plus(good[:1], torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
        reinforce_plus_plus(good, mask, gamma=1.1)
