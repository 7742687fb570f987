"""A base model's shape: exact parameter counts by part, from its configuration alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from amenable.errors import ModelError
from amenable.models.pull import BUILT_IN, is_pulled, model_path
from amenable.models.tiny import VOCAB_SIZE

_LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "llama-2-7b": {
        **_LLAMA_2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "dtype": "float16",
    },
    "llama-2-13b": {
        **_LLAMA_2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "dtype": "float16",
    },
    "llama-2-70b": {
        **_LLAMA_2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "dtype": "float16",
    },
}
"""Configurations of models that can be planned for without having them.

Source of Llama 2: Touvron et al. 2023, arXiv:2307.09288, table 1 and its published config.json.
"""

QUANTISED = {"int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}
"""Bytes of a quantised weight: nf4's with its share of the scales, int8's without (0.1 %)."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """How many weights a model has, and where; no weight exists."""

    name: str

    config: PreTrainedConfig = field(repr=False, compare=False)

    parameters: int
    """All of them; tied weights count once."""

    embedding: int
    """Weights that are looked up: token embeddings, and learnt positions where there are any."""

    head: int
    """Weights of the output projection, also where they are the embedding's."""

    tied: bool
    """The output projection is the token embedding."""

    linear: int
    """Weights that every token is multiplied by: the linear layers of the trunk."""

    largest: int
    """Weights of the largest of those layers."""

    adapted: int
    """Sum of inputs and outputs of those layers: weights of an adapter of rank 1."""

    layers: int
    hidden: int
    vocabulary: int

    query_width: int
    """Attention heads × their size."""

    kv_width: int
    """Key-value heads × their size."""

    @property
    def trunk(self) -> int:
        """Weights without the output projection: a reward model's, its own head apart."""
        return self.parameters if self.tied else self.parameters - self.head

    @property
    def file_dtype(self) -> torch.dtype | None:
        """Precision of the weights on disk, where the configuration says it."""
        named = getattr(self.config, "dtype", None)
        return getattr(torch, named) if isinstance(named, str) else named

    def adapter(self, rank: int) -> int:
        """Weights of one LoRA adapter on every linear layer of the trunk."""
        return rank * self.adapted

    def frozen(self, itemsize: int, quantise: str) -> float:
        """Bytes of the weights of a frozen base.

        Args:
            itemsize: bytes of a weight that is not quantised.
            quantise: as of the recipe.
        """
        linear = QUANTISED.get(quantise, itemsize)
        return (self.parameters - self.linear) * itemsize + self.linear * linear

    def kv_numbers(self) -> int:
        """Numbers that the key-value cache holds for a token."""
        return 2 * self.layers * self.kv_width

    def forward_flops(self, context: float, predicted: float = 0.0) -> float:
        """Of one token, two for each multiply-add.

        Args:
            context: tokens that it attends to, on average.
            predicted: share of the tokens that go through the output projection.
        """
        attention = 4 * self.layers * self.query_width * context
        return 2 * self.linear + attention + 2 * predicted * self.vocabulary * self.hidden


def config_of(base: str) -> PreTrainedConfig:
    """The configuration that `model.base` means, without fetching a model.

    A folder's or a pulled built-in model's is read; a name in `SHAPES`, also behind an owner and
    before `-hf` or `-chat-hf`, is known here; the rest is asked of the hub and its cache.

    Raises:
        ModelError: none of these has it.
    """
    folder = model_path(base) if base in BUILT_IN and is_pulled(base) else Path(base).expanduser()
    known = base.rpartition("/")[2].lower().removesuffix("-hf").removesuffix("-chat")
    if not folder.is_dir() and known in SHAPES:
        facts = dict(SHAPES[known])
        kind = str(facts.pop("model_type"))
        return AutoConfig.for_model(kind, **facts)
    source = str(folder) if folder.is_dir() else base
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=folder.is_dir()
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base}: no model configuration is at hand; give model.base as a folder, a hub id "
            f"that can be reached, or one of {', '.join(SHAPES)}"
        ) from error
    return config


def shape_of(config: PreTrainedConfig, name: str = "model") -> ModelShape:
    """Counts the parameters of a model built on torch's meta device.

    Raises:
        ModelError: transformers cannot build a causal language model of it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"{name}: transformers builds no causal language model of its configuration "
            f"({str(error).splitlines()[0]}); take a base model of another architecture"
        ) from error
    return _counted(model, config.get_text_config(), name)


def _counted(model: PreTrainedModel, text: PreTrainedConfig, name: str) -> ModelShape:
    head = cast("nn.Module", model.get_output_embeddings())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    looked_up = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    weight = cast("nn.Parameter", head.weight)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelShape(
        name=name,
        config=model.config,
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=sum(w.numel() for w in looked_up),
        head=weight.numel(),
        tied=any(w is weight for w in looked_up),
        linear=sum(m.weight.numel() for m in linear),
        largest=max(m.weight.numel() for m in linear),
        adapted=sum(sum(m.weight.shape) for m in linear),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        query_width=heads * size,
        kv_width=kv_heads * size,
    )
