"""The nouns of the data: what a row means once it has been read. Pure Python, no tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import Any


class Speaker(StrEnum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Choice(Enum):
    """Which of two candidates was preferred. The one encoding of a preference in code."""

    FIRST = 0
    SECOND = 1
    TIE = "tie"

    def swapped(self) -> Choice:
        """The same preference after the two candidates changed places."""
        return {Choice.FIRST: Choice.SECOND, Choice.SECOND: Choice.FIRST}.get(self, self)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    speaker: Speaker
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is asked: one user text, or a conversation that ends with the user.

    `group` names what must stay on one side of a split (default: the prompt's own text).
    `meta` holds every key of the row that Amenable does not use itself, unchanged.
    """

    messages: tuple[Message, ...]
    id: str
    group: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The last user message: `input_text` of a plain row."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and the answer that somebody wrote for it."""

    prompt: Prompt
    output_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two candidate completions of one prompt and which one was preferred.

    `weight` scales the row's loss (default 1); `margin` is a wanted score difference in logits;
    `strength` is how sure the choice was: 1 (candidate_0 much better), 5 (a tie) to 9.
    """

    prompt: Prompt
    candidate_0: str
    candidate_1: str
    choice: Choice
    weight: float = 1.0
    margin: float | None = None
    annotator: str | None = None
    strength: int | None = None

    def swap(self) -> Preference:
        """The same preference with the candidates in the other order."""
        return replace(
            self,
            candidate_0=self.candidate_1,
            candidate_1=self.candidate_0,
            choice=self.choice.swapped(),
            strength=None if self.strength is None else 10 - self.strength,
        )

    @property
    def chosen(self) -> str:
        """The preferred text; of a tie, the first."""
        return self.candidate_1 if self.choice is Choice.SECOND else self.candidate_0

    @property
    def rejected(self) -> str:
        """The other text; of a tie, the second."""
        return self.candidate_0 if self.choice is Choice.SECOND else self.candidate_1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One rated answer. Answers of one prompt are compared by score: higher is better."""

    prompt: Prompt
    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """N answers of one prompt, each with a score: higher is better, equal scores tie.

    `rated` says that differences of scores mean something, as those of ratings do and those of
    ranks do not.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    rated: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Something that a reader function leaves out, counted under its reason."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a system answered. `ended` says that it stopped by itself (end-of-sequence token)."""

    prompt: Prompt
    text: str
    tokens: int
    ended: bool


def prompt_key(prompt: Prompt) -> str:
    """The default group: 16 hexadecimal digits of what was asked.

    System message, case and white space apart.
    """
    return messages_key(prompt.messages)


def messages_key(messages: tuple[Message, ...]) -> str:
    """`prompt_key` of a conversation."""
    turns = (
        f"{turn.speaker}\n{turn.content}" for turn in messages if turn.speaker is not Speaker.SYSTEM
    )
    normalised = "\0".join(" ".join(turn.split()).casefold() for turn in turns)
    return hashlib.sha256(normalised.encode()).hexdigest()[:16]
