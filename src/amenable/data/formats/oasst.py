"""Open Assistant's trees: a prompt, replies to it, replies to these, ranked among siblings.

    {"message_tree_id", "prompt": {"message_id", "text", "role": "prompter", "replies": [
        {"text", "role": "assistant", "rank": 0, "deleted", "review_result", "replies": […]}, …]}}

Volunteers ranked the assistant's replies to each message of the prompter: 0 is the best. Every
message with ranked replies is one ranking, with the way to it as the conversation. The tree is the
group. Left out and counted: messages that were deleted or failed review, with all that follows
them, and replies without a rank.

Source: https://github.com/LAION-AI/Open-Assistant (docs of the export format)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from amenable.data.formats.fields import checked_object, text_in
from amenable.data.formats.format import Format
from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import shown
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Speaker,
    messages_key,
)

_SPEAKERS = {"prompter": Speaker.USER, "assistant": Speaker.ASSISTANT}

Ranked = list[tuple[int, str]]
"""Rank and text of each reply that has a rank, best first."""


def rankings(row: Row) -> Iterator[Ranking]:
    """The ranked replies to each message that has two or more."""
    for prompt, ranked in _asked(row, count=True):
        if len(ranked) == 1:
            row.log.drop("the only ranked reply to its message, so that it makes no pair")
        if len(ranked) > 1:
            yield Ranking(
                prompt=prompt,
                answers=tuple(text for _, text in ranked),
                scores=tuple(-float(rank) for rank, _ in ranked),
                rated=False,
            )


def demonstrations(row: Row) -> Iterator[Demonstration]:
    """The best-ranked reply to each message that has one."""
    for prompt, ranked in _asked(row, count=True):
        if ranked:
            yield Demonstration(prompt=prompt, output_text=ranked[0][1])


def prompts(row: Row) -> Iterator[Prompt]:
    """Every message of the prompter, with what goes before it."""
    for prompt, _ in _asked(row, count=False):
        yield prompt


def _asked(row: Row, *, count: bool) -> Iterator[tuple[Prompt, Ranked]]:
    """Each message of the prompter as a prompt, with its ranked replies; parents before children.

    Args:
        row: one tree.
        count: whether replies without a rank are counted as left out.
    """
    tree = row.name("message_tree_id")
    open_messages: list[tuple[str, Any, tuple[Message, ...]]] = [
        ("prompt", row.values.get("prompt"), ())
    ]
    while open_messages:
        field, value, before = open_messages.pop()
        values = checked_object(row, field, value)
        if not _is_kept(row, values):
            continue
        history = (*before, _message(row, field, values))
        replies = _replies(row, field, values)
        open_messages += [(place, reply, history) for place, reply in reversed(replies)]
        if history[-1].speaker is Speaker.USER:
            yield _prompt(row, field, values, tree, history), _ranked(row, replies, count)


def _is_kept(row: Row, values: Json) -> bool:
    """Whether the message was neither deleted nor refused by its reviewers, counted if it was."""
    if values.get("deleted"):
        row.log.drop("a deleted message, with all that follows it")
        return False
    if not values.get("review_result", True):
        row.log.drop("a message that failed review or had none, with all that follows it")
        return False
    return True


def _message(row: Row, field: str, values: Json) -> Message:
    role = values.get("role")
    if not isinstance(role, str) or role not in _SPEAKERS:
        raise row.fault(
            f"{field}.role", f"found {shown(role)}; expected {' or '.join(map(repr, _SPEAKERS))}"
        )
    return Message(_SPEAKERS[role], text_in(row, f"{field}.text", values))


def _replies(row: Row, field: str, values: Json) -> list[tuple[str, Any]]:
    """Where each reply stands, and the reply."""
    replies = values.get("replies")
    if replies is None:
        return []
    if not isinstance(replies, list):
        raise row.fault(f"{field}.replies", f"found {shown(replies)}; expected a list")
    return [(f"{field}.replies[{place}]", reply) for place, reply in enumerate(replies)]


def _prompt(
    row: Row, field: str, values: Json, tree: str | None, history: tuple[Message, ...]
) -> Prompt:
    name = values.get("message_id")
    lang = {"lang": values["lang"]} if values.get("lang") is not None else {}
    return Prompt(
        messages=history,
        id=name if isinstance(name, str) and name else f"{row.label}:{row.line}:{field}",
        group=tree or messages_key(history[:1]),
        meta=lang,
    )


def _ranked(row: Row, replies: list[tuple[str, Any]], count: bool) -> Ranked:
    ranked: Ranked = []
    for field, reply in replies:
        values = checked_object(row, field, reply)
        if values.get("deleted") or not values.get("review_result", True):
            continue  # counted where its own turn comes
        message, rank = _message(row, field, values), values.get("rank")
        if message.speaker is not Speaker.ASSISTANT:
            continue
        if rank is None:
            if count:
                row.log.drop("a reply without a rank")
            continue
        if isinstance(rank, bool) or not isinstance(rank, int) or abs(rank) > 10**6:
            raise row.fault(f"{field}.rank", f"found {shown(rank)}; expected a whole number")
        ranked.append((rank, message.content))
    return sorted(ranked, key=lambda entry: entry[0])


OASST = Format(
    name="oasst",
    description="message_tree_id, prompt {text, role, replies [{text, role, rank, replies}]}",
    fits=lambda values: isinstance(values.get("prompt"), dict) and "text" in values["prompt"],
    rankings=rankings,
    demonstrations=demonstrations,
    prompts=prompts,
    kind_of=lambda values: "preferences",
)
