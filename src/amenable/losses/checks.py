"""What every loss asks of its inputs before it computes: ranks, shapes, dtypes, masks.

A loss that silently broadcasts [N] against [N, 1], or that is fed bfloat16 log-probabilities,
returns a number that looks fine. So each public function checks on entry and raises `ValueError`
naming the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRECISE = (torch.float32, torch.float64)
COUNTS = (torch.int32, torch.int64)


def check_same_shape(rank: int | None = None, /, **tensors: Tensor) -> None:
    """Check that all tensors have one shape, of `rank` dimensions where that is given.

    Args:
        rank: wanted number of dimensions; None accepts any.
        **tensors: the tensors by the names that the message uses.

    Raises:
        ValueError: a rank differs from `rank`, or two shapes differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        if rank is not None and len(shape) != rank:
            raise ValueError(f"{name} must have {rank} dimensions, has shape {shape}")
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal: {listed}")


def check_precise(**tensors: Tensor) -> None:
    """Check that all tensors are float32 or float64.

    Log-probabilities, scores and values in half precision lose the small differences that the
    losses are made of.

    Args:
        **tensors: the tensors by the names that the message uses.

    Raises:
        ValueError: a tensor has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in PRECISE:
            raise ValueError(
                f"{name} must be float32 or float64, is {tensor.dtype}; call .float() first"
            )


def check_mask(mask: Tensor) -> None:
    """Check that the mask is boolean (True where the token counts).

    Args:
        mask: any shape.

    Raises:
        ValueError: another dtype, for example the integer attention mask of a tokenizer.
    """
    check_bool(mask=mask)


def check_bool(**tensors: Tensor) -> None:
    """Check that all tensors are boolean.

    Args:
        **tensors: the tensors by the names that the message uses.

    Raises:
        ValueError: a tensor has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, is {tensor.dtype}; call .bool() first")


def check_counts(**tensors: Tensor) -> None:
    """Check that all tensors are counts: whole numbers, none negative.

    Args:
        **tensors: the tensors by the names that the message uses.

    Raises:
        ValueError: a tensor has a dtype that is not an integer's, or a negative entry.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in COUNTS:
            raise ValueError(f"{name} must be int32 or int64, is {tensor.dtype}")
        if bool((tensor < 0).any()):
            raise ValueError(f"{name} must not be negative, has {int(tensor.min())}")


def check_leading_mask(mask: Tensor) -> None:
    """Check that each row's real tokens are contiguous and start at column 0.

    Args:
        mask: [N, C] bool; rows without any real token are allowed.

    Raises:
        ValueError: not boolean, or a row has a real token after one that is not.
    """
    check_mask(mask)
    restarts = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if bool(restarts.any()):
        row = int(restarts.nonzero()[0])
        raise ValueError(
            f"mask row {row} has a gap: real tokens must be contiguous from column 0; "
            "pad completions on the right"
        )


def check_positive(**numbers: float) -> None:
    """Check that all numbers are above zero.

    Args:
        **numbers: the numbers by the names that the message uses.

    Raises:
        ValueError: a number is zero, negative or not a number.
    """
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be above 0, is {number}")


def check_fraction(**numbers: float) -> None:
    """Check that all numbers lie in [0, 1].

    Args:
        **numbers: the numbers by the names that the message uses.

    Raises:
        ValueError: a number lies outside or is not a number.
    """
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], is {number}")


def check_not_negative(**numbers: float) -> None:
    """Check that all numbers are at least zero.

    Args:
        **numbers: the numbers by the names that the message uses.

    Raises:
        ValueError: a number is negative or not a number.
    """
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, is {number}")


def check_below_half(**numbers: float) -> None:
    """Check that all numbers lie in [0, 0.5): shares of wrong labels that leave a majority right.

    Args:
        **numbers: the numbers by the names that the message uses.

    Raises:
        ValueError: a number lies outside or is not a number.
    """
    for name, number in numbers.items():
        if not 0 <= number < 0.5:
            raise ValueError(f"{name} must be in [0, 0.5), is {number}")
