"""Alpaca's instructions, with an answer or with two.

    {"instruction", "input"?, "output"}                    a demonstration
    {"instruction", "input"?, "chosen", "rejected"}        a preference

The input text is the instruction, then, if there is one, `input` behind an empty line. `system` is
the system message; `history` is a list of [user's text, assistant's text] that goes before.

Sources: https://github.com/tatsu-lab/stanford_alpaca; https://github.com/hiyouga/LLaMA-Factory
(data/README.md) for `system`, `history`, `chosen` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from amenable.data.formats.fields import checked_list, checked_text, has_any, is_text
from amenable.data.formats.format import Format, Kind
from amenable.data.formats.native import preference_of, prompt_of
from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import shown
from amenable.data.reading.records import Row
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.errors import DataError

_KEYS = frozenset({"id", "group", "instruction", "input", "system", "history"})
_DEMONSTRATION_KEYS = _KEYS | {"output"}
_PREFERENCE_KEYS = _KEYS | {"chosen", "rejected", "weight", "margin", "annotator"}


def prompts(row: Row) -> Iterator[Prompt]:
    """Instruction and input; an `output` stays in meta."""
    yield prompt_of(row, _KEYS, _turns(row))


def demonstrations(row: Row) -> Iterator[Demonstration]:
    """Instruction and input, and the output."""
    prompt = prompt_of(row, _DEMONSTRATION_KEYS, _turns(row))
    yield Demonstration(prompt=prompt, output_text=row.text("output"))


def preferences(row: Row) -> Iterator[Preference]:
    """Instruction and input, and two answers."""
    prompt = prompt_of(row, _PREFERENCE_KEYS, _turns(row))
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen == rejected:
        raise row.fault("rejected", "equals chosen, so that the pair says nothing; remove the row")
    yield preference_of(row, prompt, chosen, rejected, Choice.FIRST)


def _turns(row: Row) -> tuple[Message, ...]:
    text = row.text("instruction")
    if row.values.get("input") is not None:
        more = row.text("input", may_be_empty=True)
        text = f"{text}\n\n{more}" if more.strip() else text
    system = row.values.get("system") is not None and row.text("system", may_be_empty=True)
    return (
        *((Message(Speaker.SYSTEM, system),) if system and system.strip() else ()),
        *_history(row),
        Message(Speaker.USER, text),
    )


def _history(row: Row) -> Iterator[Message]:
    given = row.values.get("history")
    if given is None or given == []:
        return
    for place, value in enumerate(checked_list(row, "history", given)):
        field = f"history[{place}]"
        if not isinstance(value, list) or len(value) != 2:
            raise row.fault(
                field, f"found {shown(value)}; expected a list of two texts, user's and assistant's"
            )
        yield Message(Speaker.USER, checked_text(row, f"{field}[0]", value[0]))
        yield Message(Speaker.ASSISTANT, checked_text(row, f"{field}[1]", value[1]))


# Writing --------------------------------------------------------------------------------------


def _asked(prompt: Prompt) -> Json:
    turns = list(prompt.messages)
    row: Json = {"instruction": turns.pop().content, "input": ""}
    if turns and turns[0].speaker is Speaker.SYSTEM:
        row["system"] = turns.pop(0).content
    expected = [Speaker.USER, Speaker.ASSISTANT] * (len(turns) // 2)
    if [turn.speaker for turn in turns] != expected:
        raise DataError("the conversation does not alternate between user and assistant")
    if turns:
        texts = [turn.content for turn in turns]
        row["history"] = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return row


# Table ----------------------------------------------------------------------------------------


def _fits(values: Mapping[str, Any]) -> bool:
    answered = is_text(values.get("output")) or has_any(values, "chosen", "rejected")
    return is_text(values.get("instruction")) and answered and not has_any(values, "completions")


def _kind(values: Json) -> Kind:
    return "preferences" if has_any(values, "chosen", "rejected") else "demonstrations"


ALPACA = Format(
    name="alpaca",
    description="instruction, input?, output; or chosen, rejected; system?, history?",
    fits=_fits,
    kind_of=_kind,
    demonstrations=demonstrations,
    preferences=preferences,
    prompts=prompts,
    write_demonstration=lambda row: [{**_asked(row.prompt), "output": row.output_text}],
    write_preference=lambda row: [
        {**_asked(row.prompt), "chosen": row.chosen, "rejected": row.rejected}
    ],
    holds=frozenset({"system message", "turns before the last", "which two answers were compared"}),
)
