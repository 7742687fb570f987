"""The native format, which is also Google Cloud's (text and chat). Every other becomes it.

    demonstration   input_text, output_text
    preference      input_text, candidate_0, candidate_1, choice (0, 1 or "tie");
                    optional weight, margin, annotator, strength (1 … 9, must agree with choice)
    prompt          input_text

Each kind may have `id` and `group`, and may have `messages` (a list of {role or author, content},
the user's last; optional `context`, which becomes the system message) in place of `input_text`.
Candidates and choice may stand inside the last message, as Google's notebook writes them.
Nothing is lost: every other key of the row, `meta` among them, stays in `Prompt.meta` under its own
name, and `*_to_row` puts it back at the top level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from amenable.data.formats.fields import checked_text, has_any
from amenable.data.formats.format import EVERYTHING, Format, Kind
from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import listed, shown
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Choice,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Speaker,
    messages_key,
)
from amenable.errors import DataError

SPEAKERS = {speaker.value: speaker for speaker in Speaker}

PROMPT_KEYS = frozenset({"id", "group", "input_text", "messages", "context"})
DEMONSTRATION_KEYS = PROMPT_KEYS | {"output_text"}
PREFERENCE_KEYS = PROMPT_KEYS | {
    "candidate_0",
    "candidate_1",
    "choice",
    "weight",
    "margin",
    "annotator",
    "strength",
}
_OWN = ("input_text", "output_text", "candidate_0", "candidate_1")
_IN_MESSAGE = ("candidate_0", "candidate_1", "choice")
_CALLS = ("tool_calls", "function_call")


# Reading --------------------------------------------------------------------------------------


def prompts(row: Row) -> Iterator[Prompt]:
    """The row's prompt; an `output_text` stays in `meta`."""
    yield prompt_of(row, PROMPT_KEYS, messages_of(row))


def demonstrations(row: Row) -> Iterator[Demonstration]:
    """The row's prompt and answer."""
    prompt = prompt_of(row, DEMONSTRATION_KEYS, messages_of(row))
    yield Demonstration(prompt=prompt, output_text=row.text("output_text"))


def preferences(row: Row) -> Iterator[Preference]:
    """The row's prompt, its two candidates and the choice."""
    row = _hoisted(row)
    prompt = prompt_of(row, PREFERENCE_KEYS, messages_of(row))
    candidate_0, candidate_1 = row.text("candidate_0"), row.text("candidate_1")
    if candidate_0 == candidate_1:
        raise row.fault(
            "candidate_1",
            "equals candidate_0, so that a choice between them says nothing; remove the row",
        )
    choice = _choice(row)
    yield preference_of(row, prompt, candidate_0, candidate_1, choice, strength=_strength(row))


def prompt_of(row: Row, known: frozenset[str], messages: tuple[Message, ...]) -> Prompt:
    """A prompt with the row's `id` and `group`; keys that are not `known` stay in its meta.

    The id defaults to file and line, the group to the text of the conversation.
    """
    return Prompt(
        messages=messages,
        id=row.name("id") or f"{row.label}:{row.line}",
        group=row.name("group") or messages_key(messages),
        meta={key: value for key, value in row.values.items() if key not in known},
    )


def preference_of(
    row: Row,
    prompt: Prompt,
    candidate_0: str,
    candidate_1: str,
    choice: Choice,
    *,
    strength: int | None = None,
) -> Preference:
    """A preference with the row's optional `weight`, `margin` and `annotator`."""
    weight = row.number("weight", above_zero=True)
    return Preference(
        prompt=prompt,
        candidate_0=candidate_0,
        candidate_1=candidate_1,
        choice=choice,
        weight=1.0 if weight is None else weight,
        margin=row.number("margin", above_zero=False),
        annotator=row.name("annotator"),
        strength=strength,
    )


def messages_of(row: Row) -> tuple[Message, ...]:
    """`messages` behind `context`, or `input_text` as the one message of the user."""
    given = row.values.get("messages")
    if given is None:
        if row.values.get("context") is not None:
            raise row.fault(
                "context", "is read with messages only; put it into input_text or give messages"
            )
        return (Message(Speaker.USER, row.text("input_text")),)
    if row.values.get("input_text") is not None:
        raise row.fault("messages", "the row has input_text as well; keep one of the two")
    messages = conversation(row, "messages", given)
    if messages[-1].speaker is not Speaker.USER:
        raise row.fault(
            "messages",
            f"the last message is the {messages[-1].speaker}'s; end with the user's and put the "
            "answer into its own key",
        )
    return behind_system(row, "context", messages)


