"""A linear layer with a low-rank adapter, as one node of the graph.

y = x Wᵀ + b + s (x Aᵀ) Bᵀ. The adapter's part is added by the matrix product itself, forward and
backward, where peft's layer writes it out, scales it and adds it: five passes over the activations
in place of none. For the backward pass the base's weights are not kept but read again: those of a
quantised layer are written out whenever they are read. Shapes: T tokens, r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from amenable.models.projection import precision
from amenable.models.quantised import QuantisedLinear

_PLAIN = (nn.Linear, QuantisedLinear)


def fuse(model: nn.Module) -> None:
    """Let every adapted linear layer of the model compute in this way."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.get_base_layer()) in _PLAIN:
            module.__class__ = LoraLinear


class LoraLinear(PeftLinear):
    """peft's layer; whatever is not one plain adapter is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, out] from [..., in]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(names) == 1 and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain or names[0] in self.lora_variant or self._drops(names[0]):
            return super().forward(x, *args, **kwargs)
        base, name = cast(nn.Linear, self.get_base_layer()), names[0]
        down, up = (cast(nn.Linear, part[name]).weight for part in (self.lora_A, self.lora_B))
        found = cast(Any, _Product).apply(x, base, down, up, self.scaling[name])
        return cast(Tensor, found)

    def _drops(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        weight = base.weight
        dtype = precision(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            low = rows @ down.to(dtype).T
            found = rows @ weight.to(dtype).T
            if base.bias is not None:
                found += base.bias
            found.addmm_(low, up.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, low, down, up)
        ctx.base, ctx.scaling, ctx.dtype, ctx.shape = base, scaling, x.dtype, x.shape
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, down, up = ctx.saved_tensors
        dtype, (for_x, _, for_down, for_up, _) = rows.dtype, ctx.needs_input_grad
        with torch.autocast(rows.device.type, enabled=False):
            grad = grads[0].reshape(-1, grads[0].shape[-1]).to(dtype)
            back = grad @ up.to(dtype)
            x_grad = down_grad = up_grad = None
            if for_x:
                wide = grad @ ctx.base.weight.to(dtype)
                wide.addmm_(back, down.to(dtype), alpha=ctx.scaling)
                x_grad = wide.view(ctx.shape).to(ctx.dtype)
            if for_down:
                down_grad = (back.T @ rows).to(down.dtype) * ctx.scaling
            if for_up:
                up_grad = (grad.T @ low).to(up.dtype) * ctx.scaling
        return x_grad, None, down_grad, up_grad, None
