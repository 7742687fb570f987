"""Attention over texts that are laid end to end: no padding, no mask, and no text sees another.

A batch is one row of all real tokens. Each span of it attends causally to itself and, where it
continues a prompt that others share, to that prompt. Products run in float32 or wider: their sizes
are as many as texts have lengths, and oneDNN, which would multiply bfloat16, keeps a compiled
kernel of each for good. Texts of like length are read together, some queries of each at a time and
against the keys up to them alone. Scores are made again in the backward pass, so that nothing
quadratic is kept.

Shapes: n tokens, H key heads with G query heads each, D head size; in a bundle S texts of L tokens
behind a prompt of P tokens.
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
_TOGETHER = 1024  # tokens of a bundle, filling included
_ALIKE = 0.85  # of its longest text
_FEWEST, _MOST, _PARTS = 64, 128, 8  # queries of a text at a time; else so many parts of it
_layout: ContextVar[Layout | None] = ContextVar("layout of the packed row", default=None)


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
    token = _layout.set(Layout(spans))
    try:
        with attention_by(model, _IMPLEMENTATION):
            yield
    finally:
        _layout.reset(token)


def reads_packed_row() -> bool:
    """Whether what passes through the model now is one packed row."""
    return _layout.get() is not None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
) -> Tensor:
    """[n, H G D] of queries [n, H G, D] over keys and values [n, H, D].

    Args:
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        layout: of the row.
        scaling: of the scores.
    """
    return cast(Tensor, cast(Any, _PackedAttention).apply(query, key, value, layout, scaling))


class Bundle(NamedTuple):
    """Texts of like length behind the same prompt, each filled up to the longest."""

    texts: tuple[Span, ...]
    """S of them, longest first."""
    first: int
    """Where the bundle begins among the tokens of all bundles, filling included."""

    @property
    def length(self) -> int:
        """L."""
        return self.texts[0].end - self.texts[0].start

    @property
    def prompt(self) -> slice:
        """Of the row's tokens: what all of the texts see; it may be empty."""
        return slice(self.texts[0].prefix_start, self.texts[0].prefix_end)

    @property
    def whole(self) -> slice:
        """All L tokens."""
        return slice(0, self.length)

    @property
    def parts(self) -> list[slice]:
        """Of the L tokens: the queries that are read at a time, first to last."""
        most = min(max(_FEWEST, self.length // _PARTS), _MOST)
        step = -(-self.length // max(1, round(self.length / most)))
        return [slice(n, min(n + step, self.length)) for n in range(0, self.length, step)]

    def tokens(self, part: slice) -> list[tuple[int, bool]]:
        """[S l] where a part of every text stands in the row, and whether it is the text's own.

        A short text is filled up with its last token.
        """
        return [
            (min(text.start + n, text.end - 1), text.start + n < text.end)
            for text in self.texts
            for n in range(part.start, part.stop)
        ]

    def view(self, rows: Tensor, part: slice, heads: int) -> Tensor:
        """[H S, l, ...] of a part of every text, from the rows of all bundles."""
        start, texts = heads * self.first, heads * len(self.texts)
        own = rows[start + texts * part.start : start + texts * part.stop]
        return own.view(texts, part.stop - part.start, -1)


class Layout:
    """How the tokens of a row are read.

    Args:
        spans: the row's texts; every token is of one.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.tokens = sum(span.end - span.start for span in spans)
        self.bundles: list[Bundle] = []
        first = 0
        for texts in _alike(spans):
            self.bundles.append(Bundle(tuple(texts), first))
            first += len(texts) * self.bundles[-1].length
        self._orders: dict[int, tuple[_Order, _Order]] = {}

    def orders(self, heads: int) -> tuple[_Order, _Order]:
        """Of the queries, part by part of each bundle, and of the keys, bundle by bundle."""
        if heads not in self._orders:
            parts = [bundle.tokens(part) for bundle in self.bundles for part in bundle.parts]
            whole = [bundle.tokens(bundle.whole) for bundle in self.bundles]
            asked, seen = (_Order.of(pieces, self.tokens, heads) for pieces in (parts, whole))
            self._orders[heads] = asked, seen
        return self._orders[heads]


def _alike(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Texts of like length behind the same prompt, longest first."""
    bundle: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.prefix_start, s.prefix_end, s.start - s.end)):
        if bundle:
            longest = bundle[0].end - bundle[0].start
            alike = span.end - span.start >= _ALIKE * longest and span[2:] == bundle[0][2:]
            if not alike or (len(bundle) + 1) * longest > _TOGETHER:
                yield bundle
                bundle = []
        bundle.append(span)
    if bundle:
        yield bundle


class _Order(NamedTuple):
    """From [n H], the key heads of a row's tokens, to the R rows that bundles read, and back."""

    there: Tensor
    """[R] of the n H: heads, then texts, then tokens of each piece."""
    back: Tensor
    """[n H] of the R."""
    own: Tensor
    """[R, 1] False at what fills up."""

    @classmethod
    def of(cls, pieces: Sequence[list[tuple[int, bool]]], tokens: int, heads: int) -> _Order:
        """Of pieces that are read one after the other."""
        head, there, own = torch.arange(heads)[:, None], [], []
        for piece in pieces:
            there.append((torch.tensor([token for token, _ in piece]) * heads + head).flatten())
            own.append(torch.tensor([is_own for _, is_own in piece]).repeat(heads))
        rows, real = torch.cat(there), torch.cat(own)
        back = torch.empty(tokens * heads + 1, dtype=torch.long)
        back.scatter_(0, rows.where(real, tokens * heads), torch.arange(len(rows)))
        return cls(rows, back[:-1], real[:, None])


class _Keys(NamedTuple):
    """Keys or values that a bundle's texts see, or the gradients of these."""

    prompt: Tensor
    """[H, P, D]"""
    own: Tensor
    """[H S, L, D]"""

    def against(self, rows: Tensor, end: int) -> Tensor:
        """[H S, r, P + end] products of [H S, r, D] with the prompt's and the first own ones."""
        own = torch.bmm(rows, self.own[:, :end].transpose(1, 2))
        heads, shared, size = self.prompt.shape
        if not shared:
            return own
        before = torch.bmm(rows.view(heads, -1, size), self.prompt.transpose(1, 2))
        return torch.cat([before.view(*own.shape[:2], shared), own], -1)

    def mix(self, weights: Tensor, out: Tensor) -> None:
        """Sums over them into [H S, r, D], of weights as `against` gives products."""
        heads, shared, size = self.prompt.shape
        own = weights[..., shared:]
        torch.bmm(own, self.own[:, : own.shape[-1]], out=out)
        if shared:
            before = weights[..., :shared].reshape(heads, -1, shared)
            out.view(heads, -1, size).baddbmm_(before, self.prompt)

    def add(self, weights: Tensor, rows: Tensor) -> None:
        """Add to each the sum over [H S, r, D] that such weights give it."""
        heads, shared, size = self.prompt.shape
        own = weights[..., shared:]
        self.own[:, : own.shape[-1]] += torch.bmm(own.transpose(1, 2), rows)
        if shared:
            before = weights[..., :shared].reshape(heads, -1, shared).transpose(1, 2)
            self.prompt.baddbmm_(before, rows.view(heads, -1, size))


class _Laid:
    """Queries, keys and values in float32 or wider, in the order in which bundles read them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
    ) -> None:
        self.heads, self.size = key.shape[1:]
        self.bundles = layout.bundles
        self.asked, self.seen = layout.orders(self.heads)
        self.queries = self.rows(query).index_select(0, self.asked.there).mul_(scaling)
        self._rows = [self.rows(x) for x in (key, value)]
        self._own = [rows.index_select(0, self.seen.there) for rows in self._rows]

    def rows(self, x: Tensor) -> Tensor:
        """[n H, ...] of [n, ...]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype).contiguous().view(len(x) * self.heads, -1)

    def of(self, queries: Tensor, bundle: Bundle, part: slice) -> Tensor:
        """[H S, l G, D] of a part of each text."""
        own = bundle.view(queries, part, self.heads)
        return own.view(len(own), -1, self.size)

    def keys_and_values(self, bundle: Bundle) -> list[_Keys]:
        """Of a bundle."""
        return [
            _Keys(
                rows.unflatten(0, (-1, self.heads))[bundle.prompt].transpose(0, 1),
                bundle.view(own, bundle.whole, self.heads),
            )
            for rows, own in zip(self._rows, self._own, strict=True)
        ]

    def weights(self, bundle: Bundle, keys: _Keys, part: slice) -> Tensor:
        """[H S, l G, P + e] of a part of the queries, which end at e."""
        scores, length = keys.against(self.of(self.queries, bundle, part), part.stop), _size(part)
        later = torch.full((length, length), -torch.inf).triu_(1)
        scores.unflatten(1, (length, -1))[..., -length:] += later[:, None]
        return scores.softmax(-1)