def conversation(
    row: Row,
    field: str,
    given: object,
    *,
    speaker_keys: tuple[str, ...] = ("author", "role"),
    content_keys: tuple[str, ...] = ("content",),
    speakers: Mapping[str, Speaker] = SPEAKERS,
) -> tuple[Message, ...]:
    """A list of messages, at least one, each checked.

    Args:
        row: for the place of a fault.
        field: where the list stands, for the message of a fault.
        given: the list as it was decoded.
        speaker_keys: what the key of the speaker may be called; the last is the usual one.
        content_keys: what the key of the text may be called; the last is the usual one.
        speakers: the format's names of the speakers.
    """
    if not isinstance(given, list) or not given:
        names = f"{{{speaker_keys[-1]}, {content_keys[-1]}}}"
        raise row.fault(field, f"found {shown(given)}; expected a list of {names} objects")
    return tuple(
        message_of(row, f"{field}[{number}]", value, speaker_keys, content_keys, speakers)
        for number, value in enumerate(given)
    )


def message_of(
    row: Row,
    field: str,
    value: object,
    speaker_keys: tuple[str, ...],
    content_keys: tuple[str, ...],
    speakers: Mapping[str, Speaker],
) -> Message:
    """One object of a speaker and a text; arguments as of `conversation`."""
    if not isinstance(value, dict):
        names = f"{speaker_keys[-1]} and {content_keys[-1]}"
        raise row.fault(field, f"found {shown(value)}; expected an object with {names}")
    key = next((key for key in speaker_keys if key in value), speaker_keys[-1])
    speaker = value.get(key)
    if not isinstance(speaker, str) or speaker not in speakers:
        found = (
            f"found {shown(speaker)}"
            if key in value
            else f"is missing; the message has {listed(value)}"
        )
        raise row.fault(f"{field}.{key}", f"{found}; expected {', '.join(map(repr, speakers))}")
    text = next((key for key in content_keys if key in value), content_keys[-1])
    if len(value) > 2:
        _count_others(row, field, value, {key, text})
    return Message(speakers[speaker], checked_text(row, f"{field}.{text}", value.get(text)))


def _count_others(row: Row, field: str, message: Json, read: set[str]) -> None:
    """Counts what else a message says, and refuses calls of tools, which its text needs."""
    others = {key for key, value in message.items() if value is not None} - read
    for key in _CALLS:
        if message.get(key):
            raise row.fault(f"{field}.{key}", "calls of tools are not read; remove the row")
    if message.get("weight") == 1:  # what a message without a weight has
        others.discard("weight")
    if others.difference(_IN_MESSAGE, _CALLS):
        row.log.coerce("other keys of a message left out, such as a name")


