r"""OpenAI's human feedback on summaries: comparisons of two, and ratings of one ("axis evals").

    openai-summarize   {"info": {id, post, title, subreddit} or {id, site, title, article},
                        "summaries": [{text, policy, note}, {…}], "choice": 0 or 1, "worker",
                        "batch", "split", "extra": {"confidence": 1 … 9}}
    openai-axis        {"info": {…}, "summary": {text, policy, note, "axes": {"overall": 1 … 7, …}},
                        "worker", "batch", "split"}

The prompt is the query that the authors' models were given: "SUBREDDIT: r/…\n\nTITLE: …\n\n
POST: …\n\nTL;DR:" of a post with title and subreddit, "Article:\n…\n\nTL;DR:\n" of an article,
else the post alone. `worker` is the annotator; `confidence` runs from 1 (the first summary, sure)
to 9 (the second, sure) and is the strength. 5 says undecided although one was chosen: it stays in
`extra` and makes no strength. What is not part of the query stays in meta as it stood.

Source: https://github.com/openai/summarize-from-feedback (README, utils/experiment_helpers.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from amenable.data.formats.fields import (
    checked_list,
    checked_number,
    checked_object,
    has,
    text_in,
)
from amenable.data.formats.format import Format
from amenable.data.formats.native import choice_of_strength, preference_of, prompt_of
from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import shown
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Answer,
    Choice,
    Message,
    Preference,
    Prompt,
    Speaker,
)
from amenable.errors import DataError

_KEYS = frozenset({"group", "info", "summary", "summaries", "choice", "worker", "extra"})
_PAIR_KEYS = _KEYS | {"id", "weight", "margin"}
_ARTICLE = ("Article:\n", "\n\nTL;DR:\n")
_UNDECIDED = 5


def preferences(row: Row) -> Iterator[Preference]:
    """Two summaries and which one the worker chose."""
    pair = checked_list(row, "summaries", row.values.get("summaries"), length=2)
    summaries = [
        checked_object(row, f"summaries[{place}]", value) for place, value in enumerate(pair)
    ]
    texts = [
        text_in(row, f"summaries[{place}].text", value) for place, value in enumerate(summaries)
    ]
    if texts[0] == texts[1]:
        raise row.fault(
            "summaries", "the two texts are equal, so that a choice says nothing; remove the row"
        )
    choice = _choice(row)
    strength, extra = _strength(row, choice)
    prompt = _prompt(row, _PAIR_KEYS)
    about = [_without(value, "text") for value in summaries]
    meta = {**prompt.meta, **({"summaries": about} if any(about) else {})}
    meta |= {"extra": extra} if extra else {}
    found = preference_of(
        row, replace(prompt, meta=meta), texts[0], texts[1], choice, strength=strength
    )
    yield replace(found, annotator=row.name("worker"))


def answers(row: Row) -> Iterator[Answer]:
    """One summary and its overall rating, 1 to 7."""
    summary = checked_object(row, "summary", row.values.get("summary"))
    text = text_in(row, "summary.text", summary)
    axes = checked_object(row, "summary.axes", summary.get("axes"))
    score = checked_number(row, "summary.axes.overall", axes.get("overall"))
    yield Answer(prompt=_prompt(row, _KEYS), text=text, score=score)


def prompts(row: Row) -> Iterator[Prompt]:
    """The query."""
    yield _prompt(row, _PAIR_KEYS)


def _prompt(row: Row, known: frozenset[str]) -> Prompt:
    info = checked_object(row, "info", row.values.get("info"))
    text, key = _query(row, info)
    named = replace(row, values={**row.values, "group": row.values.get("group", info.get("id"))})
    prompt = prompt_of(named, known, (Message(Speaker.USER, text),))
    about = _without(info, key, *(("id",) if prompt.group == info.get("id") else ()))
    return replace(prompt, meta={**prompt.meta, **({"info": about} if about else {})})


def _query(row: Row, info: Json) -> tuple[str, str]:
    """The prompt's text, and the key of `info` that its document stands under."""
    key = "article" if has(info, "article") else "post"
    document = text_in(row, f"info.{key}", info)
    before, after = _ARTICLE if key == "article" else _post(info)
    return f"{before}{document}{after}", key


