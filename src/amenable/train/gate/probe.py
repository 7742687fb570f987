"""A small change of the policy while the gate looks, taken back to the last bit.

At step 0 a fresh adapter is zero and the policy is the reference, so that a roll-out copy which
is never refreshed, or a reference that moves with the policy, would look right. The gate shifts
the policy a little, looks whether the right models follow, and puts the weights back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from amenable.models.roles import Role
from amenable.ranks.sharding import laid_out_as
from amenable.rollout.transformers_engine import RolloutCopy

_SEED = 20240611
_SHARE = 0.01  # standard deviation of the change; of a trained matrix, in units of its own size


def probed_parameters(role: Role, *, every: bool = False) -> list[nn.Parameter]:
    """What is shifted: every B of the role's adapter, or the norm weights and biases.

    Args:
        role: the policy.
        every: without an adapter all of its weights, where a copy may have missed some.
    """
    if isinstance(role.model, PeftModel):
        mark = f"lora_B.{role.adapter}."
        return [p for name, p in role.model.named_parameters() if mark in name]
    return [p for p in role.model.parameters() if every or p.dim() == 1]


@contextmanager
def probed(role: Role, copy: RolloutCopy, *, every: bool = False) -> Iterator[None]:
    """The policy with a seeded small change, and its roll-out copy refreshed with it.

    Args:
        role: the policy.
        copy: of it.
        every: as in `probed_parameters`.
    """
    parameters = probed_parameters(role, every=every)
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(_SEED)
    try:
        with torch.no_grad():
            for parameter in parameters:
                change = torch.randn(parameter.shape, generator=generator) * _SHARE
                if parameter.dim() > 1 and not isinstance(role.model, PeftModel):
                    change *= float(parameter.square().mean().sqrt())
                parameter.add_(
                    laid_out_as(change.to(parameter.dtype), parameter).to(parameter.device)
                )
        copy.sync()
        yield
    finally:
        with torch.no_grad():
            for parameter, saved in zip(parameters, before, strict=True):
                parameter.copy_(saved)
        copy.sync()


@contextmanager
def left_as_found(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gradients, flags of what is trained, and random states are the same afterwards."""
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for parameter, gradient, flag in zip(parameters, gradients, flags, strict=True):
            parameter.grad = gradient
            parameter.requires_grad_(flag)
