from __future__ import annotations

import pytest
import torch

from amenable.losses.checks import (
    check_fraction,
    check_leading_mask,
    check_mask,
    check_positive,
    check_precise,
    check_same_shape,
)


def test_equal_shapes_of_any_rank_pass() -> None:
    check_same_shape(a=torch.zeros(2, 3, 4), b=torch.zeros(2, 3, 4))
    check_same_shape(2, a=torch.zeros(0, 3))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes must be equal: a \(2,\), b \(1,\)"):
        check_same_shape(1, a=torch.zeros(2), b=torch.zeros(1))


def test_a_wrong_rank_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"scores must have 1 dimensions, has shape \(2, 1\)"):
        check_same_shape(1, scores=torch.zeros(2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_imprecise_dtypes_are_refused_with_the_remedy(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"kl must be float32 or float64, .*call \.float\(\)"):
        check_precise(kl=torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precise_dtypes_pass(dtype: torch.dtype) -> None:
    check_precise(kl=torch.zeros(1, dtype=dtype))


def test_an_integer_attention_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool, is torch\.int64"):
        check_mask(torch.ones(2, 2, dtype=torch.int64))


def test_a_leading_mask_may_have_empty_and_full_rows() -> None:
    check_leading_mask(torch.tensor([[True, True], [True, False], [False, False]]))
    check_leading_mask(torch.zeros(2, 0, dtype=torch.bool))


@pytest.mark.parametrize("row", [[True, False, True], [False, True, True]])
def test_a_gap_in_the_mask_names_the_row(row: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"mask row 1 has a gap.*pad completions on the right"):
        check_leading_mask(torch.tensor([[True, True, True], row]))


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan")])
def test_numbers_that_are_not_positive_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="beta must be above 0, is"):
        check_positive(beta=number)


@pytest.mark.parametrize("number", [-0.1, 1.1, float("nan")])
def test_numbers_outside_the_unit_interval_are_refused(number: float) -> None:
    check_fraction(gamma=0.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], is"):
        check_fraction(gamma=number)
