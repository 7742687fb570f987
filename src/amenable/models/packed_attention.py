"""Attention over texts that are laid end to end: no padding, no mask, and no text sees another.

A batch is one row of all real tokens. Each span of it attends causally to itself and, where it
continues a prompt that others share, to that prompt. Products run in float32 or wider: their sizes
are as many as texts have lengths, and oneDNN, which would multiply bfloat16, keeps a compiled
kernel of each for good. Scores are made again in the backward pass, a block of queries at a time,
so that nothing quadratic is kept. Short texts of like length are read together.

Shapes: n tokens, H key heads with G query heads each, D head size; in a block S texts with L
queries and m keys each, behind a prompt of P tokens.
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
_BLOCK = 128  # queries of a long text that are read together
_TOGETHER = 512  # tokens of short texts, filling included
_ALIKE = 0.75  # of the longest of them
_blocks: ContextVar[Sequence[Block] | None] = ContextVar("blocks of the packed row", default=None)


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
    token = _blocks.set(blocks_of(spans))
    try:
        with attention_by(model, _IMPLEMENTATION):
            yield
    finally:
        _blocks.reset(token)


def reads_packed_row() -> bool:
    """Whether what passes through the model now is one packed row."""
    return _blocks.get() is not None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float
) -> Tensor:
    """[n, H G D] of queries [H G, n, D] over keys and values [H, n, D].

    Args:
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        blocks: of spans that cover every token once.
        scaling: of the scores.
    """
    return cast(Tensor, cast(Any, _PackedAttention).apply(query, key, value, blocks, scaling))


class Block(NamedTuple):
    """Queries that are read together: S texts of like length whole, or a part of one text."""

    queries: slice | Tensor
    """Of one text; or [S, L] of several, each filled up with its last token."""
    keys: slice | Tensor
    """What they see of their own texts, the queries last."""
    prefix: slice
    """The prompt that all of them see; it may be empty."""
    later: Tensor
    """[L, L] minus infinity where a key stands behind the query, else 0."""
    real: Tensor | None = None
    """Which of the S x L queries are of a text; None: all."""
    filling: Tensor | None = None
    """The others."""

    def asked(self, of_tokens: Tensor) -> Tensor:
        """[H, S, L G, D], contiguous and wide, of [H, G, n, D]."""
        part = _take(of_tokens, self.queries)
        return _wide(part.permute(0, 2, 3, 1, 4)).flatten(2, 3)

    def given(self, of_tokens: Tensor) -> Tensor:
        """The same of gradients: 0 at what fills up, so that it adds nothing to its keys."""
        rows = self.asked(of_tokens)
        if self.real is None:
            return rows
        assert self.filling is not None
        by_query = rows.unflatten(2, (self.length, -1)).flatten(1, 2)
        kept: Tensor = by_query.index_fill(1, self.filling, 0)
        return kept.view(rows.shape)

    def seen(self, of_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[H, P, D] of the prompt, and [H, S, m, D] of the texts, of [H, n, D]."""
        return of_tokens[:, self.prefix], _take(of_tokens, self.keys)

    def weights(self, asked: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        """[H, S, L G, P + m] from scaled queries."""
        scores = _against(asked, keys)
        by_query = scores.unflatten(2, (self.length, -1))
        by_query[..., -self.length :] += self.later[:, None]
        return scores.softmax(-1)

    def mixed(self, weights: Tensor, of_keys: tuple[Tensor, Tensor]) -> Tensor:
        """[H, S, L G, D]: the sum over keys."""
        shared = of_keys[0].shape[1]
        found: Tensor = weights[..., shared:] @ of_keys[1]
        if shared:
            before = weights[..., :shared].flatten(1, 2) @ of_keys[0]
            found += before.view(found.shape)
        return found

    def add(self, total: Tensor, weights: Tensor, of_queries: Tensor) -> None:
        """Add the sum over queries [H, S, L G, D] to the [H, n, D] of the keys."""
        shared = weights.shape[-1] - self.width
        own = weights[..., shared:].transpose(-1, -2) @ of_queries
        if shared:
            before = weights[..., :shared].flatten(1, 2).transpose(-1, -2)
            total[:, self.prefix] += before @ of_queries.flatten(1, 2)
        if isinstance(self.keys, slice):
            total[:, self.keys] += own[:, 0]
        else:
            tokens, own = self.keys.flatten(), own.flatten(1, 2)
            if self.real is not None:
                tokens, own = tokens[self.real], own[:, self.real]
            total.index_add_(1, tokens, own)

    def put(self, total: Tensor, found: Tensor) -> None:
        """Write [H, S, L G, D] where its queries stand in [n, H, G, D]."""
        rows = found.unflatten(2, (self.length, -1)).permute(1, 2, 0, 3, 4)
        if isinstance(self.queries, slice):
            total[self.queries] = rows[0].to(total.dtype)
        elif self.real is None:
            total[self.queries.flatten()] = rows.flatten(0, 1).to(total.dtype)
        else:
            total[self.queries.flatten()[self.real]] = rows.flatten(0, 1)[self.real].to(total.dtype)

    @property
    def length(self) -> int:
        """L."""
        return _size(self.queries)

    @property
    def width(self) -> int:
        """m, keys of a text."""
        return _size(self.keys)


def _size(where: slice | Tensor) -> int:
    return int(where.stop - where.start) if isinstance(where, slice) else where.shape[1]


def _take(x: Tensor, where: slice | Tensor) -> Tensor:
    """[..., S, L, D] of [..., n, D]; of one text a view."""
    return x[..., where, :].unsqueeze(-3) if isinstance(where, slice) else x[..., where, :]


def _later(count: int) -> Tensor:
    """[count, count] minus infinity at keys behind the query, else 0."""
    return torch.full((count, count), -torch.inf).triu_(1)


def blocks_of(spans: Sequence[Span]) -> tuple[Block, ...]:
    """How the queries of these spans are read."""
    found, short = [], []
    for span in spans:
        prefix = slice(span.prefix_start, span.prefix_end)
        if span.end - span.start <= _BLOCK:
            short.append(span)
            continue
        for start in range(span.start, span.end, _BLOCK):
            end = min(start + _BLOCK, span.end)
            queries, keys = slice(start, end), slice(span.start, end)
            found.append(Block(queries, keys, prefix, _later(end - start)))
    return (*found, *(_together(alike) for alike in _alike(short)))


def _alike(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Texts of like length behind the same prompt, longest first."""
    bundle: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.prefix_start, s.prefix_end, s.start - s.end)):
        if bundle:
            first, longest = bundle[0], bundle[0].end - bundle[0].start
            alike = span.end - span.start >= _ALIKE * longest and span[2:] == first[2:]
            if not alike or (len(bundle) + 1) * longest > _TOGETHER:
                yield bundle
                bundle = []
        bundle.append(span)
    if bundle:
        yield bundle


def _together(spans: Sequence[Span]) -> Block:
    prefix = slice(spans[0].prefix_start, spans[0].prefix_end)
    if len(spans) == 1:
        own = slice(spans[0].start, spans[0].end)
        return Block(own, own, prefix, _later(own.stop - own.start))
    sizes = [span.end - span.start for span in spans]
    longest = max(sizes)
    columns = [(row, column) for row in range(len(spans)) for column in range(longest)]
    tokens = torch.tensor([spans[row].start + min(n, sizes[row] - 1) for row, n in columns])
    index = tokens.view(len(spans), longest)
    if min(sizes) == longest:
        return Block(index, index, prefix, _later(longest))
    real, filling = (
        torch.tensor([i for i, (row, n) in enumerate(columns) if (n < sizes[row]) == wanted])
        for wanted in (True, False)
    )
    return Block(index, index, prefix, _later(longest), real, filling)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[Block],
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scaling = blocks, scaling
        grouped, keys, values = query.unflatten(0, (key.shape[0], -1)), _wide(key), _wide(value)
        heads, groups, tokens, size = grouped.shape
        found = query.new_empty(tokens, heads, groups, size)
        with torch.autocast(query.device.type, enabled=False):
            for block in blocks:
                weights = block.weights(block.asked(grouped) * scaling, block.seen(keys))
                block.put(found, block.mixed(weights, block.seen(values)))
        return found.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = cast(tuple[Tensor, Tensor, Tensor], ctx.saved_tensors)
        with torch.autocast(query.device.type, enabled=False):
            return *_gradients(query, key, value, grads[0], ctx.blocks, ctx.scaling), None, None


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, blocks: Sequence[Block], scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    grouped, keys, values = query.unflatten(0, (key.shape[0], -1)), _wide(key), _wide(value)
    heads, groups, tokens, size = grouped.shape
    by_found = grad.view(tokens, heads, groups, size).permute(1, 2, 0, 3)
    by_query = query.new_empty(tokens, heads, groups, size)
    by_key, by_value = torch.zeros_like(keys), torch.zeros_like(values)
    for block in blocks:
        asked, seen = block.asked(grouped) * scaling, block.seen(keys)
        weights, given = block.weights(asked, seen), block.given(by_found)
        block.add(by_value, weights, given)
        by_weights = _against(given, block.seen(values))
        by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        block.put(by_query, block.mixed(by_scores, seen) * scaling)
        block.add(by_key, by_scores, asked)
    return (
        by_query.permute(1, 2, 0, 3).flatten(0, 1),
        by_key.to(key.dtype),
        by_value.to(value.dtype),
    )


def _against(rows: Tensor, of_keys: tuple[Tensor, Tensor]) -> Tensor:
    """[H, S, L G, P + m] products of [H, S, L G, D] with every key's."""
    own = rows @ of_keys[1].transpose(-1, -2)
    if not of_keys[0].shape[1]:
        return own
    before = rows.flatten(1, 2) @ of_keys[0].transpose(-1, -2)
    return torch.cat([before.view(*own.shape[:3], -1), own], -1)


def _wide(x: Tensor) -> Tensor:
    """Contiguous, float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype, memory_format=torch.contiguous_format)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks, dtype = _blocks.get(), precision(query, value)
    assert blocks is not None
    rows, keys, values = (x[0].to(dtype) for x in (query, key, value))
    found = packed_attention(rows, keys, values, blocks, scaling)
    return found.view(1, len(found), query.shape[1], -1), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
