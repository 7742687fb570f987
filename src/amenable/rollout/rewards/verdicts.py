"""Reads what a function or a service has given for each completion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from amenable.errors import StageError
from amenable.masking import without_secrets
from amenable.rollout.rewards.types import Failed, Step, Verdict

_LONGEST_REASON = 300


def read_verdicts(given: Any, texts: Sequence[str], who: str) -> list[Verdict]:
    """[N] verdicts from an iterable of what `read_verdict` reads.

    Args:
        given: what a reward returned; a tensor or an array will do.
        texts: [N] the completions.
        who: names the reward in messages, with its recipe key.

    Raises:
        StageError: not a list, or not one item a completion.
    """
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
        raise StageError(f"{who} must return a list of scores; it returned {type(given).__name__}")
    items = given.tolist() if hasattr(given, "tolist") else list(given)
    if not isinstance(items, list) or len(items) != len(texts):
        count = len(items) if isinstance(items, list) else 1
        raise StageError(
            f"{who} must return one score for each of the {len(texts)} completions; "
            f"it returned {count}"
        )
    return [read_verdict(item, text) for item, text in zip(items, texts, strict=True)]


def read_verdict(item: Any, text: str) -> Verdict:
    """One verdict from a number, steps, nothing, an exception, or {"score": …, "reason": …}."""
    if isinstance(item, Mapping):
        verdict = read_verdict(item.get("score"), text)
        said = item.get("reason")
        return Failed(one_line(said)) if isinstance(verdict, Failed) and said else verdict
    if item is None:
        return Failed("gave no score")
    if isinstance(item, BaseException):
        return Failed(told(item))
    if isinstance(item, str | bytes):
        return Failed(f"gave {one_line(repr(item))}, which is no number")
    item = item.tolist() if hasattr(item, "tolist") else item
    return _steps(item, len(text)) if isinstance(item, Sequence) else _number(item)


def told(error: BaseException) -> str:
    """Type and message of an error, in one line without secrets."""
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def one_line(text: object) -> str:
    """The text, or what an object prints as, in one line of bounded length, without secrets."""
    line = without_secrets(" ".join(str(text).split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"


def _number(item: Any) -> float | Failed:
    try:
        score = float(item)
    except (TypeError, ValueError, OverflowError):
        return Failed(f"gave {one_line(repr(item))}, which is no number")
    return score if math.isfinite(score) else Failed(f"gave {score}")


def _steps(items: Sequence[Any], length: int) -> tuple[Step, ...] | Failed:
    """Steps in the order of their ends.

    An end counts characters of the text, from 0 to its length.
    """
    steps: list[Step] = []
    for item in items:
        try:
            end, given = item
            place = int(end)
        except (TypeError, ValueError, OverflowError):
            return Failed(f"gave the step {one_line(repr(item))}; a step is [end, score]")
        if place != end or not 0 <= place <= length:
            return Failed(f"gave a step that ends at {end}; the text has {length} characters")
        score = _number(given)
        if isinstance(score, Failed):
            return Failed(f"{score.reason}, for the step that ends at {place}")
        steps.append((place, score))
    return tuple(sorted(steps)) if steps else Failed("gave an empty list of steps")
