from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from amenable.config.model import LoraConfig
from amenable.errors import ModelError
from amenable.models.adapters import adapter_parameters, add_adapter
from amenable.models.pull import BUILT_IN
from amenable.models.tiny import build_tiny
from amenable.plan.shape import ModelShape, config_of, shape_of

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(**GPT2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_model_that_is_built(family: str) -> None:
    config = FAMILIES[family]
    shape = shape_of(config)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shape.tied == tied
    kept = (
        [p for p in model.base_model.parameters() if p is not model.lm_head.weight]
        if (not tied and hasattr(model, "lm_head"))
        else list(model.base_model.parameters())
    )
    assert shape.trunk == sum(p.numel() for p in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_has_the_weights_that_peft_gives_it(family: str) -> None:
    config = FAMILIES[family]
    model = add_adapter(
        AutoModelForCausalLM.from_config(config), "policy", LoraConfig(rank=3), seed=0
    )
    expected = sum(p.numel() for p in adapter_parameters(model, "policy"))
    assert shape_of(config).adapter(3) == expected > 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192),
    ],
)
def test_llama_2_has_the_published_number_of_weights(name: str, parameters: int) -> None:
    assert shape_of(config_of(name), name).parameters == parameters


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_are_known_before_they_are_pulled(name: str) -> None:
    assert shape_of(config_of(name), name).parameters == BUILT_IN[name].parameters


def test_folder_is_read(tmp_path: Path, tiny_shape: ModelShape) -> None:
    folder = build_tiny(tmp_path / "base")
    assert shape_of(config_of(str(folder)), "tiny") == tiny_shape


def test_unknown_base_names_what_is_known() -> None:
    with pytest.raises(ModelError, match=r"nobody/nothing: no model configuration .*llama-2-7b"):
        config_of("nobody/nothing")


def test_llama_widths_and_cache_by_hand() -> None:
    """Llama-2-70B: 64 heads of 128, of which 8 have keys and values; 80 layers."""
    shape = shape_of(config_of("llama-2-70b"))
    assert (shape.query_width, shape.kv_width) == (8192, 1024)
    assert shape.kv_numbers() == 2 * 80 * 1024
    assert shape.file_dtype is torch.float16


def test_flops_of_a_token_by_hand(tiny_shape: ModelShape) -> None:
    """Two layers of 64 x (64 + 32 + 32 + 64 + 3 x 128) weights; attention to 10 tokens: 4 x 64 x 10
    a layer; half of the tokens through a projection of 512 x 64."""
    linear = 2 * 64 * (64 + 32 + 32 + 64 + 3 * 128)
    assert tiny_shape.linear == linear
    expected = 2 * linear + 2 * 4 * 64 * 10 + 0.5 * 2 * 512 * 64
    assert tiny_shape.forward_flops(10, 0.5) == expected


def test_configuration_that_is_no_language_model_is_refused() -> None:
    class Odd(PreTrainedConfig):
        model_type = "odd"

    with pytest.raises(ModelError, match="odd one: transformers builds no causal language model"):
        shape_of(Odd(), "odd one")
