from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from amenable.config.model import LoraConfig
from amenable.models.adapters import (
    adapter_parameters,
    adapter_state,
    add_adapter,
    copy_adapter,
    load_adapter_state,
    merged_weights,
)
from amenable.models.export import save_adapter

from .conftest import build

LORA = LoraConfig(rank=4, alpha=12.0)
IDS = torch.tensor([[5, 9, 300, 41, 17, 2]])
LLAMA_LAYERS = 2 * 7  # q k v o gate up down, in two layers


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stir(model: PeftModel, name: str, seed: int = 1) -> None:
    """Random weights in the place of an adapter's zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_fresh_adapters_change_nothing(family: str) -> None:
    before = logits(build(family))
    model = add_adapter(build(family), "policy", LORA, seed=0)
    model = add_adapter(model, "critic", LORA, seed=0)
    for name in ("policy", "critic"):
        model.set_adapter(name)
        assert torch.equal(logits(model), before)
    stir(model, "critic")
    assert (logits(model) - before).abs().max() > 0.01, "the adapter must be connected"


def test_every_linear_layer_of_the_trunk_gets_one() -> None:
    model = add_adapter(build("Llama"), "policy", LORA, seed=0)
    model = add_adapter(model, "critic", LORA, seed=0)
    for name in ("policy", "critic"):
        shapes = [tuple(p.shape) for p in adapter_parameters(model, name)]
        assert len(shapes) == 2 * LLAMA_LAYERS
        assert all(4 in shape for shape in shapes)
    assert not any("lm_head" in key for key in adapter_state(model, "policy"))


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    def fresh(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return adapter_state(add_adapter(build("Llama"), "policy", LORA, seed=seed), "policy")

    first, again, other = fresh(3), fresh(3), fresh(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_global_random_state_is_left_alone() -> None:
    model = build("Llama")
    before = torch.get_rng_state()
    add_adapter(model, "policy", LORA, seed=9)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_adding_an_adapter_says_nothing(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = add_adapter(build(family), "policy", LORA, seed=0)
        add_adapter(model, "critic", LORA, seed=0)


def test_adapter_weights_are_float32_on_a_half_precision_base() -> None:
    model = add_adapter(build("Llama").bfloat16(), "policy", LORA, seed=0)
    assert {p.dtype for p in adapter_parameters(model, "policy")} == {torch.float32}
    base = [p for key, p in model.named_parameters() if ".lora_" not in key]
    assert {p.dtype for p in base} == {torch.bfloat16}


def test_state_fits_another_role_and_is_a_copy() -> None:
    model = add_adapter(build("Llama"), "policy", LORA, seed=0)
    model = add_adapter(model, "critic", LORA, seed=5)
    stir(model, "policy")
    saved = adapter_state(model, "policy")
    model.set_adapter("policy")
    wanted = logits(model)
    stir(model, "policy", seed=2)
    assert not torch.equal(logits(model), wanted)
    load_adapter_state(model, "critic", saved)
    model.set_adapter("critic")
    assert torch.equal(logits(model), wanted)


def test_copy_adapter_copies_one_way() -> None:
    model = add_adapter(build("Llama"), "policy", LORA, seed=0)
    model = add_adapter(model, "reference", LORA, seed=5)
    stir(model, "policy")
    before = adapter_state(model, "policy")
    copy_adapter(model, "policy", "reference")
    copied, source = adapter_state(model, "reference"), adapter_state(model, "policy")
    assert all(torch.equal(copied[key], before[key]) for key in before)
    assert all(torch.equal(source[key], before[key]) for key in before)


def test_adapters_from_a_folder_are_what_was_saved(tmp_path: Path) -> None:
    """As the first adapter of a plain model, and as the second of a wrapped one."""
    model = add_adapter(build("Llama"), "policy", LORA, seed=0)
    stir(model, "policy")
    wanted = logits(model)
    save_adapter(model, "policy", tmp_path)
    first = add_adapter(build("Llama"), "reference", LORA, seed=7, folder=tmp_path)
    both = add_adapter(first, "second", LORA, seed=7, folder=tmp_path)
    for name in ("reference", "second"):
        both.set_adapter(name)
        torch.testing.assert_close(logits(both), wanted)
    assert [p.requires_grad for p in adapter_parameters(both, "second")] == [True] * 28


def test_saved_configuration_is_the_same_in_every_process(tmp_path: Path) -> None:
    """A set of module names has no order of its own: it must be written sorted."""
    save_adapter(add_adapter(build("Llama"), "policy", LORA, seed=0), "policy", tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == LLAMA_LAYERS
    assert names == sorted(names)


def test_merged_weights_are_the_base_plus_scaled_product() -> None:
    """W + alpha / rank · B A, with alpha 12 and rank 4: three times the product."""
    model = add_adapter(build("Llama"), "policy", LORA, seed=0)
    stir(model, "policy")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merged = dict(merged_weights(model, "policy"))
    assert len(merged) == LLAMA_LAYERS
    for name, weight in merged.items():
        key = f"base_model.model.{name}"
        a, b = (before[f"{key}.lora_{side}.policy.weight"] for side in "AB")
        torch.testing.assert_close(weight, before[f"{key}.base_layer.weight"] + 3.0 * b @ a)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_half_precision_merges_are_rounded_once() -> None:
    model = add_adapter(build("Llama").bfloat16(), "policy", LORA, seed=0)
    stir(model, "policy")
    state = model.state_dict()
    name, weight = next(iter(merged_weights(model, "policy")))
    key = f"base_model.model.{name}"
    a, b = (state[f"{key}.lora_{side}.policy.weight"] for side in "AB")
    exact = state[f"{key}.base_layer.weight"].float() + 3.0 * b @ a
    assert weight.dtype is torch.bfloat16
    assert torch.equal(weight, exact.bfloat16())
