from __future__ import annotations

import pytest
import torch

from amenable.losses.checks import (
    check_below_half,
    check_bool,
    check_counts,
    check_fraction,
    check_leading_mask,
    check_mask,
    check_not_negative,
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


def test_booleans_counts_and_shares_pass() -> None:
    check_bool(tied=torch.zeros(2).bool())
    check_counts(tokens=torch.tensor([0, 3], dtype=torch.int32), none=torch.zeros(0).long())
    check_not_negative(margin=0.0)
    check_below_half(flip_rate=0.499)


def test_booleans_counts_and_shares_are_named_where_wrong() -> None:
    with pytest.raises(ValueError, match=r"tied must be bool, is torch\.int64; call"):
        check_bool(tied=torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"tokens must be int32 or int64, is torch\.float32"):
        check_counts(tokens=torch.zeros(2))
    with pytest.raises(ValueError, match="tokens must not be negative, has -3"):
        check_counts(tokens=torch.tensor([1, -3]))
    with pytest.raises(ValueError, match="margin must not be negative, is nan"):
        check_not_negative(margin=float("nan"))
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0\.5\), is 0\.5"):
        check_below_half(flip_rate=0.5)
