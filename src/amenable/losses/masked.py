"""Reductions over the entries that count.

A mask is boolean and True where the entry counts. What is under False may be anything, NaN
included: it reaches neither the result nor its gradient. An empty mask has a defined answer, 0.
Half-precision and boolean values are summed in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from amenable.losses.checks import check_mask, check_same_shape

VARIANCE_EPS = 1e-8


def masked_sum(
    values: Shaped[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], dim: int | None = None
) -> Float[Tensor, "*rest"]:
    """Sum of the values that count.

    Args:
        values: any shape; boolean and integer values are counted as numbers.
        mask: same shape, True where the value counts.
        dim: dimension to sum over; None sums over all.

    Returns:
        A scalar, or `values` without dimension `dim`; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ, or the mask is not boolean.
    """
    kept = _keep(values, mask)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(
    values: Shaped[Tensor, "*dims"],
    mask: Bool[Tensor, "*dims"],
    dim: int | None = None,
    denominator: float | Tensor | None = None,
) -> Float[Tensor, "*rest"]:
    """Mean of the values that count.

    Args:
        values: any shape; the mean of a boolean tensor is the share of True.
        mask: same shape, True where the value counts.
        dim: dimension to average over; None averages over all.
        denominator: what to divide by in place of the number of values that count here. The global
            count makes 8 micro-batches of 1 add up to 1 micro-batch of 8.

    Returns:
        A scalar, or `values` without dimension `dim`; 0 where nothing counts (a denominator of 0 is
        taken for 1).

    Raises:
        ValueError: the shapes differ, the mask is not boolean, or `denominator` is a negative
            number.
    """
    total = masked_sum(values, mask, dim)
    if denominator is None:
        count = mask.sum() if dim is None else mask.sum(dim=dim)
        return total / count.clamp(min=1)
    if isinstance(denominator, Tensor):
        return total / torch.where(denominator == 0, 1, denominator)
    if not denominator >= 0:
        raise ValueError(f"denominator must not be negative, is {denominator}")
    return total / (denominator or 1)


def masked_var(
    values: Shaped[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], unbiased: bool = False
) -> Float[Tensor, ""]:
    """Variance of the values that count, about their own mean.

    Args:
        values: any shape.
        mask: same shape, True where the value counts.
        unbiased: divide by n - 1 in place of n.

    Returns:
        A scalar; 0 where fewer than two values count.

    Raises:
        ValueError: the shapes differ, or the mask is not boolean.
    """
    squares = (_keep(values, mask) - masked_mean(values, mask)).square()
    count = mask.sum() - int(unbiased)
    return masked_sum(squares, mask) / count.clamp(min=1)


def masked_whiten(
    values: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], shift_mean: bool = True
) -> Float[Tensor, "*dims"]:
    """Values scaled to variance 1 over the entries that count.

    (values - mean) / sqrt(variance + 1e-8), with the mean added back where it is not to be shifted.

    Args:
        values: any shape.
        mask: same shape, True where the value counts.
        shift_mean: True also moves the mean to 0; False leaves it where it was.

    Returns:
        Same shape; 0 where the mask is False. Values that are all equal become 0 (or keep their
        mean).

    Raises:
        ValueError: the shapes differ, or the mask is not boolean.

    Source: Huang et al. 2024, arXiv:2403.17031. Departure: the variance is the biased one (division
    by n), over real tokens only. Pass the whole roll-out batch, not a micro-batch.
    """
    mean = masked_mean(values, mask)
    scale = torch.rsqrt(masked_var(values, mask) + VARIANCE_EPS)
    white = (_keep(values, mask) - mean) * scale
    return _keep(white if shift_mean else white + mean, mask)


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    check_mask(mask)
    check_same_shape(values=values, mask=mask)
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    return torch.where(mask, wide, 0.0)
