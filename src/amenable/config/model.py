"""Which base model, in which precision, trained through adapters or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on every linear layer of the trunk."""

    enabled: bool = True
    """Train adapters on one frozen base; false trains every weight (full fine-tuning)."""

    rank: int = 16
    """Rank of each adapter."""

    alpha: float = 32.0
    """Scale: the adapter's output is multiplied by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model that every stage starts from."""

    base: str = "smollm2-135m"
    """A built-in name (`amenable models list`), a local Hugging Face folder, or a hub id."""

    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Compute precision; `auto` takes bf16 where the hardware multiplies it faster. `fp64` is for
    exact comparisons (docs/several-processes.md): weights and adapters are float64 as well."""

    shard: Literal["none", "fsdp2"] = "none"
    """How several processes hold weights that are trained whole: `none`, a copy each; `fsdp2`, a
    part each, with its optimizer state (docs/several-processes.md). Only without LoRA."""

    quantise: Literal["none", "int8", "nf4"] = "none"
    """Keep the linear layers of the frozen base in 8 or 4 bits a weight (QLoRA, Dettmers et al.
    2023, arXiv:2305.14314). Only with LoRA; needs `pip install "amenable[quantised]"`."""

    chat_template: bool = True
    """Render prompts with the tokenizer's chat template where it has one; false: plain text."""

    lora: LoraConfig = LoraConfig()
    """Adapters or full fine-tuning."""