def behind_system(row: Row, key: str, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns behind the row's `key`, if it has one, as the system message."""
    if row.values.get(key) in (None, ""):
        return turns
    if turns[0].speaker is Speaker.SYSTEM:
        raise row.fault(key, "messages begin with a system message already; keep one of the two")
    return (Message(Speaker.SYSTEM, row.text(key)), *turns)


def _hoisted(row: Row) -> Row:
    """The row with candidates and choice at the top level, where the last message has them."""
    messages = row.values.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or not any(key in last for key in _IN_MESSAGE):
        return row
    twice = [key for key in _IN_MESSAGE if key in last and key in row.values]
    if twice:
        raise row.fault(twice[0], "stands at the top level and in the last message; keep one")
    row.log.coerce("candidates and choice read from the last message")
    inner = {key: last[key] for key in _IN_MESSAGE if key in last}
    return replace(row, values={**row.values, **inner})


def _choice(row: Row) -> Choice:
    value = row.value("choice")
    if isinstance(value, bool) or value not in (0, 1, "tie") or isinstance(value, float):
        found = "is missing" if "choice" not in row.values else f"found {shown(value)}"
        raise row.fault(
            "choice", f'{found}; expected 0 or 1 (a number, the preferred candidate) or "tie"'
        )
    return Choice(value)


def _strength(row: Row) -> int | None:
    strength = row.value("strength")
    if strength is None:
        return None
    if isinstance(strength, bool) or not isinstance(strength, int) or not 1 <= strength <= 9:
        raise row.fault("strength", f"found {shown(strength)}; expected a whole number from 1 to 9")
    if choice_of_strength(strength) is not _choice(row):
        raise row.fault(
            "strength",
            f"{strength} contradicts choice {shown(row.values['choice'])}: 1 to 4 prefer "
            "candidate_0, 5 is a tie, 6 to 9 prefer candidate_1; correct one of them",
        )
    return strength


def choice_of_strength(strength: int) -> Choice:
    """What a strength of 1 to 9 says of the choice."""
    if strength == 5:
        return Choice.TIE
    return Choice.FIRST if strength < 5 else Choice.SECOND


# Writing --------------------------------------------------------------------------------------


def prompt_to_row(prompt: Prompt) -> Json:
    """The row that is read back as an equal prompt, `meta` at the top level.

    Raises:
        DataError: `meta` has a key that the row needs for itself.
    """
    return _row(prompt, PROMPT_KEYS, {})


def demonstration_to_row(demonstration: Demonstration) -> Json:
    """The row that is read back as an equal demonstration.

    Raises:
        DataError: `prompt.meta` has a key that the row needs for itself.
    """
    own = {"output_text": demonstration.output_text}
    return _row(demonstration.prompt, DEMONSTRATION_KEYS, own)


def preference_to_row(preference: Preference) -> Json:
    """The row that is read back as an equal preference.

    Raises:
        DataError: `prompt.meta` has a key that the row needs for itself.
    """
    optional = {
        "weight": None if preference.weight == 1.0 else preference.weight,
        "margin": preference.margin,
        "annotator": preference.annotator,
        "strength": preference.strength,
    }
    own: Json = {
        "candidate_0": preference.candidate_0,
        "candidate_1": preference.candidate_1,
        "choice": preference.choice.value,
    }
    own |= {key: value for key, value in optional.items() if value is not None}
    return _row(preference.prompt, PREFERENCE_KEYS, own)


def messages_to_list(messages: tuple[Message, ...], speaker_key: str = "role") -> list[Json]:
    """Messages as JSON objects."""
    return [{speaker_key: turn.speaker.value, "content": turn.content} for turn in messages]


def _row(prompt: Prompt, reserved: frozenset[str], own: Json) -> Json:
    """`id`, `group`, the conversation, the kind's own keys, then the prompt's meta."""
    clash = sorted(reserved & set(prompt.meta))
    if clash:
        raise DataError(
            f"row {prompt.id!r}: meta may not hold {clash[0]!r}, a key of the row itself; rename it"
        )
    row: Json = {"id": prompt.id, "group": prompt.group}
    if [message.speaker for message in prompt.messages] == [Speaker.USER]:
        row["input_text"] = prompt.text
    else:
        row["messages"] = messages_to_list(prompt.messages)
    return {**row, **own, **prompt.meta}


def _fits(values: Mapping[str, Any]) -> bool:
    if any(key in values for key in _OWN):
        return True
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return "messages" in values
    last = messages[-1]
    return "candidate_0" in last or last.get("author", last.get("role")) != "assistant"


def kind_of(values: Json) -> Kind:
    """The kind of rows of a native record, by its keys."""
    messages = values.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    pair = ("candidate_0", "candidate_1", "choice")
    if has_any(values, *pair) or (isinstance(last, dict) and has_any(last, *pair)):
        return "preferences"
    return "demonstrations" if has_any(values, "output_text") else "prompts"


NATIVE = Format(
    name="native",
    description="input_text or messages; output_text; candidate_0, candidate_1, choice",
    fits=_fits,
    kind_of=kind_of,
    demonstrations=demonstrations,
    preferences=preferences,
    prompts=prompts,
    write_demonstration=lambda row: [demonstration_to_row(row)],
    write_preference=lambda row: [preference_to_row(row)],
    write_prompt=lambda row: [prompt_to_row(row)],
    holds=EVERYTHING,
)
