"""A key-value cache for decoding in which the samples of a prompt share the prompt's keys.

The prompt's keys and values are held once, beside prompts of like length; every sample has room of
its own for the tokens behind it, written in place. A step's attention is the softmax over both
parts together, so that nothing is approximated, repeated or copied. Keys are kept in float32: in
bfloat16 the scores themselves would be rounded, which fused attention does not do.

Shapes: P prompts of up to T tokens, B sequences, H key-value heads, G query heads of each, D head
size, C tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

_IMPLEMENTATION = "amenable_prefix"
_ALIKE = 0.75  # of the longest prompt of a group
_active: ContextVar[PrefixCache] = ContextVar("active prefix cache")


def serves(model: PreTrainedModel) -> bool:
    """Whether every layer of the model attends to all earlier tokens, by the common interface."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = getattr(config, "sliding_window", None) is None or "layer_types" in vars(config)
    common = getattr(model, "_supports_attention_backend", False)
    sdpa = config._attn_implementation == "sdpa"
    return bool(common and sdpa and plain and kinds == {"full_attention"})


class PrefixCache(Cache):
    """Takes over what the passes over the prompts left.

    Args:
        prefilled: of each pass the cache, [p, H, t, D] a layer, padded on the left, and its mask,
            [p, t] 1 at real tokens; longest prompts first.
        prompts: [B] the prompt of each sequence, ascending.
        room: C, most tokens that a sequence will add.
    """

    def __init__(
        self, prefilled: Sequence[tuple[DynamicCache, Tensor]], prompts: Tensor, room: int
    ) -> None:
        super().__init__(layers=[])
        self._groups: list[_Group] = []
        self._layer = -1
        start = 0
        for alike in _of_like_width(prefilled):
            end = start + sum(len(mask) for _, mask in alike)
            mine = prompts[(prompts >= start) & (prompts < end)] - start
            self._groups.append(_joined(alike, mine, room))
            start = end

    def extend(self, other: PrefixCache) -> None:
        """Put the sequences of another cache behind these."""
        self._groups += other._groups

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences (ascending), and the prompts that they have."""
        kept = []
        for start, end, group in self._spans():
            mine = indices[(indices >= start) & (indices < end)] - start
            if len(mine):
                kept.append(group.select(mine))
        self._groups = kept

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the [B, H, 1, D] of a step in place."""
        for start, end, group in self._spans():
            group.write(layer_idx, key_states[start:end, :, 0], value_states[start:end, :, 0])
        self._layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of prompts and steps; positions are always given, so nothing depends on it."""
        return max(int(group.hidden.shape[-1]) + group.length for group in self._groups)

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """[B, 1, H G, D] of the layer that was written last, from queries [B, H G, 1, D]."""
        heads = self._groups[0].values[0].shape[1]
        query = query.float().reshape(len(query), heads, -1, query.shape[-1]) * scaling
        with torch.autocast(query.device.type, enabled=False):
            parts = [g.attend(self._layer, query[start:end]) for start, end, g in self._spans()]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found.reshape(len(found), 1, -1, found.shape[-1])

    def _spans(self) -> Iterator[tuple[int, int, _Group]]:
        """Each group with its first sequence and the one behind its last."""
        start = 0
        for group in self._groups:
            end = start + len(group.prompts)
            yield start, end, group
            start = end


@dataclass
class _Group:
    """Prompts of like length, T the longest, and their samples, which are of one length."""

    keys: list[Tensor]  # of a layer [P, H, D, T], float32
    values: list[Tensor]  # of a layer [P, H, T, D]
    hidden: Tensor  # [P, 1, 1, T] minus infinity at padding, else 0
    own_keys: list[Tensor]  # of a layer [B, H, D, C], float32
    own_values: list[Tensor]  # of a layer [B, H, C, D]
    prompts: Tensor  # [B] the prompt of each sample, ascending
    length: int = 0  # tokens that every sample has

    def __post_init__(self) -> None:
        """Number the samples of each prompt, so that their queries stand side by side."""
        counts = torch.bincount(self.prompts, minlength=len(self.hidden))
        self._most = int(counts.max())
        first = counts.cumsum(0) - counts
        every = torch.arange(len(self.prompts), device=self.prompts.device)
        self._slots = self.prompts * self._most + every - first[self.prompts]
        self._whole = len(self.prompts) == len(self.hidden) * self._most
        self._padded = bool(self.hidden.isinf().any())

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
        self.own_keys[layer][..., self.length - 1] = key
        self.own_values[layer][:, :, self.length - 1] = value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """[B, H, G, D] of scaled queries [B, H, G, D] over prompt and own tokens together."""
        behind = self._to_prompts(query) @ self.keys[layer]
        if self._padded:
            behind += self.hidden
        own = query @ self.own_keys[layer][..., : self.length]
        weights = torch.cat([self._to_rows(behind), own], -1).softmax(-1)
        weights = weights.to(self.values[layer].dtype)
        before, after = weights.split([self.hidden.shape[-1], self.length], -1)
        found: Tensor = after @ self.own_values[layer][:, :, : self.length]
        return found + self._to_rows(self._to_prompts(before) @ self.values[layer])

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


def _of_like_width(
    prefilled: Sequence[tuple[DynamicCache, Tensor]],
) -> list[list[tuple[DynamicCache, Tensor]]]:
    """Neighbouring passes together, as long as a group costs more than their padding."""
    groups: list[list[tuple[DynamicCache, Tensor]]] = []
    for cache, mask in prefilled:
        if groups and mask.shape[1] >= _ALIKE * groups[-1][0][1].shape[1]:
            groups[-1].append((cache, mask))
        else:
            groups.append([(cache, mask)])
    return groups


def _joined(prefilled: Sequence[tuple[DynamicCache, Tensor]], prompts: Tensor, room: int) -> _Group:
    width, count = prefilled[0][1].shape[1], len(prompts)

    def together(parts: Iterable[Tensor]) -> Tensor:
        """Rows of all passes, widened on the left of their last dimension but one."""
        wide = [pad(x, (0, 0, width - x.shape[-2], 0)) for x in parts]
        return wide[0] if len(wide) == 1 else torch.cat(wide)

    layers = list(zip(*(cast(Any, cache).layers for cache, _ in prefilled), strict=True))
    keys = [together(part.keys.float() for part in layer) for layer in layers]
    values = [together(part.values for part in layer) for layer in layers]
    mask = together(mask[:, :, None] for _, mask in prefilled)[:, :, 0]
    hidden = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return _Group(
        keys=[k.transpose(-1, -2).contiguous() for k in keys],
        values=values,
        hidden=hidden.masked_fill_(mask == 0, -torch.inf)[:, None, None],
        own_keys=[k.new_empty(count, k.shape[1], k.shape[3], room) for k in keys],
        own_values=[v.new_empty(count, v.shape[1], room, v.shape[3]) for v in values],
        prompts=prompts,
    )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    return _active.get().attend(
        query, query.shape[-1] ** -0.5 if scaling is None else scaling
    ), None


AttentionInterface.register(_IMPLEMENTATION, _attend)


@contextmanager
def attending(model: PreTrainedModel, cache: PrefixCache) -> Iterator[None]:
    """The model's attention reads the cache."""
    config = model.config.get_text_config()
    before, token = config._attn_implementation, _active.set(cache)
    config._attn_implementation = _IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        _active.reset(token)
