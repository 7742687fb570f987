"""Conversations with the answer in them: ShareGPT's, OpenAI's and Google's shapes.

    sharegpt            {"conversations": [{from, value}, …], system?, chosen?, rejected?}
    openai-messages     {"messages": [{role or author, content}, …], context?}
    openai-preference   {"input": {"messages": […]}, "preferred_output": [one message],
                         "non_preferred_output": [one message]}

Of a conversation that ends with the assistant, the last answer is the demonstration and all that
goes before is its prompt: earlier answers are context, not something to learn. An answer of
`weight` 0 is not to be learnt and makes no demonstration. Tools and images are not read.

Sources: https://github.com/hiyouga/LLaMA-Factory (data/README.md);
https://developers.openai.com/api/docs/guides/direct-preference-optimization (also Azure's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from amenable.data.formats.fields import checked_object, has_any
from amenable.data.formats.format import Format, Kind
from amenable.data.formats.native import (
    behind_system,
    conversation,
    message_of,
    messages_to_list,
    preference_of,
    prompt_of,
)
from amenable.data.reading.json_records import Json
from amenable.data.reading.records import Row
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker

Turns = tuple[Message, ...]

_IDS = frozenset({"id", "group"})
_OPTIONAL = frozenset({"weight", "margin", "annotator"})
_HOLDS = frozenset({"system message", "turns before the last", "which two answers were compared"})


def split_last(row: Row, field: str, turns: Turns) -> tuple[Turns, str]:
    """What goes before the assistant's last message, and that message."""
    if turns[-1].speaker is not Speaker.ASSISTANT:
        raise row.fault(
            field,
            f"the last message is the {turns[-1].speaker}'s; expected the assistant's answer",
        )
    return ending_with_user(row, field, turns[:-1]), turns[-1].content


def ending_with_user(row: Row, field: str, turns: Turns) -> Turns:
    """The turns, if the last is the user's."""
    if not turns or turns[-1].speaker is not Speaker.USER:
        found = f"is the {turns[-1].speaker}'s" if turns else "is missing"
        raise row.fault(field, f"the message to be answered {found}; expected the user's")
    return turns


def _is_learnt(row: Row, key: str) -> bool:
    """Whether the last message has a weight other than 0, counted if not."""
    if row.values[key][-1].get("weight") != 0:
        return True
    row.log.drop("an answer of weight 0, which is not to be learnt")
    return False


def _asked(row: Row, field: str, turns: Turns) -> Turns:
    """The turns without an answer at the end."""
    answered = turns[-1].speaker is Speaker.ASSISTANT
    return ending_with_user(row, field, turns[:-1] if answered else turns)


# ShareGPT -------------------------------------------------------------------------------------

_FROM = {
    "human": Speaker.USER,
    "user": Speaker.USER,
    "gpt": Speaker.ASSISTANT,
    "assistant": Speaker.ASSISTANT,
    "system": Speaker.SYSTEM,
}
_SAYS = {Speaker.USER: "human", Speaker.ASSISTANT: "gpt", Speaker.SYSTEM: "system"}
_SHAREGPT_KEYS = _IDS | {"conversations", "system"}
_SHAREGPT_PAIR_KEYS = _SHAREGPT_KEYS | _OPTIONAL | {"chosen", "rejected"}


def sharegpt_preferences(row: Row) -> Iterator[Preference]:
    """A conversation that ends with the human, and two answers to it."""
    turns = ending_with_user(row, "conversations", _conversations(row))
    sides = [_one_answer(row, key) for key in ("chosen", "rejected")]
    if sides[0] == sides[1]:
        raise row.fault("rejected", "equals chosen, so that the pair says nothing; remove the row")
    prompt = prompt_of(row, _SHAREGPT_PAIR_KEYS, turns)
    yield preference_of(row, prompt, sides[0], sides[1], Choice.FIRST)


def sharegpt_demonstrations(row: Row) -> Iterator[Demonstration]:
    """The last answer of a conversation."""
    before, answer = split_last(row, "conversations", _conversations(row))
    if _is_learnt(row, "conversations"):
        yield Demonstration(prompt=prompt_of(row, _SHAREGPT_KEYS, before), output_text=answer)


def sharegpt_prompts(row: Row) -> Iterator[Prompt]:
    """A conversation without an answer at its end."""
    turns = _asked(row, "conversations", _conversations(row))
    yield prompt_of(row, _SHAREGPT_PAIR_KEYS, turns)


def _conversations(row: Row) -> Turns:
    turns = conversation(
        row,
        "conversations",
        row.values.get("conversations"),
        speaker_keys=("role", "from"),
        content_keys=("content", "value"),
        speakers=_FROM,
    )
    return behind_system(row, "system", turns)


def _one_answer(row: Row, key: str) -> str:
    value = row.values.get(key)
    message = message_of(row, key, value, ("role", "from"), ("content", "value"), _FROM)
    if message.speaker is not Speaker.ASSISTANT:
        raise row.fault(f"{key}.from", f"is the {message.speaker}; expected 'gpt'")
    return message.content


def _said(turns: Turns) -> list[Json]:
    return [{"from": _SAYS[turn.speaker], "value": turn.content} for turn in turns]


