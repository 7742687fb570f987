"""Tiny random models of every supported architecture, built in process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amenable.models.tiny import VOCAB_SIZE, tiny_tokenizer

COMMON = {"vocab_size": VOCAB_SIZE, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "Llama": {**SIZES, "tie_word_embeddings": True},
    "Qwen2": {**SIZES, "tie_word_embeddings": False},
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma": {**SIZES, "head_dim": 8},
    "Gemma2": {**SIZES, "head_dim": 8},
    "Gemma3": {**SIZES, "head_dim": 8},
    "Mistral": SIZES,
    "GPTNeoX": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.1},
}
LM_CLASS = {"GPT2": "GPT2LMHeadModel"}
CONFIG_CLASS = {"Gemma3": "Gemma3TextConfig"}


def build(family: str, **changes: object) -> PreTrainedModel:
    """A seeded random model whose weights are large enough for logits to differ clearly."""
    config = getattr(transformers, CONFIG_CLASS.get(family, f"{family}Config"))(
        **{**COMMON, **FAMILIES[family], **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, LM_CLASS.get(family, f"{family}ForCausalLM"))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A whole Llama folder that a test may damage."""
    folder = tmp_path / "base"
    build("Llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
