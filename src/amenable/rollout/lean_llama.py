"""Llama's forward pass for roll-outs on a CPU: what transformers computes, in fewer products.

Queries, keys and values come out of one product, gate and up out of another, with weights laid out
once as the processor reads them. The residual stream is float32. Pairs of numbers that are turned
together by rotary positions stand side by side, in queries and keys alike, so that a turn is one
complex product; scores do not change by it. Shapes: n tokens, d hidden size, H key heads with G
query heads each, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, silu
from transformers import PreTrainedModel

from amenable.data.collate import Span, packs
from amenable.models.packed_attention import (
    Layout,
    attends_plainly,
    packed_attention,
)
from amenable.models.projection import filling
from amenable.rollout.prefix_cache import CacheShape, PrefixCache

FAMILIES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
MOST_WEIGHTS = 1_000_000_000
"""A copy of a larger model costs much memory, and gains little: its products are large enough."""

_PREFILL_ROUND, _STEP_ROUND = 128, 8  # rows

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""[n, H G D] of a layer's number, queries [n, H G, D], keys [n, H, D] and values [n, H, D]."""


def is_lean(model: PreTrainedModel) -> bool:
    """Whether `LeanLlama` computes what the model does; hooks would not be called by it."""
    return (
        type(model).__name__ in FAMILIES
        and model.device.type == "cpu"
        and model.config.hidden_act == "silu"
        and sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS
        and attends_plainly(model)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    )


class LeanLlama:
    """A copy of a model's weights, as they are now.

    Args:
        model: one that `is_lean`.
        dtype: what products run in.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        trunk = cast(Any, model).model
        config, self.dtype = model.config, dtype
        self._embeddings = cast(Tensor, trunk.embed_tokens.weight)
        self._turns = trunk.rotary_emb
        self._head = _Product([cast(nn.Linear, model.get_output_embeddings())], dtype)
        self._norm = _Norm.of(trunk.norm)
        self._layers = [_Layer(layer, dtype) for layer in trunk.layers]
        self._size = size = trunk.layers[0].self_attn.head_dim
        self.cache_shape = CacheShape(
            len(self._layers), config.num_key_value_heads, size, model.device, dtype
        )

    def prefill(
        self, prompts: Sequence[tuple[int, ...]], cache: PrefixCache, budget: int
    ) -> Tensor:
        """Read prompts into a cache; [P, V] float32 logits of their first tokens.

        Args:
            prompts: in the order of the cache.
            cache: empty.
            budget: tokens of a pass.
        """
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        for part in packs([len(prompt) for prompt in prompts], budget):
            ends = list(accumulate(len(prompts[index]) for index in part))
            spans = [Span(end - len(prompts[i]), end) for i, end in zip(part, ends, strict=True)]
            more = filling(ends[-1], _PREFILL_ROUND)
            filler = [Span(ends[-1], ends[-1] + more)] if more else []
            ids = torch.tensor(list(chain.from_iterable(prompts[index] for index in part)))
            places = torch.cat([torch.arange(span.end - span.start) for span in spans])
            attend = _reading(part, spans, Layout([*spans, *filler]), cache)
            hidden = self._hidden(pad(ids, (0, more)), pad(places, (0, more)), attend)
            for index, span in zip(part, spans, strict=True):
                found[index] = hidden[span.end - 1]
        last = torch.stack(found)
        return self._logits(pad(last, (0, 0, 0, filling(len(last), _STEP_ROUND))))[: len(last)]

    def step(self, tokens: Tensor, positions: Tensor, cache: PrefixCache) -> Tensor:
        """Read a token [B] of every sequence; [B, V] float32 logits of the next ones."""
        count, more = len(tokens), filling(len(tokens), _STEP_ROUND)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(number, key[:count], value[:count])
            found = cache.attend(query[:count], self._size**-0.5).flatten(1)
            return pad(found, (0, 0, 0, more))

        hidden = self._hidden(pad(tokens, (0, more)), pad(positions, (0, more)), attend)
        return self._logits(hidden)[:count]

    def _hidden(self, ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """[n, d] float32 before the last norm."""
        stream = self._embeddings[ids].float()
        cos, sin = self._turns(stream[:1], positions[None])
        half = self._size // 2
        turns = torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])
        with torch.autocast("cpu", enabled=False):
            for number, layer in enumerate(self._layers):
                layer.add(stream, turns, number, attend)
        return stream

    def _logits(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self._head(self._norm(hidden).to(self.dtype)).float()


def _reading(
    part: Sequence[int], spans: Sequence[Span], layout: Layout, cache: PrefixCache
) -> Attention:
    """Attention of the prompts `part` within a pass, which keeps their keys and values."""

    def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for index, span in zip(part, spans, strict=True):
            own = slice(span.start, span.end)
            cache.fill(index, number, key[own].transpose(0, 1), value[own].transpose(0, 1))
        return packed_attention(query, key, value, layout, query.shape[-1] ** -0.5)

    return attend


@dataclass(frozen=True)
class _Norm:
    """Root mean square norm over the last dimension."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any, order: Tensor | None = None) -> _Norm:
        weight = norm.weight.detach().float()
        return cls(weight if order is None else weight[order], norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Product:
    """Several linear layers of the same input as one, in a precision."""

    def __init__(
        self, parts: Sequence[nn.Linear], dtype: torch.dtype, orders: Sequence[Tensor | None] = ()
    ) -> None:
        orders = [*orders, *[None] * (len(parts) - len(orders))]
        weights = [_ordered(part.weight, order) for part, order in zip(parts, orders, strict=True)]
        weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)
        self._bias = None
        if parts[0].bias is not None:
            biases = [_ordered(part.bias, order) for part, order in zip(parts, orders, strict=True)]
            self._bias = torch.cat(biases).to(dtype)
        self._laid_out = _lays_out(dtype)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._laid_out else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self._laid_out:
            return cast(
                Tensor,
                torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], ""),
            )
        return linear(x, self._weight, self._bias)


