"""Side-by-Side evaluation on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Completions of base, SFT and tuned model with the same decoding, compared in pairs."""

    enabled: bool = True
    """Run the stage."""

    temperature: float = 0.0
    """0 decodes greedily; above 0 samples."""

    batch_size: int = 32
    """Prompts decoded together."""

    bootstrap_samples: int = 2000
    """Resamples of the prompts for intervals."""

    best_of: int = 16
    """Samples a prompt in the headroom check before the policy stage; 0 leaves it out."""

    best_of_prompts: int = 32
    """Prompts in that check."""

    diversity_prompts: int = 64
    """Held-out prompts on which distinct-n is measured at temperature 1; 0 leaves it out."""
