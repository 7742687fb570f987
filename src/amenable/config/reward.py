"""The reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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

    micro_batch_tokens: int = 0
    """Tokens in one forward pass, gathered to `batch_size`; 0: 2048, or 1024 without LoRA."""

    evaluations: int = 3
    """How often validation pairs are scored; the best checkpoint is kept."""

    label_smoothing: float = 0.0
    """Share of the choices taken to be wrong, below 0.5."""

    ties: Literal["pull", "rao-kupper", "davidson"] = "pull"
    """What a tie says: `pull` draws the two scores together; the others give it a probability of
    its own, set so that equals tie as often as the training pairs do."""

    centring_coef: float = 0.0
    """Weight of the squared mean score of a pair, which the choices leave free."""

    length_debias: bool = False
    """Let the difference in length explain what it can of the choices, so that the scores do not
    have to: a weight a token, fitted to the training pairs beforehand."""

    heads: int = 1
    """Scalar heads on the same trunk, each on a bootstrap of the pairs; their mean is the score,
    their spread tells where it is a guess."""
