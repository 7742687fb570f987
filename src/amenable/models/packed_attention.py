"""Attention over texts that are laid end to end: no padding, no mask, and no text sees another.

A batch is one row of all real tokens. Each span of it attends causally to itself and, where it
continues a prompt that others share, to that prompt. Products run in float32 or wider: their sizes
are as many as texts have lengths, and oneDNN, which would multiply bfloat16, keeps a compiled
kernel of each for good. Texts of like length are read together, short ones of several prompts too,
some queries of each at a time and against the keys up to them alone. Scores are made again in the
backward pass, so that nothing quadratic is kept.

Shapes: n tokens, H key heads with G query heads each, D head size; in a bundle Q prompts of P
tokens with S texts of L tokens behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from amenable.data.collate import Span
from amenable.models.projection import precision

_IMPLEMENTATION = "amenable_packed"
_TOGETHER = 1024  # tokens of a bundle, filling included
_ALIKE, _NEARLY = 0.85, 8  # of the largest, or so many tokens less
_SCORES = 2**16  # of a query head, in a bundle of several prompts: more would leave the cache
_FEWEST, _MOST, _PARTS = 64, 128, 8  # queries of a text at a time; else so many parts of it
T = TypeVar("T")
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


@dataclass(frozen=True)
class Bundle:
    """Texts of like length behind prompts of like length, as many behind each.

    A short text or prompt is filled up with its last token, to the longest.
    """

    texts: tuple[Span, ...]
    """Q S of them, prompt by prompt."""
    prompts: int = 1
    """Q; one, and empty, where texts stand alone."""

    @cached_property
    def length(self) -> int:
        """L."""
        return max(map(_length, self.texts))

    @cached_property
    def shared(self) -> int:
        """P."""
        return max(map(_prompt_length, self.texts))

    @property
    def whole(self) -> slice:
        """All L tokens."""
        return slice(0, self.length)

    @cached_property
    def parts(self) -> list[slice]:
        """Of the L tokens: the queries that are read at a time, first to last."""
        most = min(max(_FEWEST, self.length // _PARTS), _MOST)
        step = -(-self.length // max(1, round(self.length / most)))
        return [slice(n, min(n + step, self.length)) for n in range(0, self.length, step)]

    @cached_property
    def hidden(self) -> Tensor | None:
        """[Q, 1, P] minus infinity at what fills prompts up, else 0; None where nothing does."""
        own = torch.tensor([is_own for _, is_own in self.prompt_places()])
        if own.all():
            return None
        return torch.zeros(len(own)).masked_fill(~own, -torch.inf).view(self.prompts, 1, -1)

    def places(self, part: slice) -> list[tuple[int, bool]]:
        """[Q S l] where a part of every text stands in the row, and whether it is its own."""
        return [_place(text[:2], n) for text in self.texts for n in range(part.start, part.stop)]

    def prompt_places(self) -> list[tuple[int, bool]]:
        """[Q P] the same of the prompts."""
        firsts = self.texts[:: len(self.texts) // self.prompts]
        return [_place(text[2:], n) for text in firsts for n in range(self.shared)]


def _place(span: tuple[int, int], n: int) -> tuple[int, bool]:
    start, end = span
    return min(start + n, end - 1), start + n < end


def _length(text: Span) -> int:
    return text.end - text.start


def _prompt_length(text: Span) -> int:
    return text.prefix_end - text.prefix_start


class Layout:
    """How the tokens of a row are read.

    Args:
        spans: the row's texts; every token is of one.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.tokens = sum(map(_length, spans))
        self.bundles = [*_bundles(spans)]
        self._orders: dict[int, _Order] = {}

    def order(self, heads: int) -> _Order:
        """Of the rows of so many key heads."""
        if heads not in self._orders:
            self._orders[heads] = _Order.of(self.bundles, self.tokens, heads)
        return self._orders[heads]


