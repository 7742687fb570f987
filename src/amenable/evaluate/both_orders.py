"""What a judge says of two systems when it sees each pair in both orders, and how it is biased.

The unit is the prompt: its score for system b is the mean of the two orders, each the mean of its
valid verdicts, so that a preference for a place cancels. A prompt without a valid verdict in each
order is left out and counted. Intervals are at 95 % and clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from amenable.errors import DataError
from amenable.evaluate import statistics
from amenable.evaluate.statistics import Floats
from amenable.judges.types import Verdict

if TYPE_CHECKING:
    from amenable.judges.asking import Look

SCORE_OF_FIRST = {
    Verdict.FIRST: 1.0,
    Verdict.SECOND: 0.0,
    Verdict.TIE: 0.5,
    Verdict.BOTH_BAD: 0.5,
    Verdict.INVALID: np.nan,
}
"""What a verdict gives to the answer shown first; NaN: it is none."""


@dataclass(frozen=True)
class Orders:
    """Verdicts by prompt, both orders averaged."""

    prompts: tuple[str, ...]
    """[n] with a valid verdict in each order, as they first came."""
    by_order: Floats
    """[n, 2] score of b where a was shown first, and where b was."""
    left_out: tuple[str, ...]
    """Prompts without a valid verdict in one of the orders."""

    @property
    def scores(self) -> Floats:
        """[n] score of b in [0, 1]."""
        return np.asarray(self.by_order.mean(1))

    @classmethod
    def of(cls, looks: Sequence[Look]) -> Orders:
        """Gather the looks of one judge at one pair of systems.

        Raises:
            DataError: there is no prompt with a valid verdict in both orders.
        """
        sums = {look.pair.prompt.id: np.zeros((2, 2)) for look in looks}
        for look in looks:
            first = SCORE_OF_FIRST[look.reply.verdict]
            if not np.isnan(first):
                score = first if look.swapped else 1 - first
                sums[look.pair.prompt.id][:, int(look.swapped)] += (score, 1)
        whole = [prompt for prompt, (_, counts) in sums.items() if counts.all()]
        if not whole:
            raise DataError(
                f"of {len(sums)} prompts none has a valid verdict in both orders; read the judge's "
                "replies, and its template"
            )
        table = np.array([sums[prompt][0] / sums[prompt][1] for prompt in whole])
        kept = set(whole)
        return cls(tuple(whole), table, tuple(prompt for prompt in sums if prompt not in kept))


def confidences(looks: Sequence[Look], prompts: Sequence[str]) -> Floats:
    """[n, 2] probability that a judge gives to b, where a was shown first and where b was.

    The mean of several looks in one order; NaN where it told none beside a valid verdict.

    Args:
        looks: of one judge at one pair of systems.
        prompts: [n] ids, as those of `Orders`.
    """
    sums = {(prompt, swapped): np.zeros(2) for prompt in prompts for swapped in (False, True)}
    for look in looks:
        first, place = look.reply.confidence, (look.pair.prompt.id, look.swapped)
        if first is not None and look.reply.verdict is not Verdict.INVALID and place in sums:
            sums[place] += (first if look.swapped else 1 - first, 1)
    told = [total / count if count else np.nan for total, count in sums.values()]
    return np.asarray(told, dtype=np.float64).reshape(-1, 2)


def judge_bias(
    orders: Orders, lengths_a: Mapping[str, float], lengths_b: Mapping[str, float]
) -> dict[str, Any]:
    """What the judge prefers whatever is written.

    Args:
        orders: its verdicts.
        lengths_a: of a's answers by prompt, any unit.
        lengths_b: of b's, the same unit.

    Returns:
        `first_wins`: share of looks that the answer shown first wins, ties one half; 0.5 without
        bias. `flips`: share of prompts that go to one system in one order and to the other in the
        other. `longer_wins`: share of prompts of unequal lengths that the longer answer wins;
        None where there are none. Each with its interval.
    """
    n = len(orders.prompts)
    first = np.stack([1 - orders.by_order[:, 0], orders.by_order[:, 1]], 1)
    flips = int(((orders.by_order - 0.5).prod(1) < 0).sum())
    longer = np.array([lengths_b[p] - lengths_a[p] for p in orders.prompts])
    uneven = longer != 0
    wins = np.where(longer > 0, orders.scores, 1 - orders.scores)[uneven]
    return {
        "first_wins": float(first.mean()),
        "first_wins_ci95": statistics.win_rate_interval(
            first.ravel(), np.repeat(np.arange(n), 2).tolist()
        ).as_list(),
        "flips": flips / n,
        "flips_ci95": statistics.wilson(flips, n).as_list(),
        "longer_wins": float(wins.mean()) if wins.size else None,
        "longer_wins_ci95": statistics.win_rate_interval(wins).as_list() if wins.size else None,
        "longer_prompts": int(wins.size),
    }


def slices(scores: npt.ArrayLike, parts: Mapping[str, npt.ArrayLike]) -> list[dict[str, Any]]:
    """Win rate of b in each part of the prompts, with p values that hold for all parts together.

    Args:
        scores: [n] of b.
        parts: by name, [n] True at the prompts of it; empty ones are left out.

    Returns:
        `slice`, `prompts`, `win_rate`, `win_rate_ci95` (of each alone), `p_value` (sign test) and
        `p_holm`, in the order of `parts`.
    """
    values = np.asarray(scores, dtype=np.float64)
    found: list[dict[str, Any]] = []
    for name, member in parts.items():
        own = values[np.asarray(member, dtype=bool)]
        if own.size:
            found.append(
                {
                    "slice": name,
                    "prompts": int(own.size),
                    "win_rate": statistics.win_rate(own),
                    "win_rate_ci95": statistics.win_rate_interval(own).as_list(),
                    "p_value": statistics.sign_test_p(
                        int((own > 0.5).sum()), int((own < 0.5).sum())
                    ),
                }
            )
    for row, p in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = p
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p, raised so that one error among all has the stated probability at most.

    Sorted p_(k) become max over j <= k of min(1, (m - j + 1) p_(j)).

    Source: Holm 1979.
    """
    count = len(p_values)
    order = np.argsort(p_values, kind="stable")
    found, least = [0.0] * count, 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (count - place) * float(p_values[index])))
        found[index] = least
    return found
