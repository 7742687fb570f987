"""Attention over texts that are laid end to end: no padding, no mask, and no text sees another.

A batch is one row of all real tokens. Each span of it attends causally to itself and, where it
continues a prompt that others share, to that prompt. Products run in float32 or wider: their sizes
are as many as texts have lengths, and oneDNN, which would multiply bfloat16, keeps a compiled
kernel of each for good. Scores are made again in the backward pass, a block of queries at a time,
so that nothing quadratic is kept.

Shapes: n tokens, H key heads with G query heads each, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from amenable.data.collate import Span
from amenable.models.projection import precision

_IMPLEMENTATION = "amenable_packed"
_BLOCK = 128
_spans: ContextVar[Sequence[Span] | None] = ContextVar("spans of the packed row", default=None)


def attends_plainly(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all earlier tokens, through the common interface."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = getattr(config, "sliding_window", None) is None or "layer_types" in vars(config)
    common = getattr(model, "_supports_attention_backend", False)
    sdpa = config._attn_implementation == "sdpa"
    return bool(common and sdpa and plain and kinds == {"full_attention"})


@contextmanager
def attention_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model's attention is the named one."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def packed_row(model: PreTrainedModel, spans: Sequence[Span]) -> Iterator[None]:
    """The model reads one row of these spans; it is given no mask."""
    token = _spans.set(spans)
    try:
        with attention_by(model, _IMPLEMENTATION):
            yield
    finally:
        _spans.reset(token)


def reads_packed_row() -> bool:
    """Whether what passes through the model now is one packed row."""
    return _spans.get() is not None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float
) -> Tensor:
    """[n, H G D] of queries [H G, n, D] over keys and values [H, n, D].

    Args:
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        spans: cover every token once.
        scaling: of the scores.
    """
    return cast(Tensor, cast(Any, _PackedAttention).apply(query, key, value, spans, scaling))


class _Block(NamedTuple):
    """Queries of a span that are read together."""

    start: int
    end: int
    span: Span

    def keys(self, of_tokens: Tensor) -> Tensor:
        """[H, m, D] what they see: the shared prompt, and the span up to themselves."""
        own = of_tokens[:, self.span.start : self.end]
        if self.span.prefix_start == self.span.prefix_end:
            return own
        return torch.cat([of_tokens[:, self.span.prefix_start : self.span.prefix_end], own], 1)

    def add(self, total: Tensor, found: Tensor) -> None:
        """Add [H, m, D] where `keys` took them from."""
        shared = self.span.prefix_end - self.span.prefix_start
        if shared:
            total[:, self.span.prefix_start : self.span.prefix_end] += found[:, :shared]
        total[:, self.span.start : self.end] += found[:, shared:]

    def queries(self, of_tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[H, q G, D] of [H, G, n, D]."""
        part = of_tokens[:, :, self.start : self.end].transpose(1, 2)
        return part.to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """[H, q G, m] float32 from scaled queries and the keys that they see."""
        count = self.end - self.start
        scores = query @ key.transpose(1, 2)
        later = torch.full((count, count), -torch.inf, dtype=scores.dtype).triu_(1)
        scores[:, :, -count:] += later.repeat_interleave(query.shape[1] // count, 0)
        return scores.softmax(-1)


def _blocks(spans: Sequence[Span]) -> Iterator[_Block]:
    for span in spans:
        for start in range(span.start, span.end, _BLOCK):
            yield _Block(start, min(start + _BLOCK, span.end), span)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.spans, ctx.scaling = spans, scaling
        with torch.autocast(query.device.type, enabled=False):
            return _outputs(query, key, value, spans, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = cast(tuple[Tensor, Tensor, Tensor], ctx.saved_tensors)
        with torch.autocast(query.device.type, enabled=False):
            return *_gradients(query, key, value, grads[0], ctx.spans, ctx.scaling), None, None


def _outputs(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float
) -> Tensor:
    heads, tokens, size = key.shape
    grouped = query.unflatten(0, (heads, -1))
    wide = _wide(key)
    values = _wide(value)
    found = query.new_empty(tokens, heads, grouped.shape[1], size)
    for block in _blocks(spans):
        asked = block.queries(grouped, wide.dtype) * scaling
        part = block.weights(asked, block.keys(wide)) @ block.keys(values)
        found[block.start : block.end] = part.unflatten(1, (block.end - block.start, -1)).transpose(
            0, 1
        )
    return found.flatten(1)


def _wide(x: Tensor) -> Tensor:
    """Contiguous, float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype, memory_format=torch.contiguous_format)


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, spans: Sequence[Span], scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, size = key.shape
    grouped = query.unflatten(0, (heads, -1))
    by_found = grad.view(tokens, heads, -1, size).permute(1, 2, 0, 3)
    keys, values = _wide(key), _wide(value)
    by_query = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    by_key, by_value = torch.zeros_like(keys), torch.zeros_like(keys)
    for block in _blocks(spans):
        count = block.end - block.start
        asked = block.queries(grouped, keys.dtype) * scaling
        seen = block.keys(keys)
        weights = block.weights(asked, seen)
        given = block.queries(by_found, keys.dtype)
        block.add(by_value, weights.transpose(1, 2) @ given)
        by_weights = given @ block.keys(values).transpose(1, 2)
        by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        part = (by_scores @ seen) * scaling
        by_query[:, :, block.start : block.end] = part.unflatten(1, (count, -1)).transpose(1, 2)
        block.add(by_key, by_scores.transpose(1, 2) @ asked)
    return (
        by_query.flatten(0, 1).to(query.dtype),
        by_key.to(key.dtype),
        by_value.to(value.dtype),
    )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    spans, dtype = _spans.get(), precision(query, value)
    assert spans is not None
    rows, keys, values = (x[0].to(dtype) for x in (query, key, value))
    found = packed_attention(rows, keys, values, spans, scaling)
    return found.view(1, len(found), query.shape[1], -1), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
