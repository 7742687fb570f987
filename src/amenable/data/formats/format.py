"""What a format is: how its records become typed rows, and typed rows its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from amenable.data.reading.json_records import Json
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Answer,
    Choice,
    Demonstration,
    Preference,
    Prompt,
    Ranking,
    Speaker,
)

Kind = Literal["demonstrations", "preferences", "prompts"]
KINDS: tuple[Kind, ...] = ("demonstrations", "preferences", "prompts")
BY_CONTENT: tuple[Kind, ...] = ("preferences", "demonstrations", "prompts")
"""The kind that says most first: prompts can be had from any row."""

T = TypeVar("T")
Typed = Demonstration | Preference | Prompt
Read = Callable[[Row], Iterable[T]]
"""Typed rows of one record; a fault is raised as DataError by the methods of Row."""

EVERYTHING = frozenset(
    {
        "system message",
        "turns before the last",
        "order of the candidates",
        "ties",
        "which two answers were compared",
        "id",
        "group",
        "weight",
        "margin",
        "annotator",
        "strength",
        "other keys",
    }
)
"""What a row may have besides its texts and who was preferred; a format holds some of it."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table of formats. A record is read in the first of these ways that is given.

    `preferences`, or `rankings` (N scored answers in a record), or `answers` (one scored answer a
    record: those of one prompt are gathered from the whole file, which is held in memory).
    """

    name: str
    """As in a recipe's `format` and after `--to`."""

    description: str
    """Its keys, in one line."""

    fits: Callable[[Json], bool]
    """Whether a record looks like it: by its keys and their types (of `hh`, its markers).

    Never raises, whatever the values; no two formats fit one record.
    """

    kind_of: Callable[[Json], Kind] | None = None
    """Which kind of rows a record of it has, where its records can be of several kinds."""

    demonstrations: Read[Demonstration] | None = None
    preferences: Read[Preference] | None = None
    prompts: Read[Prompt] | None = None
    rankings: Read[Ranking] | None = None
    answers: Read[Answer] | None = None
    rated: bool = False
    """Whether differences of the answers' scores mean something, as a margin."""

    write_demonstration: Callable[[Demonstration], list[Json]] | None = None
    write_preference: Callable[[Preference], list[Json]] | None = None
    write_prompt: Callable[[Prompt], list[Json]] | None = None

    holds: frozenset[str] = frozenset()
    """Which of EVERYTHING a written row keeps."""

    fill: Mapping[str, Any] = field(default_factory=dict)
    """What is written under a key that other rows of the file have, for readers that need a value
    in every row."""

    refuses: Callable[[Typed], str] | None = None
    """Why this one row cannot be written, because it would be read back as another; empty: it can.

    Asked only about rows that `refusal` does not refuse for what the format cannot hold."""

    def kind(self, values: Json) -> Kind:
        """The kind of rows that this record of the format has."""
        if self.kind_of is not None:
            return self.kind_of(values)
        return next(kind for kind in BY_CONTENT if self.reads(kind))

    def reads(self, kind: Kind) -> bool:
        """Whether rows of this kind can come from it."""
        if kind == "demonstrations":
            return self.demonstrations is not None
        compares = (self.preferences or self.rankings or self.answers) is not None
        if kind == "preferences":
            return compares
        return compares or (self.prompts or self.demonstrations) is not None

    def writes(self, kind: Kind) -> bool:
        """Whether rows of this kind can be written as it."""
        return getattr(self, f"write_{kind[:-1]}") is not None

    def refusal(self, row: Typed) -> str:
        """Why this row is not written rather than changed: what is said would be lost; or empty."""
        prompt = row if isinstance(row, Prompt) else row.prompt
        speakers = [turn.speaker for turn in prompt.messages]
        if isinstance(row, Preference) and row.choice is Choice.TIE and "ties" not in self.holds:
            return "a tie, which the format cannot say"
        if Speaker.SYSTEM in speakers and "system message" not in self.holds:
            return "a system message, which the format has no place for"
        turns = len(speakers) - speakers.count(Speaker.SYSTEM)
        if turns > 1 and "turns before the last" not in self.holds:
            return "a conversation of several turns, for which the format has no place"
        return self.refuses(row) if self.refuses else ""
