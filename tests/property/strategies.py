"""Hypothesis strategies shared by the property tests: small tensors of ordinary size."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

settings.register_profile("amenable", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("amenable")


def tensors(*shape: int, low: float = -5.0, high: float = 5.0) -> st.SearchStrategy[Tensor]:
    """Float64 tensors of the given shape with entries in [low, high]."""
    count = int(torch.Size(shape).numel())
    numbers = st.floats(low, high, allow_subnormal=False)
    return st.lists(numbers, min_size=count, max_size=count).map(
        lambda row: torch.tensor(row, dtype=torch.float64).reshape(shape)
    )


def shapes(rows: int = 4, columns: int = 5) -> st.SearchStrategy[tuple[int, int]]:
    """[N, C] with at least one of each."""
    return st.tuples(st.integers(1, rows), st.integers(1, columns))


@st.composite
def token_batches(draw: st.DrawFn, count: int, low: float = -5.0) -> tuple[Tensor, ...]:
    """`count` tensors [N, C] and a mask whose rows are contiguous from column 0, some empty."""
    rows, columns = draw(shapes())
    lengths = torch.tensor(draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    mask = torch.arange(columns) < lengths.unsqueeze(1)
    return (*(draw(tensors(rows, columns, low=low)) for _ in range(count)), mask)


@st.composite
def pairs(draw: st.DrawFn, count: int = 2) -> tuple[Tensor, ...]:
    """`count` tensors of one shape [N]."""
    rows = draw(st.integers(1, 6))
    return tuple(draw(tensors(rows)) for _ in range(count))


@st.composite
def groups(draw: st.DrawFn) -> Tensor:
    """Scores [P, G] with at least two completions a prompt."""
    return draw(tensors(draw(st.integers(1, 3)), draw(st.integers(2, 5))))