def _lays_out(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this precision here; bfloat16 it refuses on older processors."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows.detach() if order is None else rows.detach()[order]


def _side_by_side(heads: int, size: int) -> Tensor:
    """Rows of a projection, so ordered that the two numbers of each turn are neighbours."""
    pairs = torch.arange(size).view(2, -1).T.flatten()
    return (torch.arange(heads)[:, None] * size + pairs).flatten()


class _Layer:
    """A decoder layer."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._size = size = attention.head_dim
        order = _side_by_side(1, size)
        self._queries, self._keys = (
            part.out_features // size for part in (attention.q_proj, attention.k_proj)
        )
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        orders = [_side_by_side(count, size) for count in (self._queries, self._keys)]
        self._projections = _Product(projections, dtype, orders)
        self._out = _Product([attention.o_proj], dtype)
        self._wide = _Product([mlp.gate_proj, mlp.up_proj], dtype)
        self._down = _Product([mlp.down_proj], dtype)
        self._before_attention = _Norm.of(layer.input_layernorm)
        self._before_mlp = _Norm.of(layer.post_attention_layernorm)
        self._of_heads = None
        if hasattr(attention, "q_norm"):
            self._of_heads = [_Norm.of(x, order) for x in (attention.q_norm, attention.k_norm)]
        self._dtype = dtype

    def add(self, stream: Tensor, turns: Tensor, number: int, attend: Attention) -> None:
        """Add attention and feed-forward part to the residual stream [n, d]."""
        dtype, size = self._dtype, self._size
        made = self._projections(self._before_attention(stream).to(dtype))
        turned, value = made.split([(self._queries + self._keys) * size, self._keys * size], -1)
        pairs = turned.float().view(len(made), -1, size)
        if self._of_heads is not None:
            parts = pairs.split([self._queries, self._keys], 1)
            normed = [norm(part) for norm, part in zip(self._of_heads, parts, strict=True)]
            pairs = torch.cat(normed, 1)
        complex_pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
        heads = torch.view_as_real(complex_pairs * turns).flatten(-2)
        query, key = heads.split([self._queries, self._keys], 1)
        found = attend(number, query, key, value.view(len(made), self._keys, size))
        stream += self._out(found.to(dtype))
        gate, up = self._wide(self._before_mlp(stream).to(dtype)).chunk(2, -1)
        stream += self._down(silu(gate).mul_(up))
