"""A judge against people: how often it says what they said, and what that does to a win rate.

The names are those of Google's AutoSxS: accuracy, precision, recall, F1 and Cohen's kappa, of which
precision and recall speak of the rows where the first candidate is the better one. Gwet's AC1
stands beside kappa, which falls where one answer is rare. Rows of one prompt are resampled
together; intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from amenable.artifacts import read_json, read_jsonl
from amenable.errors import DataError, UsageError
from amenable.evaluate import statistics
from amenable.evaluate.statistics import Floats, Interval

if TYPE_CHECKING:
    from amenable.judges import Judge

FEWEST = 100
"""Rows below which an audit says little."""

_CLASSES = 3  # the first is better, a tie, the second is better


@dataclass(frozen=True, slots=True)
class Row:
    """A pair that people and the judge have compared."""

    prompt: str
    """Rows of the same prompt are not independent."""
    pair: str
    """Names the two texts in either order: its rows are people's repeated judgements of it."""
    turned: bool
    """The candidates stand in the other order than in the pair's other rows."""
    human: float
    """Of the second candidate: 1 better, 0.5 a tie, 0 worse."""
    judge: float
    """The same, both orders averaged: above one half it is better."""
    longer: float
    """The same of the longer text; 0.5 where both are as long."""

    @property
    def of_pair(self) -> float:
        """What people said, in the order of the pair."""
        return 1 - self.human if self.turned else self.human


def audit(rows: Sequence[Row], *, seed: int, samples: int = 2000) -> dict[str, Any]:
    """Agreement of a judge with people.

    Args:
        rows: at least one where people were decided.
        seed: of the resamples.
        samples: resamples of the prompts.

    Returns:
        `accuracy` over rows in which people were decided (a judge's tie counts one half),
        `precision`, `recall`, `f1`, `kappa` and `ac1`, each a number or None where it is not
        defined, with `…_ci95`; `longest_accuracy`, of the rule that the longer text is better;
        `people`, how far people agree with each other; `better_than_chance`, that the accuracy's
        interval lies above one half.

    Raises:
        DataError: there is no row in which people were decided.
    """
    human, judge = (
        np.array([_class(value) for value in values])
        for values in ([row.human for row in rows], [row.judge for row in rows])
    )
    decided = human != 1
    if not decided.any():
        raise DataError(
            "people were decided in no row, so that there is nothing to agree with; give rows with "
            "a choice"
        )
    prompts = [row.prompt for row in rows]
    of_decided = [prompt for prompt, kept in zip(prompts, decided, strict=True) if kept]
    agreed = 1 - np.abs(judge - human)[decided] / 2
    longest = np.array([1 - abs(row.longer - row.human) for row in rows])[decided]
    weights = _resamples(prompts, samples, seed)
    found: dict[str, Any] = {
        "rows": len(rows),
        "decided": int(decided.sum()),
        "judge_ties": int((judge == 1).sum()),
        "accuracy": float(agreed.mean()),
        "accuracy_ci95": statistics.win_rate_interval(agreed, of_decided).as_list(),
        "longest_accuracy": float(longest.mean()),
        "longest_accuracy_ci95": statistics.win_rate_interval(longest, of_decided).as_list(),
    }
    for name, figure in _FIGURES.items():
        tables = _tables(human, judge, np.vstack([np.ones(len(rows)), weights]))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = figure(tables)
        found |= _with_interval(name, values)
    shares = {"precision": ((judge == 0) & decided, human == 0), "recall": (human == 0, judge == 0)}
    for name, (among, right) in shares.items():  # resamples of a perfect share have no spread
        if among.any():
            own = [prompt for prompt, kept in zip(prompts, among, strict=True) if kept]
            interval = statistics.win_rate_interval(right[among].astype(np.float64), own)
            found[f"{name}_ci95"] = interval.as_list()
    found["people"] = people(rows)
    found["by_agreement"] = _by_agreement(rows)
    found["better_than_chance"] = found["accuracy_ci95"][0] > 0.5
    return found