def _size(part: slice) -> int:
    return int(part.stop - part.start)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scaling = layout, scaling
        with torch.autocast(query.device.type, enabled=False):
            laid = _Laid(query, key, value, layout, scaling)
            found = torch.empty_like(laid.queries)
            for bundle in laid.bundles:
                seen, given = laid.keys_and_values(bundle)
                for part in bundle.parts:
                    given.mix(laid.weights(bundle, seen, part), laid.of(found, bundle, part))
            return found.index_select(0, laid.asked.back).view(len(query), -1).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = cast(tuple[Tensor, Tensor, Tensor], ctx.saved_tensors)
        with torch.autocast(query.device.type, enabled=False):
            laid = _Laid(query, key, value, ctx.layout, ctx.scaling)
            by_query, by_key, by_value = _gradients(laid, grads[0])
            by_query *= ctx.scaling
        return (
            by_query.view(query.shape).to(query.dtype),
            by_key.view(key.shape).to(key.dtype),
            by_value.view(value.shape).to(value.dtype),
            None,
            None,
        )


def _gradients(laid: _Laid, by_found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the scaled queries, the keys and the values, rows of [n H]."""
    wanted = laid.rows(by_found).index_select(0, laid.asked.there)
    wanted *= laid.asked.own  # what fills up adds nothing to its keys
    by_query = torch.empty_like(laid.queries)
    by_keys = [torch.zeros(len(laid.seen.there), laid.size, dtype=wanted.dtype) for _ in range(2)]
    prompts = []
    for bundle in laid.bundles:
        seen, given = laid.keys_and_values(bundle)
        by_seen, by_given = (
            _Keys(torch.zeros_like(seen.prompt), bundle.view(x, bundle.whole, laid.heads))
            for x in by_keys
        )
        prompts.append((bundle.prompt, (by_seen.prompt, by_given.prompt)))
        for part in bundle.parts:
            weights, mine = laid.weights(bundle, seen, part), laid.of(wanted, bundle, part)
            by_given.add(weights, mine)
            by_weights = given.against(mine, part.stop)
            by_scores = torch.ops.aten._softmax_backward_data(
                by_weights, weights, -1, weights.dtype
            )
            seen.mix(by_scores, laid.of(by_query, bundle, part))
            by_seen.add(by_scores, laid.of(laid.queries, bundle, part))
    by_key, by_value = (
        x.index_select(0, laid.seen.back).unflatten(0, (-1, laid.heads)) for x in by_keys
    )
    for prompt, (of_key, of_value) in prompts:
        by_key[prompt] += of_key.transpose(0, 1)
        by_value[prompt] += of_value.transpose(0, 1)
    return by_query.index_select(0, laid.asked.back), by_key, by_value


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout, dtype = _layout.get(), precision(query, value)
    assert layout is not None
    rows, keys, values = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    found = packed_attention(rows, keys, values, layout, scaling)
    return found.view(1, len(found), query.shape[1], -1), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
