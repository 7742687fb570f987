"""The shapes that TRL's trainers read: plain, conversational, implicit prompt, KTO.

Two neighbours are read as well: `question`, `input` or `query` in place of `prompt`, as of the
published Orca pairs, and `system`, the system message. Where `chosen` and `rejected` are
conversations, the prompt is the longer of `prompt` and of what they begin with, if one ends with
the other.

Source: https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from amenable.data.formats import hh
from amenable.data.formats.fields import has, has_any, is_text, whole
from amenable.data.formats.format import Format, Kind
from amenable.data.formats.native import (
    behind_system,
    conversation,
    messages_to_list,
    preference_of,
    prompt_of,
)
from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import shown
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Answer,
    Choice,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Speaker,
)

_PROMPT_KEYS = frozenset({"id", "group", "prompt", "system"})
_DEMONSTRATION_KEYS = _PROMPT_KEYS | {"completion"}
_PREFERENCE_KEYS = _PROMPT_KEYS | {"chosen", "rejected", "weight", "margin", "annotator"}
_KTO_KEYS = _DEMONSTRATION_KEYS | {"label"}
_ASKED = ("question", "input", "query")
"""What `prompt` is called elsewhere."""

_FILL = {"margin": 0.0}
"""RewardTrainer wants a margin in every row or in none; 0 changes no loss."""

Turns = tuple[Message, ...]


# Reading --------------------------------------------------------------------------------------


def prompts(row: Row) -> Iterator[Prompt]:
    """`prompt`, a text or messages; without one, what `chosen` and `rejected` begin with."""
    row = _with_prompt(row)
    if row.values.get("prompt") is None and has_any(row.values, "chosen", "rejected"):
        yield from (pair.prompt for pair in preferences(row))
    else:
        yield prompt_of(row, _PROMPT_KEYS, _asked(row))


def demonstrations(row: Row) -> Iterator[Demonstration]:
    """`prompt` and `completion`."""
    if row.values.get("label") is not None:
        raise row.fault(
            "label", "is a verdict on the completion; read the file with the format 'kto'"
        )
    prompt = prompt_of(row, _DEMONSTRATION_KEYS, _asked(row))
    yield Demonstration(prompt=prompt, output_text=_answer(row, "completion"))


def preferences(row: Row) -> Iterator[Preference]:
    """`chosen` and `rejected`, behind `prompt` or behind what both begin with."""
    row = _with_prompt(row)
    if isinstance(row.values.get("chosen"), list) or isinstance(row.values.get("rejected"), list):
        asked, chosen, rejected = _conversations(row)
    elif row.values.get("prompt") is not None:
        asked, chosen, rejected = _asked(row), row.text("chosen"), row.text("rejected")
    else:
        asked, chosen, rejected = _implicit(row)
    if chosen == rejected:
        raise row.fault("rejected", "equals chosen, so that the pair says nothing; remove the row")
    prompt = prompt_of(row, _PREFERENCE_KEYS, asked)
    yield preference_of(row, prompt, chosen, rejected, Choice.FIRST)


def kto_answers(row: Row) -> Iterator[Answer]:
    """`completion` with the score 1 where `label` is true and 0 where it is false."""
    label = whole(row, row.value("label"))
    if row.textual and isinstance(label, str):
        label = {"true": True, "false": False}.get(label.strip().casefold(), label)
    if not isinstance(label, int) or label not in (0, 1):
        found = "is missing" if "label" not in row.values else f"found {shown(label)}"
        raise row.fault("label", f"{found}; expected true (desirable) or false")
    prompt = prompt_of(row, _KTO_KEYS, _asked(row))
    yield Answer(prompt=prompt, text=_answer(row, "completion"), score=float(label))


def _with_prompt(row: Row) -> Row:
    """The row with its question as `prompt`, where it is called so."""
    key = _question(row.values)
    if key is None:
        return row
    row.log.coerce(f"{key} read as the prompt")
    values = {name: value for name, value in row.values.items() if name != key}
    return replace(row, values={**values, "prompt": row.values[key]})


def _question(values: Mapping[str, Any]) -> str | None:
    """The one key that stands in for `prompt`, if there is one."""
    found = [key for key in _ASKED if is_text(values.get(key))]
    return found[0] if len(found) == 1 and values.get("prompt") is None else None


def _asked(row: Row) -> Turns:
    """`prompt`, behind `system`."""
    value = row.values.get("prompt")
    if not isinstance(value, list):
        return behind_system(row, "system", (Message(Speaker.USER, row.text("prompt")),))
    turns = conversation(row, "prompt", value)
    if turns[-1].speaker is not Speaker.USER:
        raise row.fault(
            "prompt", f"the last message is the {turns[-1].speaker}'s; expected the user's"
        )
    return behind_system(row, "system", turns)


def _answer(row: Row, key: str) -> str:
    """A text, or the one message of the assistant."""
    if not isinstance(row.values.get(key), list):
        return row.text(key)
    before, answer = _last_turn(row, key)
    if before:
        raise row.fault(key, f"found {len(before) + 1} messages; expected one, of the assistant")
    return answer


def _last_turn(row: Row, key: str) -> tuple[Turns, str]:
    """What goes before the assistant's last message, and that message."""
    turns = conversation(row, key, row.values.get(key))
    if turns[-1].speaker is not Speaker.ASSISTANT:
        raise row.fault(
            key, f"the last message is the {turns[-1].speaker}'s; expected the assistant's answer"
        )
    return turns[:-1], turns[-1].content


