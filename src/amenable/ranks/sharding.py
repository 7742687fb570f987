"""Weights that each rank holds a part of: FSDP2, `torch.distributed.fsdp.fully_shard`.

A layer's weights are gathered when it is entered and let go when it is left, forwards and
backwards; its gradient is summed over the ranks and each keeps its own part. Embeddings, the last
norm and the output head are gathered around a whole pass. So every rank must make as many passes,
in the same order, and what reads weights by itself must do so inside a pass (`passing`).

Source: Zhao et al. 2023, arXiv:2304.11277; the per-parameter form of PyTorch's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, TypeVar, cast

from torch import Tensor, nn

T = TypeVar("T")


def shard(model: nn.Module) -> None:
    """Spread a model's weights over the ranks, layer by layer, in place; gradients are sums.

    Args:
        model: whole, the same on every rank; its decoder layers are the modules of its longest
            `nn.ModuleList`.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=len):
        fully_shard(layer, reshard_after_forward=True)
    # Not the default at the root: weights that stayed gathered would outlive a change of them.
    fully_shard(model, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    cast(Any, model).passing = MethodType(_passing, model)
    register_fsdp_forward_method(model, "passing")


def _passing(model: nn.Module, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(model, *args, **kwargs)


def passing(model: nn.Module, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`function(model, *args, **kwargs)`, a forward pass; a sharded model's root is whole in it."""
    if not is_sharded_model(model):
        return function(model, *args, **kwargs)
    return cast(T, cast(Any, model).passing(function, *args, **kwargs))


def is_sharded_model(model: nn.Module) -> bool:
    """Whether `shard` has been over it."""
    return hasattr(model, "passing")


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece, on every rank; called by all where it is sharded."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it, no copy."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, in the layout of another; a sharded one as it is."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    layout = cast(Any, like)
    return distribute_tensor(
        tensor.to(like.device), layout.device_mesh, layout.placements, src_data_rank=None
    )


def whole_ones(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Named tensors in one piece, one gathered after the other; called by all ranks.

    Args:
        tensors: by name; one that comes under two names is gathered once.
        keep: this rank wants them; else it takes part and gets nothing.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors:
        if is_sharded(tensor):
            key = own_part(tensor).data_ptr() if own_part(tensor).numel() else id(tensor)
            if key not in seen:
                one = whole(tensor.detach())
                seen[key] = one.cpu() if keep else tensor  # a card may not hold all of them
            tensor = seen[key]
        if keep:
            found[name] = tensor
    return found
