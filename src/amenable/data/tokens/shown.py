"""A row's tokens as training gets them: which are kept, cut, special, and which carry loss.

The ids come from the renderer that all stages share; nothing is tokenized a second way.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from amenable.data.render import Renderer
from amenable.data.schemas import Choice, Demonstration, Preference
from amenable.data.tokens.rows import AnyRow, prompt_of

Json = dict[str, Any]

PART = "⋯"
"""Stands for a token that is a part of a character; the character is shown with its last part."""

MARKS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
"""What white space is shown as."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as shown.

    Args:
        id: its number.
        text: what it adds to the text; `PART` for all but the last token of one character.
        special: whether it is a special token.
        cut: whether the cut takes it away: training does not see it.
    """

    id: int
    text: str
    special: bool
    cut: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt or a completion, its tokens in order, those cut away among them.

    Args:
        title: `prompt`, `output_text`, `candidate_0` or `candidate_1`.
        note: what is said of it: `chosen`, `rejected`, `tie` or nothing.
        loss: whether its tokens count: the mask of the batch.
        tokens: kept ones and cut ones.
    """

    title: str
    note: str
    loss: bool
    tokens: tuple[Token, ...]

    @property
    def ids(self) -> list[int]:
        """Ids that training sees."""
        return [token.id for token in self.tokens if not token.cut]

    @property
    def cut(self) -> list[int]:
        """Ids that the cut takes away."""
        return [token.id for token in self.tokens if token.cut]


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row's prompt and completions, ready to be drawn."""

    kind: str
    id: str
    prompt: Part
    completions: tuple[Part, ...]


def shown_row(renderer: Renderer, row: AnyRow) -> ShownRow:
    """The tokens of a row, exactly those that training gets.

    Raises:
        DataError: the prompt cannot be rendered.
    """
    prompt = prompt_of(row)
    whole = renderer.whole_prompt_ids(prompt)
    kept = renderer.fit_prompt(prompt, whole)
    completions: tuple[Part, ...] = ()
    if isinstance(row, Demonstration):
        completions = (_completion(renderer, "output_text", row.output_text, ""),)
    elif isinstance(row, Preference):
        notes = {
            Choice.FIRST: ("chosen", "rejected"),
            Choice.SECOND: ("rejected", "chosen"),
            Choice.TIE: ("tie", "tie"),
        }[row.choice]
        completions = (
            _completion(renderer, "candidate_0", row.candidate_0, notes[0]),
            _completion(renderer, "candidate_1", row.candidate_1, notes[1]),
        )
    tokens = _prompt_tokens(renderer, whole, kept)
    kind = type(row).__name__.lower()
    return ShownRow(kind, prompt.id, Part("prompt", "", False, tokens), completions)


def rows_as_json(renderer: Renderer, rows: Iterable[AnyRow]) -> list[Json]:
    """Rows with ids, tokens and mask of every sequence that training sees.

    A sequence is a prompt and one completion (a prompt alone where there is none). `mask` is true
    where a token counts; `cut` has the ids that the limits take from the prompt and from the
    completion.
    """
    return [_row_json(shown_row(renderer, row)) for row in rows]


def heading_words(part: Part) -> tuple[str, str]:
    """Title and facts of a part: `candidate_0 · chosen`, `12 tokens · loss · ...`."""
    seen = len(part.ids)
    facts = [f"{seen} token{'s' if seen != 1 else ''}", "loss" if part.loss else "no loss"]
    if part.note:
        facts.append("scored at the last token")
    if part.cut:
        facts.append(f"{len(part.cut)} more cut away")
    return f"{part.title} · {part.note}" if part.note else part.title, " · ".join(facts)


def visible(text: str) -> str:
    """Text whose white space and invisible characters can be seen; a terminal cannot obey it."""
    return "".join(MARKS.get(char) or visible_character(char) for char in text)


def safe(text: str) -> str:
    """Text for a heading: white space as it is, nothing invisible that could steer a terminal."""
    return "".join(map(visible_character, text))


def visible_character(char: str) -> str:
    """A character, or its number where it would not show or could steer a terminal."""
    if char.isprintable() and unicodedata.category(char) != "Cf":
        return char
    return f"<U+{ord(char):04X}>"


def _completion(renderer: Renderer, title: str, text: str, note: str) -> Part:
    whole = renderer.whole_completion_ids(text)
    seen = len(renderer.completion_ids(text))
    cut = [position >= seen for position in range(len(whole))]
    return Part(title, note, True, _tokens(renderer, whole, cut))


def _prompt_tokens(renderer: Renderer, whole: list[int], kept: list[int]) -> tuple[Token, ...]:
    """Kept ids and, where the text was cut, the ids that stood there."""
    if kept == whole:
        return _tokens(renderer, whole, [False] * len(whole))
    head = _shared(whole, kept)
    tail = _shared(whole[head:][::-1], kept[head:][::-1])
    middle = kept[head : len(kept) - tail]  # a cut inside a word can leave other tokens
    lost = whole[head : len(whole) - tail]
    ids = [*kept[:head], *middle, *lost, *kept[len(kept) - tail :]]
    start = head + len(middle)
    cut = [start <= position < start + len(lost) for position in range(len(ids))]
    return _tokens(renderer, ids, cut)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _tokens(renderer: Renderer, ids: Sequence[int], cut: Sequence[bool]) -> tuple[Token, ...]:
    tokenizer = renderer.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    texts = _texts(renderer, ids)
    return tuple(
        Token(number, text, number in special, gone)
        for number, text, gone in zip(ids, texts, cut, strict=True)
    )


def _texts(renderer: Renderer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text.

    A token is decoded behind the one before it, since some tokenizers drop a blank at the start.
    Tokens that are parts of one character wait for its last part.
    """

    def decode(numbers: Sequence[int]) -> str:
        return str(renderer.tokenizer.decode(list(numbers), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    before: list[int] = []
    waiting: list[int] = []
    for number in ids:
        waiting.append(number)
        known = decode(before)
        joined = decode([*before, *waiting])
        text = joined[len(known) :] if joined.startswith(known) else decode(waiting)
        if not before and str(renderer.tokenizer.convert_ids_to_tokens(number)).startswith("▁"):
            text = " " + text.removeprefix(" ")
        if text.endswith("\ufffd") and len(waiting) < 4:
            texts.append(PART)
            continue
        texts.append(text)
        before, waiting = waiting, []
    return texts


def _row_json(row: ShownRow) -> Json:
    return {
        "kind": row.kind,
        "id": row.id,
        "sequences": [_sequence(row.prompt, part) for part in row.completions]
        or [_sequence(row.prompt, None)],
    }


def _sequence(prompt: Part, completion: Part | None) -> Json:
    parts = [prompt, completion] if completion else [prompt]
    kept = [token for part in parts for token in part.tokens if not token.cut]
    return {
        "completion": completion.title if completion else None,
        "note": (completion.note or None) if completion else None,
        "ids": [token.id for token in kept],
        "tokens": [token.text for token in kept],
        "mask": [part.loss for part in parts for _ in part.ids],
        "cut": {"prompt": prompt.cut, "completion": completion.cut if completion else []},
    }
