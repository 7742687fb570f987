"""Whether the roll-out copy holds the policy's weights, by a formula of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from amenable.models.roles import Role
from amenable.ranks.sharding import whole


def merged_faults(role: Role, copy: PreTrainedModel) -> list[str]:
    """Modules of the copy that are not W + (alpha / rank) · B A, but for rounding to their dtype.

    A role without an adapter on a shared base has W alone; a role that owns its model, or whose
    recipe wants no copy, rolls out with that very model.
    """
    if role.sharded:
        return _gathered_faults(role, copy)
    if not isinstance(role.model, PeftModel):
        return [] if role.model is copy else ["the whole model"]
    if copy is role.plain:  # nothing is merged
        return []
    copied = dict(copy.named_modules())
    faults = []
    for name, module in role.plain.named_modules():
        if isinstance(module, LoraLayer):
            found = cast(Tensor, cast(Any, copied[name]).weight)
            wanted = _merged(module, role.adapter, role.model)
            rounding = 2 * torch.finfo(found.dtype).eps * _largest(wanted)
            if not _largest(wanted - found.to(wanted.dtype)) <= rounding:
                faults.append(name)
    return faults


def _gathered_faults(role: Role, copy: PreTrainedModel) -> list[str]:
    copied = dict(copy.named_parameters())
    return [
        name
        for name, parameter in role.plain.named_parameters()
        if not torch.equal(whole(parameter.detach()).to(copied[name].dtype), copied[name])
    ]


def _merged(layer: LoraLayer, adapter: str | None, model: PeftModel) -> Tensor:
    base = _wide(cast(Tensor, layer.get_base_layer().weight))
    if adapter is None or adapter not in layer.lora_A:
        return base
    config = cast(Any, model.peft_config[adapter])
    a, b = (_wide(cast(Any, part[adapter]).weight) for part in (layer.lora_A, layer.lora_B))
    if cast(Any, layer).fan_in_fan_out:  # GPT-2 stores its weights transposed
        a, b = b.T, a.T
    return torch.addmm(base, b, a, alpha=config.lora_alpha / config.r)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _largest(values: Tensor) -> float:
    """The largest magnitude; NaN if one is."""
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))