def corrected_win_rate(
    scores: Sequence[float] | Floats, audited: Sequence[Row]
) -> tuple[float, Interval] | None:
    """The win rate that people would give, from the judge's and its errors on audited rows.

    theta = (p + q0 - 1) / (q0 + q1 - 1)

    with p the judge's win rate, q1 the share of rows that people give to the second candidate in
    which the judge does so too, q0 the same of the first (a judge's tie counts one half). The
    interval holds the errors of all three.

    Args:
        scores: [n] of the second system by the judge.
        audited: rows of the same judge, of like texts.

    Returns:
        None where the judge is no better than chance (q0 + q1 <= 1): no correction is possible.

    Source: Rogan and Gladen 1978; arXiv:2511.21140.
    """
    shares, counts = [], []
    for side in (0.0, 1.0):
        own = [1 - abs(side - _side(row.judge)) for row in audited if row.human == side]
        if not own:
            return None
        shares.append(float(np.mean(own)))
        counts.append(len(own))
    gain = sum(shares) - 1
    if gain <= 0:
        return None
    p = statistics.win_rate(scores)
    theta = (p + shares[0] - 1) / gain
    # One pseudo-success and failure each, so that a perfect share is not taken for a certain one.
    spread = [
        (q * n + 1) * (n - q * n + 1) / (n + 2) ** 3 for q, n in zip(shares, counts, strict=True)
    ]
    trials = statistics.effective_trials(scores)
    variance = (
        (p * trials + 1) * (trials - p * trials + 1) / (trials + 2) ** 3
        + (1 - theta) ** 2 * spread[0]
        + theta**2 * spread[1]
    ) / gain**2
    half = float(ndtri(0.975)) * math.sqrt(variance)
    value = min(1.0, max(0.0, theta))
    # About the value, not about theta: an audit that does not fit the answers proves no less.
    return value, Interval(max(0.0, value - half), min(1.0, value + half))


def read_audit(folder: Path) -> dict[str, Any]:
    """What `amenable audit` found of a judge.

    Raises:
        DataError: the folder has no audit.
    """
    found: dict[str, Any] = read_json(folder / "audit.json", _made_by(folder))
    return found


def read_audits(folders: Sequence[Path], judges: Sequence[Judge]) -> dict[str, list[Row]]:
    """Audited rows by judge, as `amenable audit` left them in these folders.

    Raises:
        UsageError: an audit of nobody who judges here, or of the same judge asked another way.
        DataError: a folder has no audit.
    """
    found = {}
    for folder in folders:
        about = read_audit(folder)
        judge = next((judge for judge in judges if judge.name == about["judge"]), None)
        if judge is None:
            raise UsageError(
                f"--audited {folder}: is of {about['judge']!r}, who does not judge here"
            )
        if about["identity"] != judge.identity:
            raise UsageError(
                f"--audited {folder}: {judge.name} was asked another way (template, sampling or "
                "service) than it is here; audit it as it judges"
            )
        rows = read_jsonl(folder / "audited.jsonl", _made_by(folder))
        found[judge.name] = [Row(**row) for row in rows]
    return found


def _made_by(folder: Path) -> str:
    return f"make it with `amenable audit FILE --judge JUDGE --out {folder}`"


def people(rows: Sequence[Row]) -> dict[str, Any]:
    """How often two people who judged the same pair say the same; a tie beside a choice is half.

    It is the ceiling of what a judge can reach. None where no pair was judged twice.
    """
    shares, prompts = [], []
    for own in _by_pair(rows).values():
        values = np.array([row.of_pair for row in own])
        if len(values) > 1:
            apart = np.abs(values[:, None] - values[None])
            shares.append(1 - float(apart.sum()) / (len(values) * (len(values) - 1)))
            prompts.append(own[0].prompt)
    if not shares:
        return {"pairs": 0, "agreement": None, "agreement_ci95": None}
    interval = statistics.win_rate_interval(shares, prompts)
    return {
        "pairs": len(shares),
        "agreement": float(np.mean(shares)),
        "agreement_ci95": interval.as_list(),
    }


