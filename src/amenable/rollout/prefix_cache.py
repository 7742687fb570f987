"""A key-value cache for decoding in which the samples of a prompt share the prompt's keys.

The prompt's keys and values are held once, in the rows that the prefill made; every sample has room
of its own for the tokens behind it, written in place. A step's attention is the softmax over both
parts together, so that nothing is approximated, repeated or copied. Keys are kept in float32: in
bfloat16 the scores themselves would be rounded, which fused attention does not do.

Shapes: P prompts of up to T tokens, B sequences, H key-value heads, G query heads of each, D head
size, C tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

_IMPLEMENTATION = "amenable_prefix"
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
            [p, t] 1 at real tokens.
        places: [P] number of each prompt, in the order of the passes.
        prompts: [B] the prompt of each sequence.
        room: C, most tokens that a sequence will add.
    """

    def __init__(
        self,
        prefilled: Sequence[tuple[DynamicCache, Tensor]],
        places: Tensor,
        prompts: Tensor,
        room: int,
    ) -> None:
        super().__init__(layers=[])
        width, back = max(mask.shape[1] for _, mask in prefilled), places.argsort()
        in_order = torch.equal(places, torch.arange(len(places), device=places.device))

        def together(parts: Iterable[Tensor]) -> Tensor:
            """Rows of all passes, widened on the left of their last dimension but one."""
            wide = [pad(x, (0, 0, width - x.shape[-2], 0)) for x in parts]
            joined = wide[0] if len(wide) == 1 else torch.cat(wide)
            return joined if in_order else joined[back]

        layers = list(zip(*(cast(Any, cache).layers for cache, _ in prefilled), strict=True))
        self._keys = [together(part.keys.float() for part in layer) for layer in layers]
        self._values = [together(part.values for part in layer) for layer in layers]
        mask = together(mask[:, :, None] for _, mask in prefilled)[:, :, 0]
        self._room, self._length, self._layer = room, 0, -1
        self._own_keys: list[Tensor] = []
        self._own_values: list[Tensor] = []
        hidden = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        self._hidden = hidden.masked_fill_(mask == 0, -torch.inf)[:, None, None]
        self._padded = bool((mask == 0).any())
        self._prompts = prompts
        self._place()

    def _place(self) -> None:
        """Number the samples of each prompt, so that their queries stand side by side."""
        counts = torch.bincount(self._prompts, minlength=len(self._hidden))
        self._most = int(counts.max())
        first = counts.cumsum(0) - counts
        order = self._prompts.argsort(stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=order.device)
        self._slots = self._prompts * self._most + number - first[self._prompts]
        every = torch.arange(len(self._hidden) * self._most, device=order.device)
        self._whole = torch.equal(self._slots, every)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, and the prompts that they have."""
        self._own_keys = [keys[indices] for keys in self._own_keys]
        self._own_values = [values[indices] for values in self._own_values]
        kept, self._prompts = self._prompts[indices].unique(return_inverse=True)
        if len(kept) < len(self._hidden):
            self._keys = [keys[kept] for keys in self._keys]
            self._values = [values[kept] for values in self._values]
            self._hidden = self._hidden[kept]
        self._place()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the [B, H, 1, D] of a step in place."""
        if layer_idx == 0:
            self._length += 1
        if layer_idx == len(self._own_keys):
            shape = (*key_states.shape[:2], self._room, key_states.shape[-1])
            self._own_keys.append(key_states.new_empty(shape, dtype=torch.float32))
            wide, dtype = value_states.shape[-1], self._values[layer_idx].dtype
            self._own_values.append(value_states.new_empty((*shape[:3], wide), dtype=dtype))
        self._own_keys[layer_idx][:, :, self._length - 1] = key_states[:, :, 0]
        self._own_values[layer_idx][:, :, self._length - 1] = value_states[:, :, 0]
        self._layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of prompts and steps; positions are always given, so nothing depends on it."""
        return int(self._hidden.shape[-1]) + self._length

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """[B, 1, H G, D] of the layer that was written last, from queries [B, H G, 1, D]."""
        keys, values = self._keys[self._layer], self._values[self._layer]
        own_keys = self._own_keys[self._layer][:, :, : self._length]
        own_values = self._own_values[self._layer][:, :, : self._length]
        count, heads, size = len(query), keys.shape[1], query.shape[-1]
        with torch.autocast(query.device.type, enabled=False):
            query = query.float().reshape(count, heads, -1, size) * scaling
            behind = self._to_prompts(query) @ keys.transpose(-1, -2)
            if self._padded:
                behind += self._hidden
            scores = torch.cat([self._to_rows(behind), query @ own_keys.transpose(-1, -2)], -1)
            weights = scores.softmax(-1).to(values.dtype)
            before, own = weights.split([keys.shape[2], self._length], -1)
            found: Tensor = self._to_rows(self._to_prompts(before) @ values) + own @ own_values
        return found.reshape(count, 1, -1, found.shape[-1])

    def _to_prompts(self, rows: Tensor) -> Tensor:
        """[B, H, G, n] to [P, H, K G, n]: the samples of a prompt side by side, K at the most."""
        _, heads, groups, size = rows.shape
        grid = rows
        if not self._whole:
            grid = rows.new_zeros(len(self._hidden) * self._most, heads, groups, size)
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
