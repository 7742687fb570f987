"""Checks of the tokenizer and its chat template on a conversation of our own, without any row."""

from __future__ import annotations

from typing import Any

from amenable.data.render import Renderer
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.data.tokens.checks import Json, finding

_QUESTION = Prompt(messages=(Message(Speaker.USER, "Which way?"),), id="probe", group="probe")
_ANSWER = "This way."


def tokenizer_facts(renderer: Renderer) -> Json:
    """The special tokens that matter to training, by name, and what pad coincides with."""
    tokenizer = renderer.tokenizer
    eos = sorted(renderer.eos_ids)
    named = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id}
    return {
        "tokens": len(tokenizer),
        "chat_template": renderer.templated,
        "pad": _token(renderer, tokenizer.pad_token_id),
        "eos": [_token(renderer, number) for number in eos],
        "trained_eos": _token(renderer, tokenizer.eos_token_id),
        "bos": _token(renderer, tokenizer.bos_token_id),
        "unk": _token(renderer, tokenizer.unk_token_id),
        "adds_bos": adds_bos(renderer),
        "pad_is": [
            name
            for name, number in named.items()
            if number is not None and number == tokenizer.pad_token_id
        ],
    }


def adds_bos(renderer: Renderer) -> bool:
    """Whether the tokenizer itself puts a beginning-of-sequence token before plain text."""
    bos = renderer.tokenizer.bos_token_id
    return bos is not None and list(renderer.tokenizer("a")["input_ids"])[:1] == [bos]


def tokenizer_findings(renderer: Renderer) -> list[Json]:
    """What is wrong with the tokenizer or its template, whatever the rows are."""
    tokenizer = renderer.tokenizer
    if tokenizer.eos_token_id is None:
        return [_found("eos_missing")]
    found = []
    if tokenizer.eos_token_id not in renderer.eos_ids:
        found.append(_found("eos_not_stopping", _name(renderer, tokenizer.eos_token_id)))
    if tokenizer.pad_token_id == tokenizer.bos_token_id:
        found.append(_found("pad_is_bos", _name(renderer, tokenizer.pad_token_id)))
    if renderer.templated:
        found += _template_findings(renderer)
    return found


def _template_findings(renderer: Renderer) -> list[Json]:
    found = []
    if "strftime_now" in str(renderer.tokenizer.chat_template):
        found.append(_found("template_date"))
    from jinja2 import TemplateError

    turns = renderer.messages(_QUESTION)
    try:
        prompt = _apply(renderer, turns, add_generation_prompt=True)
        asked = _apply(renderer, turns)
        answered = _apply(renderer, [*turns, Message(Speaker.ASSISTANT, _ANSWER)])
    except TemplateError:
        return found  # the rows will say so, with their ids
    header = answered[len(asked) : answered.find(_ANSWER)] if answered.startswith(asked) else ""
    if prompt == asked and header.strip():
        return [*found, _found("no_generation_prompt", repr(header))]
    if not answered.startswith(prompt + _ANSWER):
        start = len(asked) if answered.startswith(asked) else 0
        detail = f"{answered[start:]!r} against {(prompt + _ANSWER)[start:]!r}"
        return [*found, _found("template_boundary", detail)]
    end = renderer.encode_all([answered[len(prompt + _ANSWER) :].lstrip()])[0]
    if end and end[0] not in renderer.eos_ids:
        found.append(_found("end_of_turn", _name(renderer, end[0])))
    return found


def _apply(renderer: Renderer, turns: list[Message], *, add_generation_prompt: bool = False) -> str:
    messages = [{"role": str(turn.speaker), "content": turn.content} for turn in turns]
    return str(
        renderer.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _found(name: str, detail: str = "") -> Json:
    return finding(name, "tokenizer", (), 1, detail=detail)


def _name(renderer: Renderer, number: int) -> str:
    return repr(str(renderer.tokenizer.convert_ids_to_tokens(number)))


def _token(renderer: Renderer, number: Any) -> Json | None:
    if number is None:
        return None
    return {"id": int(number), "token": str(renderer.tokenizer.convert_ids_to_tokens(int(number)))}
