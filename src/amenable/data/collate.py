"""Token ids to batches. A prompt and all its completions share a row: the prompt is encoded once.

Shapes: R rows, T tokens of the longest row, N completions in the batch, C tokens of the
longest completion.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.int64]

_ALIKE = 0.9  # of the longest row of a micro-batch
_ENOUGH = 0.25  # of the budget


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt and the completions that are scored or trained on after it.

    Args:
        prompt_ids: ids up to where a completion begins; at least one.
        completions: ids of each completion, end of sequence included where it ended; none empty.
    """

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a prompt has no tokens")
        if not self.completions or not all(self.completions):
            raise ValueError("a prompt group needs at least one completion and none without tokens")

    @property
    def tokens(self) -> int:
        """Length of the group's row."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


class Span(NamedTuple):
    """A text among the real tokens of a batch laid end to end, and the prompt that it continues."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Rows of prompt groups, ready for a forward pass.

    Args:
        input_ids: [R, T] prompt, then its completions one after the other, then padding.
        position_ids: [R, T]; every completion continues at the prompt's length.
        segments: [R, T] 0 in the prompt, k in its completion k, -1 in padding; None if every row
            has one completion (plain causal attention, padding on the right).
        real: [n] places of the real tokens among all R x T, in reading order.
        spans: the same n tokens as texts that attend by themselves.
        rows: [N] row of each completion.
        sources: [N, C] column whose hidden state predicts the token (and is the state that the
            critic values).
        targets: [N, C] the completion's tokens.
        mask: [N, C] True on real tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor | None
    real: Tensor
    spans: tuple[Span, ...]
    rows: Tensor
    sources: Tensor
    targets: Tensor
    mask: Tensor
    last: Tensor
    """[N] column of each completion's last real token, where the reward model reads its score."""

    @property
    def attention_mask(self) -> Tensor | None:
        """[R, 1, T, T] True where attention is allowed: causal, and no completion sees another."""
        return None if self.segments is None else _group_attention(self.segments)

    def to(self, device: torch.device) -> GroupBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name in self.__slots__
            for value in [getattr(self, name)]
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(groups: Sequence[PromptGroup], pad_id: int) -> GroupBatch:
    """Lay out prompt groups as rows.

    Completions keep their order: those of the first group, then of the second, and so on.

    Args:
        groups: at least one.
        pad_id: fills rows and completions.
    """
    texts = [ids for group in groups for ids in (group.prompt_ids, *group.completions)]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ids = np.fromiter(chain.from_iterable(texts), np.int64, lengths.sum())
    in_row = np.array([1 + len(group.completions) for group in groups])
    prompts = np.cumsum(in_row) - in_row  # numbers of the texts that are prompts
    row = np.repeat(np.arange(len(groups)), in_row)
    begin = np.cumsum(lengths) - lengths
    column = begin - begin[prompts][row]  # where a text begins in its row
    prompt_length = lengths[prompts][row]
    position = np.minimum(column, prompt_length)
    real = _leading(np.add.reduceat(lengths, prompts))
    own = np.ones(len(texts), dtype=bool)
    own[prompts] = False  # the texts that are completions
    mask = _leading(lengths[own])
    steps = np.arange(mask.shape[1])
    sources = np.where(steps == 0, prompt_length[own, None], column[own, None] + steps) - 1
    segments = np.repeat(np.arange(len(texts)) - prompts[row], lengths)
    return GroupBatch(
        input_ids=_padded(ids, real, pad_id),
        position_ids=_padded(np.arange(len(ids)) + np.repeat(position - begin, lengths), real, 0),
        segments=None if (in_row == 2).all() else _padded(segments, real, -1),
        real=torch.from_numpy(np.flatnonzero(real)),
        spans=tuple(_spans(groups)),
        rows=torch.from_numpy(row[own]),
        sources=torch.from_numpy(np.where(mask, sources, 0)),
        targets=_padded(ids[np.repeat(own, lengths)], mask, pad_id),
        mask=torch.from_numpy(mask),
        last=torch.from_numpy((column + lengths - 1)[own]),
    )


