"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Next-token cross entropy on the completion tokens of demonstrations."""

    enabled: bool = True
    """Run the stage; it is skipped as well when there are no demonstrations."""

    epochs: float = 1.0
    """Passes over the demonstrations."""

    max_steps: int = 0
    """Stop after this many optimizer steps; 0: as many as `epochs` asks."""

    batch_size: int = 16
    """Demonstrations per optimizer step."""

    learning_rate: float = 3e-4
    """Peak rate of AdamW; falls linearly to 0 after the warm-up."""

    warmup_fraction: float = 0.05
    """Share of the steps in which the rate rises from 0."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""

    micro_batch_tokens: int = 0
    """Tokens in one forward pass, gathered to `batch_size`; 0: 2048, or 1024 without LoRA."""

    evaluations: int = 3
    """How often the validation loss is measured; the best checkpoint is kept."""
