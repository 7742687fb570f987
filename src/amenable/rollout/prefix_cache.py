"""A key-value cache for decoding in which the samples of a prompt share the prompt's keys.

Prompts of like length stand together, so that little padding is read. Where a prompt has several
samples its keys and values are held once, and every sample has room of its own for the tokens
behind it; where each has one, that room is behind the prompt's. A step's attention is the softmax
over all of it together, so that nothing is approximated. Keys and values are kept in the precision
that made them and read through one float32 buffer, which stays in the processor's cache: half the
bytes come from memory, no score is rounded, and no length leaves a compiled kernel behind
(`projection.filling`).

Shapes: P prompts, the longest of T tokens, B sequences, H key-value heads, G query heads of each,
D head size, C tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from amenable.models.packed_attention import attention_by

_IMPLEMENTATION = "amenable_prefix"
_GROUP_BYTES = 1_000_000  # are read in the time that a group of its own takes in every layer
_active: ContextVar[PrefixCache] = ContextVar("active prefix cache")


class CacheShape(NamedTuple):
    """Of a model's keys, and of its values."""

    layers: int
    heads: int
    size: int
    device: torch.device
    dtype: torch.dtype


class PrefixCache(Cache):
    """Room for prompts, which `fill` writes, and for their samples.

    Args:
        lengths: [P] tokens of each prompt, longest first.
        prompts: [B] the prompt of each sequence, ascending.
        room: C, most tokens that a sequence will add.
        shape: of the model's keys and values.
    """

    def __init__(
        self, lengths: Sequence[int], prompts: Tensor, room: int, shape: CacheShape
    ) -> None:
        super().__init__(layers=[])
        self._groups: list[_Group] = []
        self._places: list[tuple[int, int]] = []
        self._layer = -1
        self._buffer = _Buffer()
        start = 0
        for end in _ends(lengths, shape):
            mine = prompts[(prompts >= start) & (prompts < end)] - start
            self._places += [(len(self._groups), n) for n in range(end - start)]
            self._groups.append(_Group.empty(lengths[start:end], mine, room, shape))
            start = end

    def fill(self, prompt: int, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the [H, t, D] of a prompt's tokens, before any sequence has been added or left."""
        group, place = self._places[prompt]
        self._groups[group].fill(place, layer, keys, values)

    def extend(self, other: PrefixCache) -> None:
        """Put the sequences of another cache behind these."""
        self._groups += other._groups

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences (ascending), and the prompts that they have."""
        kept = []
        for start, end, group in self._spans():
            mine = indices[(indices >= start) & (indices < end)] - start
            if len(mine) == end - start:
                kept.append(group)
            elif len(mine):
                kept.append(group.select(mine))
        self._groups = kept

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the [B, H, 1, D] of a step, as transformers hands them over."""
        self.write(layer_idx, key_states[:, :, 0], value_states[:, :, 0])
        return key_states, value_states

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append a token's [B, H, D] to every sequence, in place; layers come in their order."""
        for start, end, group in self._spans():
            group.write(layer, keys[start:end], values[start:end])
        self._layer = layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of prompts and steps; positions are always given, so nothing depends on it."""
        return max(group.width + group.length for group in self._groups)

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """[B, H G, D] of the layer that was written last, from queries [B, H G, D]."""
        heads = self._groups[0].values[0].shape[1]
        grouped = query.float().unflatten(1, (heads, -1)) * scaling
        with torch.autocast(query.device.type, enabled=False):
            parts = [
                group.attend(self._layer, grouped[start:end], self._buffer)
                for start, end, group in self._spans()
            ]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found.flatten(1, 2)

    def _spans(self) -> Iterator[tuple[int, int, _Group]]:
        """Each group with its first sequence and the one behind its last."""
        start = 0
        for group in self._groups:
            end = start + len(group.prompts)
            yield start, end, group
            start = end


def _ends(lengths: Sequence[int], shape: CacheShape) -> Iterator[int]:
    """The prompt behind the last of each group: padding costs less than a group of its own."""
    token = 2 * shape.heads * shape.size * shape.dtype.itemsize
    padding, first = 0, 0
    for place, length in enumerate(lengths):
        padding += lengths[first] - length
        if padding * token > _GROUP_BYTES:
            yield place
            padding, first = 0, place
    yield len(lengths)


class _Buffer:
    """Room in which tensors are read as float32, one at a time."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` in float32, until the next call."""
        if x.dtype is torch.float32:
            return x
        if self._room.numel() < x.numel():
            self._room = torch.empty(x.numel(), device=x.device)
        return self._room[: x.numel()].view(x.shape).copy_(x)


@dataclass
class _Group:
    """Prompts of like length, T the longest, and their samples, which are of one length.

    Where each prompt has one sample, its tokens stand behind the prompt's and there are no `own`.
    """

    keys: list[Tensor]  # of a layer [P, H, T, D] or [B, H, T + C, D]
    values: list[Tensor]  # the same
    hidden: Tensor  # [P, 1, 1, T] minus infinity at padding, else 0
    own_keys: list[Tensor]  # of a layer [B, H, C, D]
    own_values: list[Tensor]  # the same
    prompts: Tensor  # [B] the prompt of each sample, ascending
    length: int = 0  # tokens that every sample has

    @classmethod
    def empty(cls, lengths: Sequence[int], prompts: Tensor, room: int, shape: CacheShape) -> _Group:
        """Room for prompts of these lengths, on the left of which is padding."""
        width, count, alone = lengths[0], len(lengths), len(prompts) == len(lengths)
        columns = torch.arange(width, device=shape.device)
        starts = width - torch.tensor(lengths, device=shape.device)
        hidden = torch.zeros(count, width, device=shape.device)

        def rows(number: int, tokens: int) -> list[Tensor]:
            size = (number, shape.heads, tokens, shape.size)
            return [
                torch.zeros(size, device=shape.device, dtype=shape.dtype)
                for _ in range(shape.layers)
            ]

        return cls(
            keys=rows(count, width + room * alone),
            values=rows(count, width + room * alone),
            hidden=hidden.masked_fill_(columns < starts[:, None], -torch.inf)[:, None, None],
            own_keys=[] if alone else rows(len(prompts), room),
            own_values=[] if alone else rows(len(prompts), room),
            prompts=prompts,
        )

    def __post_init__(self) -> None:
        """Number the samples of each prompt, so that their queries stand side by side."""
        counts = torch.bincount(self.prompts, minlength=len(self.hidden))
        self._most = int(counts.max())
        first = counts.cumsum(0) - counts
        every = torch.arange(len(self.prompts), device=self.prompts.device)
        self._slots = self.prompts * self._most + every - first[self.prompts]
        self._whole = len(self.prompts) == len(self.hidden) * self._most
        self._padded = bool(self.hidden.isinf().any())
        self._alone = not self.own_keys
        self.width = int(self.hidden.shape[-1])

    def fill(self, prompt: int, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the [H, t, D] of a prompt's tokens."""
        place = slice(self.width - keys.shape[1], self.width)
        self.keys[layer][prompt, :, place] = keys
        self.values[layer][prompt, :, place] = values

    def select(self, samples: Tensor) -> _Group:
        """These samples, and the prompts that they have."""
        kept, prompts = self.prompts[samples].unique(return_inverse=True)
        return replace(
            self,
            own_keys=[keys[samples] for keys in self.own_keys],
            own_values=[values[samples] for values in self.own_values],
            prompts=prompts,
            **{} if len(kept) == len(self.hidden) else self._of_prompts(kept),
        )

    def _of_prompts(self, kept: Tensor) -> dict[str, Any]:
        return {
            "keys": [keys[kept] for keys in self.keys],
            "values": [values[kept] for values in self.values],
            "hidden": self.hidden[kept],
        }

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Append a token's [B, H, D] to every sample; layers come in their order."""
        if layer == 0:
            self.length += 1
        place = self.length - 1
        if self._alone:
            self.keys[layer][:, :, self.width + place] = key
            self.values[layer][:, :, self.width + place] = value
        else:
            self.own_keys[layer][:, :, place] = key
            self.own_values[layer][:, :, place] = value

    def attend(self, layer: int, query: Tensor, read: _Buffer) -> Tensor:
        """[B, H, G, D] of scaled queries [B, H, G, D] over prompt and own tokens together."""
        if self._alone:
            seen = self.width + self.length
            scores = query @ read(self.keys[layer][:, :, :seen]).transpose(-1, -2)
            if self._padded:
                scores[..., : self.width] += self.hidden
            return scores.softmax(-1) @ read(self.values[layer][:, :, :seen])
        behind = self._to_prompts(query) @ read(self.keys[layer]).transpose(-1, -2)
        if self._padded:
            behind += self.hidden
        own = query @ read(self.own_keys[layer][:, :, : self.length]).transpose(-1, -2)
        weights = torch.cat([self._to_rows(behind), own], -1).softmax(-1)
        before, after = weights.split([self.width, self.length], -1)
        found: Tensor = after @ read(self.own_values[layer][:, :, : self.length])
        return found + self._to_rows(self._to_prompts(before) @ read(self.values[layer]))

    def _to_prompts(self, rows: Tensor) -> Tensor:
        """[B, H, G, n] to [P, H, K G, n]: the samples of a prompt side by side, K at the most."""
        _, heads, groups, size = rows.shape
        grid = rows
        if not self._whole:
            grid = rows.new_zeros(len(self.hidden) * self._most, heads, groups, size)
            grid[self._slots] = rows
        if self._most == 1:
            return grid
        grid = grid.view(-1, self._most, heads, groups, size).transpose(1, 2)
        return grid.reshape(-1, heads, self._most * groups, size)

    def _to_rows(self, grid: Tensor) -> Tensor:
        """Undo `_to_prompts`."""
        if self._most > 1:
            prompts, heads, wide, size = grid.shape
            grid = grid.view(prompts, heads, self._most, wide // self._most, size).transpose(1, 2)
            grid = grid.reshape(-1, heads, wide // self._most, size)
        return grid if self._whole else grid[self._slots]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active.get().attend(query[:, :, 0], scaling)[:, None], None


AttentionInterface.register(_IMPLEMENTATION, _attend)


@contextmanager
def attending(model: PreTrainedModel, cache: PrefixCache) -> Iterator[None]:
    """The model's attention reads the cache."""
    token = _active.set(cache)
    try:
        with attention_by(model, _IMPLEMENTATION):
            yield
    finally:
        _active.reset(token)
