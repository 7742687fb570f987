"""Collecting preferences: two samples a prompt, an annotator chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Runs when the recipe has no preference file and no ready reward."""

    annotator: Literal["none", "simulated"] = "none"
    """`simulated` is a stated, seeded stand-in for people; it needs rows with a reference text."""

    pairs: int = 800
    """Preference pairs for training the reward model."""

    temperature: float = 1.0
    """Sampling temperature of the two completions."""

    noise: float = 0.1
    """Probability that the simulated annotator picks the other one."""

    closeness_weight: float = 1.0
    """Simulated annotator: weight of the unigram F1 with the author's own line."""

    grounding_weight: float = 0.5
    """Simulated annotator: weight of the share of content words that occur in the input."""

    brevity_weight: float = 0.05
    """Simulated annotator: cost of each word beyond `brevity_words`."""

    brevity_words: int = 8
    """Simulated annotator: length that is free of cost."""
