r"""Anthropic's transcripts: two dialogues of "\n\nHuman: …\n\nAssistant: …" that begin alike.

    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}

The answer is all that follows the first `Assistant:` behind the last `Human:`. One blank after a
marker belongs to the marker; other white space is kept. The published files have rows that are no
comparison: an empty answer, a dialogue that ends with the human, dialogues that differ before the
answer. Each is a fault that says so, none is guessed at.

Source: https://github.com/anthropics/hh-rlhf
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from amenable.data.formats.fields import has, is_text
from amenable.data.formats.format import Format, Typed
from amenable.data.formats.native import preference_of, prompt_of
from amenable.data.reading.json_records import Json
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Choice,
    Message,
    Preference,
    Prompt,
    Speaker,
)

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": Speaker.USER, "Assistant": Speaker.ASSISTANT}
_NAMES = {speaker: name for name, speaker in _SPEAKERS.items()}
_BARE = ("Human:", "Assistant:")
_OF_WINDOWS = re.compile(r"\r\n\r\n(?:Human|Assistant):")
_KEYS = frozenset({"id", "group", "chosen", "rejected", "weight", "margin", "annotator"})
_REMEDY = 'remove the row, or leave such rows out with data.on_error = "drop"'


def preferences(row: Row) -> Iterator[Preference]:
    """The shared beginning as a conversation, and the two answers."""
    before, chosen = _dialogue(row, "chosen")
    other, rejected = _dialogue(row, "rejected")
    if before != other:
        raise row.fault(
            "rejected", f"differs from chosen before the last answer, not in it alone; {_REMEDY}"
        )
    if chosen == rejected:
        raise row.fault("rejected", "equals chosen, so that the pair says nothing; remove the row")
    yield preference_of(row, prompt_of(row, _KEYS, before), chosen, rejected, Choice.FIRST)


def prompts(row: Row) -> Iterator[Prompt]:
    """What goes before the last answer of `chosen`."""
    yield prompt_of(row, _KEYS, _dialogue(row, "chosen")[0])


def _dialogue(row: Row, key: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer."""
    text = row.text(key)
    if _OF_WINDOWS.search(text):
        row.log.coerce("carriage returns at the ends of a dialogue's lines left out")
        text = text.replace("\r\n", "\n")
    if text.startswith(_BARE):
        row.log.coerce("dialogue without the empty line before its first turn")
        text = f"\n\n{text}"
    turns = _turns(row, key, text)
    humans = [place for place, (speaker, _, _) in enumerate(turns) if speaker is Speaker.USER]
    if not humans:
        raise row.fault(key, f"has no turn of the human; {_REMEDY}")
    answer = humans[-1] + 1
    if answer == len(turns):
        raise row.fault(key, f"ends with the human's turn, so that there is no answer; {_REMEDY}")
    for number, (speaker, start, end) in enumerate(turns[: answer + 1], 1):
        if not text[start:end].strip():
            which = "answer" if number == answer + 1 else f"turn {number} ({_NAMES[speaker]})"
            raise row.fault(key, f"its {which} is empty; {_REMEDY}")
    if answer + 1 < len(turns):
        row.log.coerce("several Assistant turns at the end read as one answer, markers kept")
    before = tuple(Message(speaker, text[start:end]) for speaker, start, end in turns[:answer])
    return before, text[turns[answer][1] :]


def _turns(row: Row, key: str, text: str) -> list[tuple[Speaker, int, int]]:
    """Speaker, first and last place of each turn's text."""
    marks = list(_MARKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        found = repr(text[:40])
        raise row.fault(
            key, rf"begins with {found}; expected a dialogue that begins with '\n\nHuman: '"
        )
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        (_SPEAKERS[mark[1]], mark.end() + (text[mark.end() : mark.end() + 1] == " "), end)
        for mark, end in zip(marks, ends, strict=True)
    ]


# Writing --------------------------------------------------------------------------------------


def _preference(row: Preference) -> list[Json]:
    before = "".join(_turn(turn.speaker, turn.content) for turn in row.prompt.messages)
    sides = {"chosen": row.chosen, "rejected": row.rejected}
    return [{key: f"{before}{_turn(Speaker.ASSISTANT, text)}" for key, text in sides.items()}]


def _turn(speaker: Speaker, text: str) -> str:
    return f"\n\n{_NAMES.get(speaker, speaker)}: {text}"


def _refuses(row: Typed) -> str:
    if not isinstance(row, Preference):
        return ""
    texts = [*(turn.content for turn in row.prompt.messages), row.candidate_0, row.candidate_1]
    if any(_MARKER.search(text) or _OF_WINDOWS.search(text) for text in texts):
        return "a text has a marker of turns (Human: or Assistant: behind an empty line)"
    return ""


# Table ----------------------------------------------------------------------------------------


def fits(values: Mapping[str, Any]) -> bool:
    """Whether both sides are dialogues and there is no prompt apart."""
    sides = (values.get("chosen"), values.get("rejected"))
    return not has(values, "prompt") and is_text(*sides) and all(map(_is_dialogue, sides))


def _is_dialogue(text: Any) -> bool:
    return text.startswith(_BARE) or any(mark.search(text) for mark in (_MARKER, _OF_WINDOWS))


HH = Format(
    name="hh",
    description=r"chosen, rejected: two dialogues of '\n\nHuman: …\n\nAssistant: …' turns",
    fits=fits,
    preferences=preferences,
    prompts=prompts,
    write_preference=_preference,
    holds=frozenset({"turns before the last", "which two answers were compared"}),
    refuses=_refuses,
)
