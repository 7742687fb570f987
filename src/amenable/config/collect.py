"""Collecting preferences: two samples a prompt, an annotator chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Runs when the recipe has no preference file and no ready reward."""

    annotator: Literal["none", "simulated", "judge"] = "none"
    """`simulated` is a stated, seeded stand-in for people; it needs rows with a reference text.
    `judge` asks a model in both orders: AI feedback."""

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

    judge: str = ""
    """Who chooses: a service's URL, a model, a reward model's folder or a function (as of
    `amenable compare`)."""

    judge_model: str = ""
    """The service's name of the model."""

    judge_template: str = "help-1"
    """How a judge that reads is asked."""

    judge_token_env: str = ""
    """Environment variable with the service's token."""

    judge_audit: str = ""
    """Folder of `amenable audit` of this judge: its agreement with people is told beside."""

    doubtful: Literal["drop", "weight", "confidence"] = "drop"
    """Pairs of which a judge does not say the same in both orders: `drop` leaves them out, `weight`
    keeps those that lean to a side, with a weight of how far. `confidence` weighs every pair so, by
    the probability that the judge gives to each text; a judge that tells none is weighed by its
    verdicts."""

    other: str = ""
    """A model that gives the second candidate; empty: a second sample of the first."""
