"""Norms and feed-forward layers of Llama-like models in fewer passes over less kept memory.

    rms_norm(x) = w x / sqrt(mean x² + eps)        swiglu(g, u) = g sigmoid(g) u

Each is one node of the graph that keeps its inputs and makes the rest again. They serve packed rows
alone (`packed_attention`): whatever else passes through the model gets transformers' own code, so
that the two can be held against each other. Shapes: n tokens, d hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amenable.models.packed_attention import reads_packed_row
from amenable.models.projection import precision

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Of transformers' classes; their norms and feed-forward layers are the same."""


def shorten(model: PreTrainedModel) -> None:
    """Let the layers of a Llama-like model compute in this way; others are left as they are."""
    if getattr(model.config.get_text_config(), "hidden_act", None) != "silu":
        return
    for module in model.modules():
        name = type(module).__name__
        if name in {f"{family}DecoderLayer" for family in FAMILIES}:
            for norm in (module.input_layernorm, module.post_attention_layernorm):
                _replace(norm, _Norm)
            _replace(module.mlp, _FeedForward)


def _replace(module: Any, short: type) -> None:
    """Give a module the short forward; its own stays behind it."""
    own = type(module)
    if not issubclass(own, short):
        module.__class__ = type(f"Packed{own.__name__}", (short, own), {})


class _Norm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if not reads_packed_row():
            return cast(Tensor, super().forward(x))
        return rms_norm(x, self.weight, self.variance_epsilon)


class _FeedForward(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not reads_packed_row():
            return cast(Tensor, super().forward(x))
        return cast(Tensor, self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., d] in the precision that products run in; computed in float32 or wider.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.
    """
    found = cast(Any, _RMSNorm).apply(x, weight, eps, precision(x, weight))
    return cast(Tensor, found)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate sigmoid(gate) up, [...] each."""
    return cast(Tensor, cast(Any, _SwiGLU).apply(gate, up))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        found: Tensor = (wide * scale).mul_(_wide(weight))
        return found.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = cast(tuple[Tensor, Tensor, Tensor], ctx.saved_tensors)
        grad, normal = _wide(grads[0]), _wide(x) * scale
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        leaning = grad * _wide(weight)
        with torch.autocast(x.device.type, enabled=False):
            mean = torch.linalg.vecdot(leaning, normal)[..., None] / x.shape[-1]
        by_x = leaning.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)
        return by_x, by_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        by_up = nn.functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), by_up