def _post(info: Mapping[str, Any]) -> tuple[str, str]:
    """What the query has before and behind a post."""
    title, subreddit = info.get("title"), info.get("subreddit")
    if not isinstance(title, str) or not isinstance(subreddit, str):
        return "", ""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: ", "\n\nTL;DR:"


def _choice(row: Row) -> Choice:
    value = row.value("choice")
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        found = "is missing" if "choice" not in row.values else f"found {shown(value)}"
        raise row.fault("choice", f"{found}; expected 0 or 1 (the chosen summary)")
    return Choice(value)


def _strength(row: Row, choice: Choice) -> tuple[int | None, Json]:
    """The confidence as a strength, and the rest of `extra`."""
    given = row.values.get("extra")
    extra = {} if given is None else checked_object(row, "extra", given)
    confidence = extra.get("confidence")
    if confidence is None:
        return None, extra
    whole = isinstance(confidence, int) and not isinstance(confidence, bool)
    if not whole or not 1 <= confidence <= 9:
        raise row.fault(
            "extra.confidence", f"found {shown(confidence)}; expected a whole number from 1 to 9"
        )
    if confidence == _UNDECIDED:
        row.log.coerce("confidence 5 (undecided) beside a choice: kept in meta, no strength")
        return None, extra
    if choice_of_strength(confidence) is not choice:
        raise row.fault(
            "extra.confidence",
            f"{confidence} contradicts choice {choice.value}: 1 to 4 prefer the first summary, "
            "6 to 9 the second; correct one of them or remove the row",
        )
    return confidence, _without(extra, "confidence")


def _without(values: Json, *keys: str) -> Json:
    return {key: value for key, value in values.items() if key not in keys}


# Writing --------------------------------------------------------------------------------------


def _preference(row: Preference) -> list[Json]:
    meta = dict(row.prompt.meta)
    about = meta.pop("summaries", [{}, {}])
    extra = meta.pop("extra", {})
    objects = isinstance(about, list) and len(about) == 2 and isinstance(extra, dict)
    if not objects or not all(isinstance(entry, dict) for entry in about):
        raise DataError("meta has summaries or extra of another shape than the format's")
    if row.strength is not None:
        extra = {**extra, "confidence": row.strength}
    texts = (row.candidate_0, row.candidate_1)
    optional = {"weight": None if row.weight == 1.0 else row.weight, "margin": row.margin}
    return [
        {
            **_info(row.prompt, meta.pop("info", {})),
            "summaries": [
                {"text": text, **entry} for text, entry in zip(texts, about, strict=True)
            ],
            "choice": row.choice.value,
            "worker": row.annotator,
            **meta,
            **({"extra": extra} if extra else {}),
            **{key: value for key, value in optional.items() if value is not None},
        }
    ]


def _info(prompt: Prompt, about: object) -> Json:
    """`info` with the document taken out of the query again, and `group` where it has another."""
    if not isinstance(about, dict):
        raise DataError("meta has an info of another shape than the format's")
    text, key = prompt.text, "post"
    before, after = _post(about)
    if text.startswith(_ARTICLE[0]) and text.endswith(_ARTICLE[1]) and not before:
        key, (before, after) = "article", _ARTICLE
    if not (text.startswith(before) and text.endswith(after)):
        raise DataError("the prompt is no longer the query of its title and subreddit")
    info = {"id": prompt.group, key: text[len(before) : len(text) - len(after)], **about}
    return {"info": info, **({"group": prompt.group} if "id" in about else {})}


# Table ----------------------------------------------------------------------------------------

SUMMARIZE = Format(
    name="openai-summarize",
    description="info {post, title, subreddit} or {article}, summaries (two), choice, worker",
    fits=lambda values: isinstance(values.get("info"), dict) and "summaries" in values,
    preferences=preferences,
    prompts=prompts,
    write_preference=_preference,
    holds=frozenset(
        {
            "order of the candidates",
            "which two answers were compared",
            "group",
            "weight",
            "margin",
            "annotator",
            "strength",
            "other keys",
        }
    ),
)

AXIS = Format(
    name="openai-axis",
    description="info, summary {text, axes {overall}}: ratings of single summaries",
    fits=lambda values: (
        isinstance(values.get("info"), dict)
        and isinstance(values.get("summary"), dict)
        and "summaries" not in values
    ),
    answers=answers,
    prompts=prompts,
    rated=True,
)
