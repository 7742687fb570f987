"""Answers with ratings: UltraFeedback (several a record) and HelpSteer (one a record, or two).

    ultrafeedback            {"instruction" or "prompt", "completions": [{response, score}, …]}
    ultrafeedback-binarized  {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}
    helpsteer                {"prompt", "response", "helpfulness", …}: rows of one prompt compared
    helpsteer-preference     {"prompt", "response_1", "response_2", "preference_strength": -3 … 3}

Margins are differences of the ratings, in their unit. Of UltraFeedback the score is the first of
`overall_score`, `fine-grained_score`, `score` and `rating` that an answer of the record has; an
answer without it ("N/A") is left out and counted. Equal scores of the binarised shape, whose
publishers then drew the rejected answer, are read as a tie.

Sources: https://huggingface.co/datasets/openbmb/UltraFeedback,
HuggingFaceH4/ultrafeedback_binarized, nvidia/HelpSteer2 (their cards).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from amenable.data.formats import trl
from amenable.data.formats.fields import (
    checked_list,
    checked_number,
    checked_object,
    checked_text,
    has,
    has_any,
    is_text,
    whole,
)
from amenable.data.formats.format import Format
from amenable.data.formats.native import choice_of_strength, preference_of, prompt_of
from amenable.data.reading.read_log import listed, shown
from amenable.data.reading.records import Row
from amenable.data.schemas import (
    Answer,
    Choice,
    Message,
    Preference,
    Prompt,
    Ranking,
    Speaker,
)

# UltraFeedback --------------------------------------------------------------------------------

_TEXTS = ("response", "text", "completion")
_SCORES = ("overall_score", "fine-grained_score", "score", "rating")
_NO_SCORE = (None, "", "N/A")


def rankings(row: Row) -> Iterator[Ranking]:
    """The answers of one record by their scores."""
    given = checked_list(row, "completions", row.values.get("completions"))
    fields = [f"completions[{place}]" for place in range(len(given))]
    answers = [checked_object(row, *pair) for pair in zip(fields, given, strict=True)]
    key = next((key for key in _SCORES if any(key in values for values in answers)), None)
    if key is None:
        raise row.fault(
            "completions[0]", f"has {listed(answers[0])}; expected one of {', '.join(_SCORES)}"
        )
    rated: list[tuple[str, float]] = []
    for field, values in zip(fields, answers, strict=True):
        if key not in values:
            raise row.fault(f"{field}.{key}", f"is missing; the object has {listed(values)}")
        if values[key] in _NO_SCORE:
            row.log.drop("an answer without a score")
            continue
        text_key = next((name for name in _TEXTS if name in values), _TEXTS[0])
        text = checked_text(row, f"{field}.{text_key}", values.get(text_key))
        rated.append((text, checked_number(row, f"{field}.{key}", values[key])))
    if len(rated) < 2:
        row.log.drop("a prompt with fewer than two scored answers: scores, not preferences")
        return
    texts, scores = zip(*rated, strict=True)
    yield Ranking(prompt=_instructed(row), answers=texts, scores=scores, rated=True)


def prompts(row: Row) -> Iterator[Prompt]:
    """The instruction."""
    yield _instructed(row)


def _instructed(row: Row) -> Prompt:
    key = "instruction" if row.values.get("instruction") is not None else "prompt"
    known = frozenset({"id", "group", key, "completions"})
    return prompt_of(row, known, (Message(Speaker.USER, row.text(key)),))


ULTRAFEEDBACK = Format(
    name="ultrafeedback",
    description="instruction or prompt, completions [{response, overall_score or score}]",
    fits=lambda values: (
        isinstance(values.get("completions"), list) and has_any(values, "instruction", "prompt")
    ),
    rankings=rankings,
    prompts=prompts,
    rated=True,
)


# UltraFeedback, binarised ---------------------------------------------------------------------


def binarized(row: Row) -> Iterator[Preference]:
    """As of TRL, with the difference of the scores as margin."""
    chosen, rejected = (
        checked_number(row, key, row.value(key)) for key in ("score_chosen", "score_rejected")
    )
    if chosen < rejected:
        raise row.fault(
            "score_chosen", f"{chosen:g} is below score_rejected {rejected:g}; correct the row"
        )
    for pair in trl.preferences(row):
        known = ("score_chosen", "score_rejected", "messages")
        meta = {key: value for key, value in pair.prompt.meta.items() if key not in known}
        pair = replace(pair, prompt=replace(pair.prompt, meta=meta))
        if chosen == rejected:
            row.log.coerce("equal scores of chosen and rejected read as a tie")
            yield replace(pair, choice=Choice.TIE)
        else:
            yield replace(pair, margin=chosen - rejected if pair.margin is None else pair.margin)


BINARIZED = Format(
    name="ultrafeedback-binarized",
    description="prompt, chosen, rejected (texts or messages), score_chosen, score_rejected",
    fits=lambda values: has(values, "chosen", "rejected", "score_chosen", "score_rejected"),
    preferences=binarized,
    prompts=trl.prompts,
)


# HelpSteer ------------------------------------------------------------------------------------

_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_ANSWER_KEYS = frozenset({"id", "group", "prompt", "response", *_ATTRIBUTES})


def answers(row: Row) -> Iterator[Answer]:
    """One answer and its helpfulness, 0 to 4."""
    prompt = prompt_of(row, _ANSWER_KEYS, (Message(Speaker.USER, row.text("prompt")),))
    score = checked_number(row, "helpfulness", row.value("helpfulness"))
    yield Answer(prompt=prompt, text=row.text("response"), score=score)


HELPSTEER = Format(
    name="helpsteer",
    description="prompt, response, helpfulness: rows of one prompt are compared",
    fits=lambda values: is_text(values.get("prompt")) and has(values, "response", "helpfulness"),
    answers=answers,
    rated=True,
)


# HelpSteer, preferences -----------------------------------------------------------------------

_STRENGTHS = {-3: 1, -2: 2, -1: 4, 0: 5, 1: 6, 2: 8, 3: 9}
"""From "much better" to "slightly better" of response_1, equal, the same of response_2."""
_PAIR_KEYS = frozenset(
    {
        *("id", "group", "prompt", "response_1", "response_2", "preference_strength"),
        *("weight", "margin", "annotator"),
    }
)


def strengths(row: Row) -> Iterator[Preference]:
    """Two answers; a negative strength prefers the first, 0 is a tie."""
    candidates = row.text("response_1"), row.text("response_2")
    if candidates[0] == candidates[1]:
        raise row.fault(
            "response_2", "equals response_1, so that the pair says nothing; remove the row"
        )
    value = whole(row, row.value("preference_strength"))
    if isinstance(value, bool) or not isinstance(value, int) or value not in _STRENGTHS:
        raise row.fault(
            "preference_strength", f"found {shown(value)}; expected a whole number from -3 to 3"
        )
    strength = _STRENGTHS[value]
    prompt = prompt_of(row, _PAIR_KEYS, (Message(Speaker.USER, row.text("prompt")),))
    yield preference_of(row, prompt, *candidates, choice_of_strength(strength), strength=strength)


def _is_pair(values: Mapping[str, Any]) -> bool:
    return is_text(values.get("prompt")) and has(values, "response_1", "response_2")


HELPSTEER_PREFERENCE = Format(
    name="helpsteer-preference",
    description="prompt, response_1, response_2, preference_strength (-3 to 3)",
    fits=_is_pair,
    preferences=strengths,
)