def _conversations(row: Row) -> tuple[Turns, str, str]:
    """Prompt and answers of two conversations; their beginning is the prompt, or repeats it."""
    before, chosen = _last_turn(row, "chosen")
    before_other, rejected = _last_turn(row, "rejected")
    if before != before_other:
        raise row.fault(
            "rejected", "its messages before the answer differ from those of chosen; make them one"
        )
    if row.values.get("prompt") is None:
        if not before or before[-1].speaker is not Speaker.USER:
            raise row.fault(
                "prompt", "is missing, and chosen has no message of the user before the answer"
            )
        return behind_system(row, "system", before), chosen, rejected
    asked = _asked(row)
    shorter, longer = sorted((asked, before), key=len)
    if longer[len(longer) - len(shorter) :] != shorter:
        raise row.fault("prompt", "differs from the messages that chosen begins with; keep one")
    return longer, chosen, rejected


def _implicit(row: Row) -> tuple[Turns, str, str]:
    """Two texts that begin alike: the prompt is what they share, up to the last white space."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if hh.fits(row.values):
        raise row.fault(
            "prompt",
            "is missing, and chosen and rejected are dialogues of Human: and Assistant: turns; "
            "read the file with the format 'hh'",
        )
    alike = zip(chosen, rejected, strict=False)
    shared = chosen[: next((n for n, (one, other) in enumerate(alike) if one != other), None)]
    end = max(shared.rfind(" "), shared.rfind("\n")) + 1
    asked = shared[:end]
    if not asked.strip() or not chosen[end:].strip() or not rejected[end:].strip():
        raise row.fault(
            "prompt",
            "is missing, and chosen and rejected do not begin with a text that they share and go "
            "on differently; add the key prompt",
        )
    row.log.coerce("prompt taken as what chosen and rejected begin with")
    turns = behind_system(row, "system", (Message(Speaker.USER, asked.strip()),))
    return turns, chosen[end:], rejected[end:]


# Writing --------------------------------------------------------------------------------------


def _with_margin(row: Preference, pair: Json) -> list[Json]:
    return [pair if row.margin is None else {**pair, "margin": row.margin}]


def _preference(row: Preference) -> list[Json]:
    pair = {"prompt": row.prompt.text, "chosen": row.chosen, "rejected": row.rejected}
    return _with_margin(row, pair)


def _said(text: str) -> list[Json]:
    return messages_to_list((Message(Speaker.ASSISTANT, text),))


def _chat_preference(row: Preference) -> list[Json]:
    prompt = messages_to_list(row.prompt.messages)
    pair = {"prompt": prompt, "chosen": _said(row.chosen), "rejected": _said(row.rejected)}
    return _with_margin(row, pair)


def _kto(row: Preference) -> list[Json]:
    asked = messages_to_list(row.prompt.messages)
    return [
        {"prompt": asked, "completion": _said(row.chosen), "label": True},
        {"prompt": asked, "completion": _said(row.rejected), "label": False},
    ]


# Table ----------------------------------------------------------------------------------------

_OTHERS = ("label", "instruction", "score_chosen", "response", "response_1", "completions")
_ASKED_ELSEWHERE = (
    *_ASKED,
    *("system", "context", "text", "history", "document", "article", "post", "dialogue"),
)
"""Keys of a text that chosen and rejected answer, so that they do not begin with it."""


def _fits(values: Mapping[str, Any], kind: type) -> bool:
    """Whether `chosen` is of this type, or in its absence `prompt`; no other format's keys."""
    if has_any(values, *_OTHERS, "messages", "conversations", "input_text"):
        return False
    if has_any(values, "chosen", "rejected"):
        if not has(values, "chosen", "rejected") or not isinstance(values["chosen"], kind):
            return False
        elsewhere = kind is str and has_any(values, *_ASKED_ELSEWHERE)
        is_asked = has(values, "prompt") or _question(values) is not None
        return (is_asked or not elsewhere) and not hh.fits(values)
    return isinstance(values.get("prompt"), kind)


def _kind(values: Json) -> Kind:
    if has_any(values, "chosen", "rejected"):
        return "preferences"
    return "demonstrations" if has_any(values, "completion") else "prompts"


TRL = Format(
    name="trl",
    description="prompt? (or question), chosen, rejected as texts, margin?; prompt, completion",
    fits=lambda values: _fits(values, str),
    kind_of=_kind,
    demonstrations=demonstrations,
    preferences=preferences,
    prompts=prompts,
    write_demonstration=lambda row: [{"prompt": row.prompt.text, "completion": row.output_text}],
    write_preference=_preference,
    write_prompt=lambda prompt: [{"prompt": prompt.text}],
    holds=frozenset({"margin", "which two answers were compared"}),
    fill=_FILL,
)

TRL_CHAT = Format(
    name="trl-chat",
    description="as trl, with lists of {role, content}; chosen and rejected may begin alike",
    fits=lambda values: _fits(values, list),
    kind_of=_kind,
    demonstrations=demonstrations,
    preferences=preferences,
    prompts=prompts,
    write_demonstration=lambda row: [
        {"prompt": messages_to_list(row.prompt.messages), "completion": _said(row.output_text)}
    ],
    write_preference=_chat_preference,
    write_prompt=lambda prompt: [{"prompt": messages_to_list(prompt.messages)}],
    holds=frozenset(
        {"system message", "turns before the last", "margin", "which two answers were compared"}
    ),
    fill=_FILL,
)

KTO = Format(
    name="kto",
    description="prompt, completion, label (true or false); texts or lists of {role, content}",
    fits=lambda values: (
        has(values, "prompt", "completion", "label") and isinstance(values["prompt"], str | list)
    ),
    answers=kto_answers,
    write_preference=_kto,
    holds=frozenset({"system message", "turns before the last"}),
)
