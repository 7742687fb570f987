"""LoRA adapters: several named ones on one frozen base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from amenable.config.model import LoraConfig
from amenable.models.lora_linear import fuse


def _peft_config(config: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # typed int, used as a number
        lora_dropout=0.0,
        target_modules="all-linear",
        bias="none",
    )


@contextmanager
def _peft_noise_off() -> Iterator[None]:
    """Hide two warnings that ask nothing of the user, and no others."""
    with warnings.catch_warnings():
        # peft reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # GPT-2 stores its weights transposed; peft notices and says that it does
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def add_adapter(
    model: PreTrainedModel | PeftModel,
    name: str,
    config: LoraConfig,
    *,
    seed: int,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Put one more named adapter on the frozen base; read from `folder`, else a fresh one.

    A fresh adapter changes nothing: its B is zero, its A is drawn with `seed`.
    Adapter weights are float32 whatever the base's precision, unless `dtype` is wider.

    Args:
        model: the base model, or the result of an earlier call.
        name: role that will use it.
        config: rank and scale of a fresh adapter.
        seed: of the fresh weights.
        folder: a peft adapter folder to start from.
        dtype: of the adapter's weights.
    """
    with torch.random.fork_rng(devices=[]), _peft_noise_off():
        torch.manual_seed(seed)
        if folder is not None and isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=True)
        elif folder is not None:
            model = PeftModel.from_pretrained(
                cast(nn.Module, model), str(folder), adapter_name=name, is_trainable=True
            )
        elif isinstance(model, PeftModel):
            model.add_adapter(name, _peft_config(config))
        else:
            model = PeftModel(model, _peft_config(config), adapter_name=name)
    for parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.to(dtype)
    fuse(model)
    return model


def adapter_parameters(model: PeftModel, name: str) -> list[nn.Parameter]:
    """The adapter's own parameters, in a fixed order."""
    return [p for key, p in model.named_parameters() if f".{name}." in key]


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Overwrite one adapter's weights with another's."""
    with torch.no_grad():
        for a, b in zip(
            adapter_parameters(model, source), adapter_parameters(model, target), strict=True
        ):
            b.copy_(a)


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """A detached copy of the adapter's weights, by position-independent names."""
    return {
        key.replace(f".{name}.", "."): parameter.detach().clone()
        for key, parameter in model.named_parameters()
        if f".{name}." in key
    }


def load_adapter_state(model: PeftModel, name: str, state: dict[str, Tensor]) -> None:
    """Undo `adapter_state`: write the weights back into the named adapter."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(state[key.replace(f".{name}.", ".")])


def merged_weights(
    model: PeftModel, name: str, weights: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(module name, W + scale · B A) of every adapted layer; the live base is not touched.

    The sum is made in float32 or wider and cast to W's dtype. Module names are those of the plain
    base model.

    Args:
        model: base and adapters.
        name: of the adapter.
        weights: the W by name of their parameter; None: those of the live base.
    """
    base = model.get_base_model()
    for key, module in base.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            own = module.get_base_layer().weight if weights is None else weights[f"{key}.weight"]
            weight = cast(Tensor, own)
            delta = cast(Any, module).get_delta_weight(name).to(weight.device)
            wide = torch.promote_types(delta.dtype, torch.float32)
            yield key, (weight.to(wide) + delta.to(wide)).to(weight.dtype)
