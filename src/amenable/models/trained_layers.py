"""Layers of a fully fine-tuned model that add their weights' gradients where these are kept.

Autograd forms the gradient of each weight anew in every micro-batch and adds it to the sum
afterwards. For a vocabulary of 49,152 rows which embeds and projects, these are two matrices of
113 MB a micro-batch, filled, added and freed, most of it zeros. Here a backward pass adds to
`weight.grad` itself, with the same products. Shapes: T tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def fuse_trained(model: nn.Module) -> None:
    """Let every plain linear layer and embedding of a model on a CPU compute in this way.

    Not where several processes train together: they wait for the gradients that autograd gives.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = TrainedLinear
        elif type(module) is nn.Embedding and module.weight.device.type == "cpu":
            plain = module.max_norm is None and not module.scale_grad_by_freq
            module.__class__ = TrainedEmbedding if plain else nn.Embedding


def precision(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a product runs in: autocast's precision where it is on, else the weight's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def adds_in_place(layer: nn.Module) -> bool:
    """Whether a backward pass through the layer's weight may add to its gradient directly."""
    own = isinstance(layer, TrainedLinear | TrainedEmbedding)
    return own and torch.is_grad_enabled() and cast(Tensor, layer.weight).requires_grad


def gradient_of(weight: Tensor) -> Tensor:
    """The gradient that is kept; zeros where there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the total, in place; the factors may have less precision."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class TrainedLinear(nn.Linear):
    """y = x Wᵀ + b."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, out] from [..., in]."""
        if not adds_in_place(self):
            return super().forward(x)
        dtype = precision(x, self.weight)
        return cast(Tensor, cast(Any, _Product).apply(x, self.weight, self.bias, dtype))


class TrainedEmbedding(nn.Embedding):
    """Rows of a table."""

    def forward(self, ids: Tensor) -> Tensor:
        """[…, d] from […] ids."""
        if not adds_in_place(self):
            return super().forward(ids)
        return cast(Tensor, cast(Any, _Lookup).apply(ids, self.weight, self.padding_idx))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        given, ctx.dtype, ctx.biased = x.dtype, x.dtype, bias is not None
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            found = linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        ctx.save_for_backward(x, weight)
        ctx.dtype = given
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        x_grad = None
        with torch.autocast(x.device.type, enabled=False):
            grad = grads[0].reshape(-1, grads[0].shape[-1]).to(x.dtype)
            if ctx.needs_input_grad[0]:
                x_grad = (grad @ weight.to(x.dtype)).view(x.shape).to(ctx.dtype)
            add_product(gradient_of(weight), grad.T, x.reshape(-1, x.shape[-1]))
            bias_grad = grad.sum(0).to(weight.dtype) if ctx.biased else None
        return x_grad, None, bias_grad, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding_id = padding_id
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ids, weight = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        ids, grad = ids.flatten(), grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.padding_id is not None:  # as the plain layer: its row has no gradient
            real = ids != ctx.padding_id
            ids, grad = ids[real], grad[real]
        gradient_of(weight).index_add_(0, ids, grad.to(weight.dtype))
        return None, None, None
