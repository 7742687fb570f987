"""What a reward says of a completion, and what all rewards together say of a roll-out batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from amenable.data.schemas import Prompt


@dataclass(frozen=True, slots=True)
class Failed:
    """A reward could not score a completion, which leaves the batch: it never counts as 0."""

    reason: str


Step = tuple[int, float]
"""(how many characters of the completion the step ends at, score of the step)."""

Verdict = float | tuple[Step, ...] | Failed
"""One finite score of a whole completion; or one a step, at least one; or none, and why."""


class TextReward(Protocol):
    """Anything that scores completions as text."""

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[Verdict]:
        """[N] verdicts.

        Args:
            prompts: [N] what each text completes.
            texts: [N] completions, without special tokens and outer white space.

        Raises:
            StageError: the reward does not do what a reward must, whatever the completions.
        """
        ...


@dataclass(frozen=True)
class Judgement:
    """Of one roll-out batch of N completions, in order."""

    scores: Tensor
    """[N] float32 weighted sum of the normalised rewards; NaN where any reward failed."""

    parts: dict[str, Tensor]
    """By reward: [N] float32 raw scores, those of steps summed; NaN where it failed."""

    steps: list[list[Step]] | None
    """By completion: (index of a completion token, weighted score), by rising index, from rewards
    that score steps. Their sum is contained in `scores`; None where no reward scores steps."""

    reasons: list[str]
    """[N] `name: reason` of each reward that failed; empty where none did."""
