"""What a judge is asked and what it says. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from amenable.data.schemas import Prompt


class Verdict(StrEnum):
    """What a judge says of two answers, of which it was shown one first."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    BOTH_BAD = "both-bad"
    """Neither will do; counts as a tie and is told apart."""
    INVALID = "invalid"
    """A reply that says none of these."""


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers to a prompt, in the order in which they are shown."""

    prompt: Prompt
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    verdict: Verdict
    text: str = ""
    """The whole reply, with the judge's reasons."""
    confidence: float | None = None
    """Probability that the judge gives to the first, against the second; None: not told."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


Keep = Callable[[int, Reply], None]
"""Takes the number of a question and its reply the moment that it is there, from any thread."""


class Judge(Protocol):
    """Anything that compares two texts."""

    name: str
    """In tables and files."""

    identity: Mapping[str, Any] | None
    """All that its replies depend on beside the question, JSON-able; None: nobody can tell, so that
    they are not kept for another time."""

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        """Answer each question once, in any order.

        Args:
            questions: what to compare.
            keep: is told of every reply.

        Returns:
            Reasons why questions went without a reply, one each; empty where all were answered.
        """
        ...