def _spans(groups: Sequence[PromptGroup]) -> Iterable[Span]:
    """One for a prompt with its only completion, else one for the prompt and each completion."""
    start = 0
    for group in groups:
        prompt = start + len(group.prompt_ids)
        if len(group.completions) == 1:
            end = prompt + len(group.completions[0])
            yield Span(start, end)
        else:
            yield Span(start, prompt)
            end = prompt
            for ids in group.completions:
                yield Span(end, end + len(ids), start, prompt)
                end += len(ids)
        start = end


def _leading(lengths: Numbers) -> npt.NDArray[np.bool_]:
    """[len(lengths), the largest] True on as many columns of each row."""
    return np.arange(lengths.max()) < lengths[:, None]


def _padded(flat: Numbers, real: npt.NDArray[np.bool_], fill: int) -> Tensor:
    """Numbers in reading order at the real places, and `fill` at the others."""
    rows = np.full(real.shape, fill)
    rows[real] = flat
    return torch.from_numpy(rows)


def _group_attention(segments: Tensor) -> Tensor:
    """[R, 1, T, T] allowed attention from segments: 0 prompt, k completion k, -1 padding."""
    query, key = segments[:, :, None], segments[:, None, :]
    size, device = segments.shape[1], segments.device
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    allowed = causal & (key >= 0) & ((key == 0) | (key == query))
    itself = torch.eye(size, dtype=torch.bool, device=device)  # padding: no NaN
    return (allowed | itself)[:, None]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that rows of like length share a batch of `max_tokens`, padding included.

    A row longer than `max_tokens` gets a batch of its own. A batch that holds a quarter of
    `max_tokens` takes no row of which a tenth would be padding: products are fast enough by then,
    and padding costs as much as tokens. Longest first: memory peaks at once.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of rows × longest row.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else []
        longest = lengths[current[0]] if current else 0
        alike = lengths[index] >= _ALIKE * longest
        small = longest * len(current) < _ENOUGH * max_tokens
        if current and longest * (len(current) + 1) <= max_tokens and (alike or small):
            current.append(index)
        else:
            batches.append([index])
    return batches


def packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that the tokens of each group, laid end to end, are at most `max_tokens`.

    The longest first, each into the first group with room for it. A row longer than `max_tokens`
    gets a group of its own.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of the sum.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((n for n, left in enumerate(room) if left >= lengths[index]), len(found))
        if place == len(found):
            found.append([])
            room.append(max_tokens)
        found[place].append(index)
        room[place] -= lengths[index]
    return found


def evenly(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[int]]:
    """Indices in a number of groups that so many ranks can share, none with much more than another.

    The longest first, each into the group with the fewest tokens. There are as few groups as keep
    each within `max_tokens`, a row that is longer apart, and their number is a multiple of `ranks`
    unless there are fewer rows.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of the sum.
        ranks: take turns at the groups.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = ranks * max(1, -(-sum(lengths) // (ranks * max_tokens)))
    while True:
        found: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
        fewest = [(0, place) for place in range(len(found))]  # a heap
        for index in order:
            tokens, place = fewest[0]
            found[place].append(index)
            heapq.heapreplace(fewest, (tokens + lengths[index], place))
        fits = all(tokens <= max_tokens or len(found[place]) == 1 for tokens, place in fewest)
        if fits or count >= len(lengths):
            return found
        count += ranks


def alike_for(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[int]]:
    """As `micro_batches`, in at least as many batches as there are ranks, where there are the rows.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of rows × longest row.
        ranks: take turns at the batches.
    """
    budget = min(max_tokens, -(-sum(lengths) // ranks)) if lengths else max_tokens
    found = micro_batches(lengths, budget)
    while len(found) < min(ranks, len(lengths)):
        budget -= -(-budget // 8)
        found = micro_batches(lengths, budget)
    return found


def seeded_epochs(count: int, epochs: float, seed: int) -> Iterable[int]:
    """Indices below `count`, reshuffled for each of `epochs` passes (the last may be partial)."""
    total = round(count * epochs)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < total:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:total]
