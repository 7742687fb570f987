"""What Google Cloud's pipeline components read, for writing: needed keys only, nothing else.

    gcpc        {"input_text", "candidate_0", "candidate_1", "choice"}
    gcpc-chat   {"context"?, "messages": [{author, content}, …], "candidate_0", …}

Both are read as native rows, which they are; a supervised chat ends with the assistant's message.
Ties are refused: the pipeline drops them. Chats begin with the user, and only a system message that
stands first can be written, as `context`.
"""

from __future__ import annotations

from amenable.data.formats import chats, native
from amenable.data.formats.format import Format, Typed
from amenable.data.reading.json_records import Json
from amenable.data.schemas import Message, Preference, Prompt, Speaker

_PAIR = frozenset({"order of the candidates", "which two answers were compared"})


def _candidates(row: Preference) -> Json:
    sides = {"candidate_0": row.candidate_0, "candidate_1": row.candidate_1}
    return {**sides, "choice": row.choice.value}


def prediction_row(instruction: str, input_text: str, completion: str) -> Json:
    """A row of bulk inference, as its pipelines write it: what was asked, what was said."""
    asked = f"{instruction}\n\n{input_text}" if instruction else input_text
    inputs = {"inputs_pretokenized": asked, "targets_pretokenized": ""}
    return {"inputs": inputs, "prediction": completion}


def _chat(prompt: Prompt, answer: str | None = None) -> Json:
    turns = prompt.messages
    context = {}
    if turns[0].speaker is Speaker.SYSTEM:
        context, turns = {"context": turns[0].content}, turns[1:]
    if answer is not None:
        turns = (*turns, Message(Speaker.ASSISTANT, answer))
    return {**context, "messages": native.messages_to_list(turns, "author")}


def _refuses_chat(row: Typed) -> str:
    prompt = row if isinstance(row, Prompt) else row.prompt
    turns = prompt.messages[prompt.messages[0].speaker is Speaker.SYSTEM :]
    if any(turn.speaker is Speaker.SYSTEM for turn in turns):
        return "a system message that does not stand first"
    if turns[0].speaker is not Speaker.USER:
        return "a conversation that does not begin with the user"
    return ""


GCPC = Format(
    name="gcpc",
    description="native, needed keys only: what Google Cloud's pipelines read of text models",
    fits=lambda values: False,
    demonstrations=native.demonstrations,
    preferences=native.preferences,
    prompts=native.prompts,
    kind_of=native.kind_of,
    write_demonstration=lambda row: [
        {"input_text": row.prompt.text, "output_text": row.output_text}
    ],
    write_preference=lambda row: [{"input_text": row.prompt.text, **_candidates(row)}],
    write_prompt=lambda prompt: [{"input_text": prompt.text}],
    holds=_PAIR,
)

GCPC_CHAT = Format(
    name="gcpc-chat",
    description="context?, messages [{author, content}]: the same of their chat models",
    fits=lambda values: False,
    demonstrations=chats.message_demonstrations,
    preferences=native.preferences,
    prompts=native.prompts,
    kind_of=native.kind_of,
    write_demonstration=lambda row: [_chat(row.prompt, row.output_text)],
    write_preference=lambda row: [{**_chat(row.prompt), **_candidates(row)}],
    write_prompt=lambda prompt: [_chat(prompt)],
    holds=_PAIR | {"system message", "turns before the last"},
    refuses=_refuses_chat,
)