def _bundles(spans: Sequence[Span]) -> Iterator[Bundle]:
    """Texts that are alike; small ones of several prompts together."""
    by_prompt: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        by_prompt.setdefault(span[2:], []).append(span)
    by_count: dict[int, list[list[Span]]] = {}
    for texts in by_prompt.values():
        for alike in _cut(texts, _length, lambda many, most: many * most <= _TOGETHER):
            if _prompt_length(alike[0]):
                by_count.setdefault(len(alike), []).append(alike)
            else:
                yield Bundle(tuple(alike))
    for count, sets in by_count.items():
        for like in _cut(sets, lambda own: _prompt_length(own[0]), lambda many, most: True):
            shared = _prompt_length(like[0][0])

            def is_small(many: int, most: int, each: int = count, shared: int = shared) -> bool:
                return many * each * most * (shared + most) <= _SCORES

            for few in _cut(like, lambda own: _length(own[0]), is_small):
                yield Bundle(tuple(chain.from_iterable(few)), len(few))


def _cut(
    things: Iterable[T], size: Callable[[T], int], is_small: Callable[[int, int], bool]
) -> Iterator[list[T]]:
    """Things of like size, largest first, so many that they are small, or one."""
    group: list[T] = []
    for thing in sorted(things, key=size, reverse=True):
        if group:
            most = size(group[0])
            alike = size(thing) >= min(_ALIKE * most, most - _NEARLY)
            if not alike or not is_small(len(group) + 1, most):
                yield group
                group = []
        group.append(thing)
    if group:
        yield group


class _Order(NamedTuple):
    """How bundles read the [n H] rows of a batch: token by token, its key heads side by side.

    A piece is read heads first, then texts (or prompts), then tokens. Queries are read part by part
    of each bundle; keys and values bundle by bundle, those of its texts and then of its prompts.
    """

    asked: Tensor
    """[A] of the n H: queries."""
    answered: Tensor
    """[n H] of the A."""
    own: Tensor
    """[A, 1] False at what fills up."""
    seen: Tensor
    """[B] of the n H: keys and values."""
    of_parts: list[int]
    """Rows of each piece of A."""
    of_bundles: list[int]
    """Rows of each piece of B."""

    @classmethod
    def of(cls, bundles: Sequence[Bundle], tokens: int, heads: int) -> _Order:
        """Of a batch."""
        parts = [bundle.places(part) for bundle in bundles for part in bundle.parts]
        keys = [(bundle.places(bundle.whole), bundle.prompt_places()) for bundle in bundles]
        whole = [*chain.from_iterable(keys)]
        asked, seen = (_rows(pieces, heads) for pieces in (parts, whole))
        own = torch.cat([torch.tensor([own for _, own in part]).repeat(heads) for part in parts])
        answered = torch.empty(tokens * heads + 1, dtype=torch.long)
        answered.scatter_(0, asked.where(own, tokens * heads), torch.arange(len(asked)))
        sizes = ([heads * len(piece) for piece in pieces] for pieces in (parts, whole))
        return cls(asked, answered[:-1], own[:, None], seen, *sizes)


def _rows(pieces: Sequence[list[tuple[int, bool]]], heads: int) -> Tensor:
    head = torch.arange(heads)[:, None]
    tokens = (torch.tensor([token for token, _ in piece], dtype=torch.long) for piece in pieces)
    return torch.cat([(own * heads + head).flatten() for own in tokens])


