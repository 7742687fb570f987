from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.masked import masked_mean, masked_sum, masked_var, masked_whiten

VALUES = torch.tensor([[1.0, 2.0, 100.0], [4.0, float("nan"), float("inf")]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
NOTHING = torch.zeros(2, 3, dtype=torch.bool)


def test_sum_leaves_out_what_does_not_count() -> None:
    """1 + 2 + 4 = 7; by row 1 + 2 and 4; by column 1 + 4, 2 and nothing."""
    assert masked_sum(VALUES, MASK).item() == 7
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3, 4]
    assert masked_sum(VALUES, MASK, dim=0).tolist() == [5, 2, 0]


def test_mean_divides_by_what_counts() -> None:
    """7 / 3; rows 3 / 2 and 4 / 1."""
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3)
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 4]


def test_mean_with_a_global_denominator() -> None:
    """7 / 10, whether the 10 is a number or a tensor, and 0 for an empty global batch."""
    assert masked_mean(VALUES, MASK, denominator=10).item() == pytest.approx(0.7)
    assert masked_mean(VALUES, MASK, denominator=torch.tensor(10)).item() == pytest.approx(0.7)
    assert masked_mean(VALUES, MASK, dim=1, denominator=torch.tensor([3, 0])).tolist() == [1, 4]
    assert masked_mean(VALUES, NOTHING, denominator=0).item() == 0
    assert masked_mean(VALUES, NOTHING, denominator=torch.tensor(0)).item() == 0


def test_accumulating_single_rows_equals_the_whole_batch() -> None:
    parts = [masked_mean(VALUES[i : i + 1], MASK[i : i + 1], denominator=3) for i in range(2)]
    assert sum(parts).item() == pytest.approx(7 / 3)


def test_mean_of_booleans_is_a_share() -> None:
    assert masked_mean(torch.tensor([True, False, True]), torch.tensor([True, True, False])) == 0.5


def test_half_precision_is_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256 again; 513 ones add up exactly only if widened."""
    ones = torch.ones(513, dtype=torch.bfloat16)
    total = masked_sum(ones, torch.ones(513, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == 513


@pytest.mark.parametrize("unbiased", [False, True])
def test_an_empty_mask_gives_zero(unbiased: bool) -> None:
    assert masked_sum(VALUES, NOTHING).item() == 0
    assert masked_mean(VALUES, NOTHING).item() == 0
    assert masked_mean(VALUES, NOTHING, dim=1).tolist() == [0, 0]
    assert masked_var(VALUES, NOTHING, unbiased).item() == 0
    assert masked_whiten(VALUES, NOTHING).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_variance_by_hand() -> None:
    """Of 1, 2, 4 about 7/3: (16 + 1 + 25) / 9 = 14/3, over 3 or over 2."""
    assert masked_var(VALUES, MASK).item() == pytest.approx(14 / 9)
    assert masked_var(VALUES, MASK, unbiased=True).item() == pytest.approx(7 / 3)


def test_variance_of_one_value_is_zero() -> None:
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert masked_var(VALUES, one, unbiased=True).item() == 0


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    white = masked_whiten(VALUES, MASK)
    real = [white[0, 0].item(), white[0, 1].item(), white[1, 0].item()]
    assert sum(real) == pytest.approx(0, abs=1e-6)
    assert sum(x * x for x in real) / 3 == pytest.approx(1, abs=1e-6)
    assert white[~MASK].tolist() == [0, 0, 0]


def test_whitening_can_keep_the_mean() -> None:
    """shift_mean False: mean stays 7/3, variance is 1 all the same, and pads are still 0."""
    white = masked_whiten(VALUES, MASK, shift_mean=False)
    real = [white[0, 0].item(), white[0, 1].item(), white[1, 0].item()]
    assert sum(real) / 3 == pytest.approx(7 / 3)
    assert sum((x - 7 / 3) ** 2 for x in real) / 3 == pytest.approx(1, abs=1e-6)
    assert white[~MASK].tolist() == [0, 0, 0]


def test_whitening_by_hand() -> None:
    """-1, 1 has deviation 1 and stays; 10, 30 becomes -1, 1."""
    both = torch.ones(2, dtype=torch.bool)
    assert masked_whiten(torch.tensor([10.0, 30.0]), both).tolist() == pytest.approx([-1, 1])


def test_whitening_equal_values_gives_zero() -> None:
    white = masked_whiten(torch.full((4,), 3.0), torch.ones(4, dtype=torch.bool))
    assert white.tolist() == [0, 0, 0, 0]


def test_masking_equals_slicing() -> None:
    cut = torch.tensor([1.0, 2.0, 4.0])
    whole = torch.ones(3, dtype=torch.bool)
    assert masked_var(VALUES, MASK).item() == pytest.approx(masked_var(cut, whole).item())
    assert torch.allclose(masked_whiten(VALUES, MASK)[MASK], masked_whiten(cut, whole))


def test_masked_values_get_no_gradient_not_even_nan() -> None:
    values = VALUES.clone().requires_grad_()
    masked_whiten(values, MASK).square().sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert values.grad[~MASK].tolist() == [0, 0, 0]


def test_gradients() -> None:
    values = torch.tensor([[1.0, -2.0, 5.0], [4.0, 3.0, 0.5]], dtype=torch.float64)
    values.requires_grad_()
    assert gradcheck(lambda x: masked_mean(x, MASK, dim=1, denominator=5.0), values)
    assert gradcheck(lambda x: masked_var(x, MASK, unbiased=True), values)
    assert gradcheck(lambda x: masked_whiten(x, MASK), values)


def test_large_values_do_not_lose_their_spread() -> None:
    """1e6 + (0, 1, 2) has variance 2/3; the mean of squares minus the square of the mean fails."""
    values = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    assert masked_var(values, torch.ones(3, dtype=torch.bool)).item() == pytest.approx(2 / 3)
    assert math.isfinite(masked_var(torch.tensor([1e15, -1e15]), torch.ones(2).bool()).item())


def test_wrong_shapes_masks_and_denominators_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes must be equal"):
        masked_sum(VALUES, MASK[:1])
    with pytest.raises(ValueError, match="mask must be bool"):
        masked_mean(VALUES, MASK.int())
    with pytest.raises(ValueError, match=r"denominator must not be negative, is -1"):
        masked_mean(VALUES, MASK, denominator=-1)
    with pytest.raises(ValueError, match="denominator must not be negative, is nan"):
        masked_mean(VALUES, MASK, denominator=float("nan"))