def _by_agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy where all people said the same, and where they did not; pairs judged twice or more.

    With many contested pairs a judge looks better than it is (Elangovan et al. 2024,
    arXiv:2410.03775).
    """
    found: dict[str, list[float]] = {"unanimous": [], "contested": []}
    for own in _by_pair(rows).values():
        if len(own) > 1:
            kind = "unanimous" if len({row.of_pair for row in own}) == 1 else "contested"
            found[kind] += [
                1 - abs(_side(row.judge) - row.human) for row in own if row.human != 0.5
            ]
    return {
        kind: {"rows": len(values), "accuracy": float(np.mean(values)) if values else None}
        for kind, values in found.items()
    }


def _by_pair(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.pair].append(row)
    return found


def _class(value: float) -> int:
    return 0 if value < 0.5 else 2 if value > 0.5 else 1


def _side(value: float) -> float:
    return _class(value) / 2


def _resamples(prompts: Sequence[str], samples: int, seed: int) -> Floats:
    """[B, n] Exp(1) weights, equal within a prompt. Source: Rubin 1981."""
    index = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    codes = [index[prompt] for prompt in prompts]
    drawn = np.random.default_rng(seed).standard_exponential((samples, len(index)))
    return np.asarray(drawn[:, codes])


def _tables(human: Any, judge: Any, weights: Floats) -> Floats:
    """[B, 3, 3] shares of (human's class, judge's class)."""
    tables = np.zeros((len(weights), _CLASSES, _CLASSES))
    for h in range(_CLASSES):
        for j in range(_CLASSES):
            tables[:, h, j] = weights[:, (human == h) & (judge == j)].sum(1)
    return np.asarray(tables / weights.sum(1)[:, None, None])


def _precision(tables: Floats) -> Floats:
    return np.asarray(tables[:, 0, 0] / tables[:, [0, 2], 0].sum(1))


def _recall(tables: Floats) -> Floats:
    return np.asarray(tables[:, 0, 0] / tables[:, 0].sum(1))


def _f1(tables: Floats) -> Floats:
    said, is_so = tables[:, [0, 2], 0].sum(1), tables[:, 0].sum(1)
    return np.asarray(2 * tables[:, 0, 0] / (said + is_so))


def kappa(tables: Floats) -> Floats:
    """[B] (p_o - p_e) / (1 - p_e) of [B, k, k] shares. Source: Cohen 1960."""
    observed = np.trace(tables, axis1=1, axis2=2)
    expected = (tables.sum(1) * tables.sum(2)).sum(1)
    return np.asarray((observed - expected) / (1 - expected))


def ac1(tables: Floats) -> Floats:
    """[B] Gwet's AC1 of [B, k, k] shares, over the classes that occur in the first of them.

    p_e = sum_k pi_k (1 - pi_k) / (K - 1) with pi_k the mean share of class k of the two raters.

    Source: Gwet 2008, eq. 6.
    """
    means = (tables.sum(1) + tables.sum(2)) / 2
    classes = int((means[0] > 0).sum())
    observed = np.trace(tables, axis1=1, axis2=2)
    expected = (means * (1 - means)).sum(1) / max(1, classes - 1)
    return np.asarray((observed - expected) / (1 - expected))


_FIGURES: dict[str, Callable[[Floats], Floats]] = {
    "precision": _precision,
    "recall": _recall,
    "f1": _f1,
    "kappa": kappa,
    "ac1": ac1,
}


def _with_interval(name: str, values: Floats) -> dict[str, Any]:
    """The first value with the 95 % interval of the others; None where it is not defined."""
    value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
    if not math.isfinite(value) or not drawn.size:
        return {name: None, f"{name}_ci95": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {name: value, f"{name}_ci95": [min(value, float(low)), max(value, float(high))]}