def _sharegpt_kind(values: Json) -> Kind:
    if has_any(values, "chosen", "rejected"):
        return "preferences"
    turns = values.get("conversations")
    last = turns[-1:] if isinstance(turns, list) else []
    said = last[0] if last and isinstance(last[0], dict) else {}
    ends = _FROM.get(str(said.get("from", said.get("role"))))
    return "prompts" if ends is Speaker.USER else "demonstrations"


SHAREGPT = Format(
    name="sharegpt",
    description="conversations [{from, value}]; chosen, rejected {from, value}",
    fits=lambda values: isinstance(values.get("conversations"), list),
    kind_of=_sharegpt_kind,
    demonstrations=sharegpt_demonstrations,
    preferences=sharegpt_preferences,
    prompts=sharegpt_prompts,
    write_demonstration=lambda row: [
        {
            "conversations": [
                *_said(row.prompt.messages),
                *_said((Message(Speaker.ASSISTANT, row.output_text),)),
            ]
        }
    ],
    write_preference=lambda row: [
        {
            "conversations": _said(row.prompt.messages),
            "chosen": {"from": "gpt", "value": row.chosen},
            "rejected": {"from": "gpt", "value": row.rejected},
        }
    ],
    write_prompt=lambda prompt: [{"conversations": _said(prompt.messages)}],
    holds=_HOLDS,
)


# OpenAI and Google: supervised ----------------------------------------------------------------

_MESSAGES_KEYS = _IDS | {"messages", "context"}


def message_demonstrations(row: Row) -> Iterator[Demonstration]:
    """The last answer of `messages`, behind `context` as the system message."""
    before, answer = split_last(row, "messages", _messages(row))
    if _is_learnt(row, "messages"):
        yield Demonstration(prompt=prompt_of(row, _MESSAGES_KEYS, before), output_text=answer)


def message_prompts(row: Row) -> Iterator[Prompt]:
    """`messages` without an answer at their end."""
    yield prompt_of(row, _MESSAGES_KEYS, _asked(row, "messages", _messages(row)))


def _messages(row: Row) -> Turns:
    return behind_system(row, "context", conversation(row, "messages", row.values.get("messages")))


def _ends_with_assistant(values: Json) -> bool:
    messages = values.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("author", last.get("role")) == "assistant"


OPENAI_MESSAGES = Format(
    name="openai-messages",
    description="messages [{role or author, content}] that end with the assistant; context?",
    fits=lambda values: (
        _ends_with_assistant(values)
        and not has_any(values, "input_text", "output_text", "candidate_0", "candidate_1")
        and not has_any(values, "chosen", "rejected")
    ),
    demonstrations=message_demonstrations,
    prompts=message_prompts,
    write_demonstration=lambda row: [
        {
            "messages": messages_to_list(
                (*row.prompt.messages, Message(Speaker.ASSISTANT, row.output_text))
            )
        }
    ],
    holds=_HOLDS - {"which two answers were compared"},
)


# OpenAI and Azure: preferences ----------------------------------------------------------------

_SIDES = ("preferred_output", "non_preferred_output")
_PAIR_KEYS = _IDS | _OPTIONAL | {"input", *_SIDES}


def pair_preferences(row: Row) -> Iterator[Preference]:
    """The messages of `input`, and one answer on each side."""
    turns = _input(row)
    sides = [_output(row, key) for key in _SIDES]
    if sides[0] == sides[1]:
        raise row.fault(
            _SIDES[1], f"equals {_SIDES[0]}, so that the pair says nothing; remove the row"
        )
    prompt = prompt_of(row, _PAIR_KEYS, turns)
    yield preference_of(row, prompt, sides[0], sides[1], Choice.FIRST)


def pair_prompts(row: Row) -> Iterator[Prompt]:
    """The messages of `input`."""
    yield prompt_of(row, _PAIR_KEYS, _input(row))


def _input(row: Row) -> Turns:
    values = checked_object(row, "input", row.values.get("input"))
    turns = conversation(row, "input.messages", values.get("messages"))
    return ending_with_user(row, "input.messages", turns)


def _output(row: Row, key: str) -> str:
    turns = conversation(row, key, row.values.get(key))
    if len(turns) != 1 or turns[0].speaker is not Speaker.ASSISTANT:
        raise row.fault(key, f"found {len(turns)} messages; expected one, of the assistant")
    return turns[0].content


def _spoken(text: str) -> list[dict[str, Any]]:
    return messages_to_list((Message(Speaker.ASSISTANT, text),))


OPENAI_PREFERENCE = Format(
    name="openai-preference",
    description="input {messages}, preferred_output, non_preferred_output (also Azure's)",
    fits=lambda values: isinstance(values.get("input"), dict) and has_any(values, *_SIDES),
    preferences=pair_preferences,
    prompts=pair_prompts,
    write_preference=lambda row: [
        {
            "input": {"messages": messages_to_list(row.prompt.messages)},
            _SIDES[0]: _spoken(row.chosen),
            _SIDES[1]: _spoken(row.rejected),
        }
    ],
    holds=_HOLDS,
)
