from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from amenable.config.model import LoraConfig
from amenable.models.adapters import add_adapter
from amenable.plan.trace import trunk_activations

FULL, LORA = LoraConfig(enabled=False), LoraConfig(rank=4)
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gemma2": Gemma2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=4, n_head=4, n_positions=64),
}


def held_bytes(config: Any, rows: int, width: int, lora: LoraConfig) -> int:
    """What autograd really keeps of a forward pass, weights left out."""
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    if lora.enabled:
        model = add_adapter(model.requires_grad_(False), "policy", lora, seed=0).get_base_model()
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.base_model(
            inputs_embeds=torch.zeros(rows, width, 64),
            attention_mask=torch.ones(
                rows,
                1,
                width,
                width,
                dtype=torch.float32 if config._attn_implementation == "eager" else torch.bool,
            ),
            use_cache=False,
        ).last_hidden_state
        total = states.sum()
    del total
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_traced_bytes_are_what_autograd_keeps_and_a_little_for_the_way_back(
    family: str, lora: LoraConfig
) -> None:
    config = CONFIGS[family]
    kept = held_bytes(config, 6, 40, lora)
    traced = trunk_activations(config, 6, 40, torch.float32, lora, packed=False).training
    assert kept < traced < 1.35 * kept


def test_activations_grow_with_rows_and_forward_needs_few_of_them() -> None:
    config = CONFIGS["llama"]
    one, two = (trunk_activations(config, n, 32, torch.float32, LORA, packed=True) for n in (8, 16))
    assert two.training == pytest.approx(2 * one.training, rel=0.02)
    assert one.forward < 0.5 * one.training


def test_half_precision_keeps_less() -> None:
    config = CONFIGS["llama"]
    full, half = (
        trunk_activations(config, 16, 32, dtype, LORA, packed=True).training
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0.4 * full < half < 0.9 * full