class _Keys(NamedTuple):
    """Keys or values that a bundle's texts see, or the gradients of these."""

    own: Tensor
    """[H Q S, L, D]"""
    prompt: Tensor
    """[H Q, P, D]"""

    def against(self, rows: Tensor, end: int) -> Tensor:
        """[H Q S, r, P + end] products of [H Q S, r, D] with prompts' and the first own ones."""
        own = torch.bmm(rows, self.own[:, :end].transpose(1, 2))
        heads, shared, size = self.prompt.shape
        if not shared:
            return own
        before = torch.bmm(rows.view(heads, -1, size), self.prompt.transpose(1, 2))
        return torch.cat([before.view(*own.shape[:2], shared), own], -1)

    def mix(self, weights: Tensor, out: Tensor) -> None:
        """Sums over them into [H Q S, r, D], of weights as `against` gives products."""
        heads, shared, size = self.prompt.shape
        own = weights[..., shared:]
        torch.bmm(own, self.own[:, : own.shape[-1]], out=out)
        if shared:
            before = weights[..., :shared].reshape(heads, -1, shared)
            out.view(heads, -1, size).baddbmm_(before, self.prompt)

    def add(self, weights: Tensor, rows: Tensor) -> None:
        """Add to each the sum over [H Q S, r, D] that such weights give it."""
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
        self.bundles, self.order = layout.bundles, layout.order(self.heads)
        self.queries = self.rows(query).index_select(0, self.order.asked).mul_(scaling)
        self.keys, self.values = (
            self.rows(x).index_select(0, self.order.seen) for x in (key, value)
        )

    def rows(self, x: Tensor) -> Tensor:
        """[n H, ...] of [n, ...]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype).contiguous().view(len(x) * self.heads, -1)

    def by_part(self, rows: Tensor) -> Iterator[list[Tensor]]:
        """[H Q S, l G, D] of the parts of each bundle, from rows in the order of queries."""
        pieces = iter(rows.split(self.order.of_parts))
        for bundle in self.bundles:
            texts = self.heads * len(bundle.texts)
            yield [next(pieces).view(texts, -1, self.size) for _ in bundle.parts]

    def by_bundle(self, rows: Tensor) -> Iterator[_Keys]:
        """Of each bundle, from rows in the order of keys."""
        pieces = iter(rows.split(self.order.of_bundles))
        for bundle in self.bundles:
            texts, prompts = self.heads * len(bundle.texts), self.heads * bundle.prompts
            yield _Keys(
                next(pieces).view(texts, bundle.length, self.size),
                next(pieces).view(prompts, bundle.shared, self.size),
            )


def _weights(bundle: Bundle, keys: _Keys, queries: Tensor, part: slice) -> Tensor:
    """[H Q S, l G, P + e] of a part of the queries, which end at e."""
    scores, length = keys.against(queries, part.stop), part.stop - part.start
    if length > 1:
        later = torch.full((length, length), -torch.inf).triu_(1)
        scores.unflatten(1, (length, -1))[..., -length:] += later[:, None]
    if bundle.hidden is not None:
        heads = len(scores) // len(bundle.texts)
        by_prompt = scores.view(heads, bundle.prompts, -1, scores.shape[-1])
        by_prompt[..., : bundle.shared] += bundle.hidden
    return scores.softmax(-1)


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
            for bundle, seen, given, asked, sums in zip(
                laid.bundles,
                laid.by_bundle(laid.keys),
                laid.by_bundle(laid.values),
                laid.by_part(laid.queries),
                laid.by_part(found),
                strict=True,
            ):
                for part, rows, out in zip(bundle.parts, asked, sums, strict=True):
                    given.mix(_weights(bundle, seen, rows, part), out)
            return found.index_select(0, laid.order.answered).view(len(query), -1).to(query.dtype)

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
    order, given_rows = laid.order, laid.rows(by_found)
    wanted = given_rows.index_select(0, order.asked)
    wanted *= order.own  # what fills up adds nothing to its keys
    by_query = torch.empty_like(laid.queries)
    by_keys, by_values = torch.zeros_like(laid.keys), torch.zeros_like(laid.values)
    for bundle, seen, given, by_seen, by_given, asked, wants, sums in zip(
        laid.bundles,
        laid.by_bundle(laid.keys),
        laid.by_bundle(laid.values),
        laid.by_bundle(by_keys),
        laid.by_bundle(by_values),
        laid.by_part(laid.queries),
        laid.by_part(wanted),
        laid.by_part(by_query),
        strict=True,
    ):
        for part, rows, mine, out in zip(bundle.parts, asked, wants, sums, strict=True):
            weights = _weights(bundle, seen, rows, part)
            by_given.add(weights, mine)
            by_weights = given.against(mine, part.stop)
            by_scores = torch.ops.aten._softmax_backward_data(
                by_weights, weights, -1, weights.dtype
            )
            seen.mix(by_scores, out)
            by_seen.add(by_scores, rows)
    by_key, by_value = (
        x.new_zeros(len(given_rows), laid.size).index_add_(0, order.seen, x)
        for x in (by_keys, by_values)
    )
    return by_query.index_select(0, order.answered), by_key, by_value


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
