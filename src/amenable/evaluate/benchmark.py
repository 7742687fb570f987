"""Before and after on standard tasks: what each metric lost or gained, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from amenable.errors import StageError
from amenable.evaluate.both_orders import holm
from amenable.evaluate.harness import Group, Scores
from amenable.evaluate.paired import Difference, bootstrap_difference, mean_difference

FEWEST = 100
"""Documents below which a difference says little."""

_LEVEL = 0.05
_Key = tuple[str, str, str]  # task, metric, filter


@dataclass(frozen=True)
class _Both:
    """One metric of one task by two systems, on the documents of both."""

    higher_is_better: bool | None
    before: list[Any]
    after: list[Any]
    bounded: bool
    """A mean of values in [0, 1]."""

    difference: Difference


def compared(
    systems: Mapping[str, Sequence[Scores]], groups: Sequence[Group] = ()
) -> list[dict[str, Any]]:
    """Every pair of systems in every metric of every task, and of every group of tasks.

    Args:
        systems: scores by name; of each pair the earlier one is before.
        groups: figures over several tasks.

    Returns:
        Rows of plain numbers, ready for JSON: `task`, `metric`, `filter`, `before` and `after`
        (names), `before_value`, `after_value`, `difference` with `difference_ci95`, `p_value`,
        `p_holm` (over all rows of the pair), `documents`, `improved` and `worsened` (of them),
        `smallest_detectable`, `verdict` (`cost`, `gain`, `changed` where the task does not say
        which way is better, or `nothing shown`) and `meaning`, a sentence.

    Raises:
        StageError: two systems were asked different documents.
    """
    found = []
    for before, after in combinations(systems, 2):
        pairs = _pairs(systems[before], systems[after])
        rows = [_row(key, both) for key, both in pairs.items()]
        rows += [_row(key, both) for key, both in _over_tasks(groups, pairs)]
        for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
            row |= {"before": before, "after": after, "p_holm": p}
            row["meaning"] = meaning(row, len(rows))
        found += rows
    return found


def _pairs(before: Sequence[Scores], after: Sequence[Scores]) -> dict[_Key, _Both]:
    second = {(score.task, score.metric, score.filter): score for score in after}
    found = {}
    for first in before:
        key = (first.task, first.metric, first.filter)
        if key in second:
            found[key] = _both(first, second[key])
    return found


def _both(first: Scores, second: Scores) -> _Both:
    if first.hashes != second.hashes:
        raise StageError(
            f"{first.task}: the systems were asked different documents; a task that draws its "
            "documents at random cannot be compared"
        )
    numbers = [number for number in first.documents if number in second.documents]
    before = [first.documents[number] for number in numbers]
    after = [second.documents[number] for number in numbers]
    bounded = first.aggregate is None and all(
        _is_number(value) and 0 <= value <= 1 for value in (*before, *after)
    )
    if bounded:
        difference = mean_difference(before, after)
    else:
        difference = bootstrap_difference(before, after, first.aggregate or _mean)
    return _Both(first.higher_is_better, before, after, bounded, difference)


def _over_tasks(
    groups: Sequence[Group], pairs: Mapping[_Key, _Both]
) -> Iterator[tuple[_Key, _Both]]:
    """Groups whose tasks' metrics are means of values in [0, 1]; documents of all tasks together.

    Documents have weights: all alike, or such that every task counts alike.
    """
    for group in groups:
        own = {key: both for key, both in pairs.items() if key[0] in group.tasks}
        for name in sorted({name for _, metric, name in own if metric == group.metric}):
            if group.filters is not None and name not in group.filters:
                continue
            parts = [own[key] for key in own if key[1:] == (group.metric, name)]
            if not all(part.bounded for part in parts):
                continue
            weights = [
                1.0 if group.weight_by_size else 1 / len(part.before)
                for part in parts
                for _ in part.before
            ]
            before = [value for part in parts for value in part.before]
            after = [value for part in parts for value in part.after]
            ways = {part.higher_is_better for part in parts}
            yield (
                (group.name, group.metric, name),
                _Both(
                    ways.pop() if len(ways) == 1 else None,
                    before,
                    after,
                    True,
                    mean_difference(before, after, weights),
                ),
            )


def _row(key: _Key, both: _Both) -> dict[str, Any]:
    task, metric, name = key
    found = both.difference
    improved, worsened = _moved(both)
    return {
        "task": task,
        "metric": metric,
        "filter": name,
        "before_value": found.before,
        "after_value": found.after,
        "difference": found.value,
        "difference_ci95": found.interval.as_list(),
        "p_value": found.p_value,
        "documents": len(both.before),
        "improved": improved,
        "worsened": worsened,
        "higher_is_better": both.higher_is_better,
        "smallest_detectable": found.detectable,
        "verdict": _verdict(found, both.higher_is_better),
    }


def _moved(both: _Both) -> tuple[int | None, int | None]:
    """Documents that the second system answers better, and worse; None where values are no numbers.

    Where the task does not say which way is better, more counts as better.
    """
    if not all(map(_is_number, (*both.before, *both.after))):
        return None, None
    moves = np.asarray(both.after, dtype=float) - np.asarray(both.before, dtype=float)
    moves = -moves if both.higher_is_better is False else moves
    return int((moves > 0).sum()), int((moves < 0).sum())


def _verdict(found: Difference, higher_is_better: bool | None) -> str:
    if not found.p_value < _LEVEL:  # also of a metric that is not a number
        return "nothing shown"
    if higher_is_better is None:
        return "changed"
    return "gain" if (found.value > 0) is higher_is_better else "cost"


def meaning(row: Mapping[str, Any], rows: int) -> str:
    """One sentence on a row of `compared`.

    Args:
        row: with its `p_holm`.
        rows: how many were looked at together.
    """
    low, high = row["difference_ci95"]
    if row["verdict"] == "nothing shown":
        up = row["higher_is_better"] is not False
        loss = max(0.0, -low if up else high)
        told = (
            f"nothing shown: a loss of more than {loss:.3f} is unlikely, and a difference of "
            f"{row['smallest_detectable']:.3f} would have shown"
        )
    else:
        way = "rose" if row["difference"] > 0 else "fell"
        told = (
            f"{row['verdict']}: {row['metric']} {way} from {row['before_value']:.3f} to "
            f"{row['after_value']:.3f}"
        )
        if row["p_holm"] >= _LEVEL:
            told += f", which among {rows} figures may be chance"
    if row["documents"] < FEWEST:
        told += f"; {row['documents']} documents say little"
    return told


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))
