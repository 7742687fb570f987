"""The reward model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Bradley-Terry training of a scalar head on the trunk."""

    enabled: bool = True
    """Run the stage; it is skipped when `policy.reward` names a ready reward."""

    epochs: float = 1.0
    """Passes over the preference pairs."""

    max_steps: int = 0
    """Stop after this many optimizer steps; 0: as many as `epochs` asks."""

    batch_size: int = 16
    """Pairs per optimizer step."""

    learning_rate: float = 3e-4
    """Peak rate of AdamW; falls linearly to 0 after the warm-up."""

    warmup_fraction: float = 0.05
    """Share of the steps in which the rate rises from 0."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""

    micro_batch_tokens: int = 2048
    """Tokens in one forward pass; gradients are accumulated to `batch_size`."""

    evaluations: int = 3
    """How often validation pairs are scored; the best checkpoint is kept."""
