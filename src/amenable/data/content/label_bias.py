"""Biases of the labels that need no text: length, position, annotators. Columns of numbers in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]
Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

LENGTH_NOTE, LENGTH_WARNING = 0.05, 0.10
"""Distance of the longest-wins share from one half. Chosen here: crowd comparisons of model answers
often show 0.55 to 0.6, and at 0.6 length alone is as good as many small reward models."""

POSITION_P, POSITION_DISTANCE = 0.001, 0.05
"""Position bias is told below this p-value and beyond this distance from one half. Chosen here: the
first keeps chance out, the second keeps millions of rows from making a trifle significant."""

DOMINANT = 0.5
"""Share of the rows above which one annotator dominates; chosen here."""

ANNOTATOR_ROWS, ANNOTATOR_SIDE = 30, 0.9
"""Fewest decided rows, and the share of one side above which an annotator is one-sided. Chosen
here: at random 28 of 30 come up once in 2 million annotators."""

ONE_SIDED_ROWS = 20
"""Fewest decided rows from which "always the same side" is told; by chance 2 in a million."""

CONFIDENCE = 0.975
"""Upper tail of 95 % intervals."""

MOST_QUANTILE = 1e6
"""Student's quantile from which an interval is [0, 1]: there is next to one cluster."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share with its 95 % interval."""

    share: float
    low: float
    high: float
    rows: int
    clusters: int

    def to_json(self) -> Json:
        """`share`, `low`, `high`, `rows`, `clusters`."""
        return {key: getattr(self, key) for key in ("share", "low", "high", "rows", "clusters")}


def clustered_share(hits: npt.NDArray[np.bool_], clusters: Keys) -> Share | None:
    """Share of hits with a 95 % interval that counts rows of one cluster as dependent.

    The variance of the share is that of leaving out each cluster in turn, (G - 1) / G
    Σ_g ((h_g - p n_g) / (n - n_g))², which a cluster with most rows cannot hide from. It gives the
    effective number of rows, p (1 - p) / variance, at most n, of a Wilson interval. Student's
    quantile has one degree less than the clusters that equal sizes would take to weigh as much,
    K = n² / Σ n_g²: G clusters of one size are G, and one with nearly all rows is one. Where p is 0
    or 1, or there is no variance, the effective number is K.

    Args:
        hits: [n] whether each row is a hit.
        clusters: [n] key of each row's cluster.

    Returns:
        None for no rows. A single cluster has the interval [0, 1].

    Source: Korn and Graubard 1998 (effective sample size); Wilson 1927; Kish 1965, section 8.2.
    """
    n = len(hits)
    if n == 0:
        return None
    _, index = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(index)
    groups, p = len(sizes), float(hits.mean())
    if groups < 2:
        return Share(p, 0.0, 1.0, n, groups)
    alike = n * n / float(sizes @ sizes)
    left_out = (np.bincount(index, weights=hits) - p * sizes) / (n - sizes)
    variance = (groups - 1) / groups * float(left_out @ left_out)
    effective = min(n, p * (1 - p) / variance) if variance > 0 and 0 < p < 1 else alike
    low, high = _wilson(p, effective, alike - 1)
    return Share(p, low, high, n, groups)


def _wilson(p: float, n: float, freedom: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    t = float(stdtrit(freedom, CONFIDENCE))
    if not t < MOST_QUANTILE:  # also NaN, for next to no freedom
        return 0.0, 1.0
    centre = (p + t * t / (2 * n)) / (1 + t * t / n)
    half = t / (1 + t * t / n) * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def longest_wins(differences: Integers, prompts: Keys) -> Share | None:
    """Share of decided pairs of unequal length in which the longer candidate was chosen.

    Args:
        differences: [n] length of the chosen minus that of the rejected candidate, 0 for ties.
        prompts: [n] key of each row's prompt: rows of one prompt are dependent.
    """
    uneven = differences != 0
    return clustered_share(differences[uneven] > 0, prompts[uneven])


def position_share(choices: Integers, units: Keys) -> Json:
    """`share` of candidate_0 among decided rows, its `rows`, and the `p` of a sign test of `pairs`.

    The test is exact and two-sided, over pairs: judgements of one pair depend on each other, so
    that each pair counts once, for the side that was chosen more often in it.

    Args:
        choices: [n] 0 or 1, any other number for a tie.
        units: [n] key of each row's pair, in either order.

    Returns:
        `{"rows": 0}` without decided rows.
    """
    from scipy.special import bdtr

    decided = (choices == 0) | (choices == 1)
    rows = int(decided.sum())
    if rows == 0:
        return {"rows": 0}
    _, index = np.unique(units[decided], return_inverse=True)
    lean = np.bincount(index, weights=1 - 2 * choices[decided])
    first, second = int((lean > 0).sum()), int((lean < 0).sum())
    p = min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))
    share = float((choices[decided] == 0).mean())
    return {"share": share, "rows": rows, "pairs": first + second, "p": p}


def one_sided_annotators(
    annotators: Integers, choices: Integers, names: Mapping[str, int]
) -> Iterator[tuple[str, int, int]]:
    """Annotators with ANNOTATOR_ROWS decided rows who pick one side in nearly all of them.

    Args:
        annotators: [n] number of each row's annotator, negative for none.
        choices: [n] 0 or 1, any other number for a tie.
        names: number of each annotator by name.

    Yields:
        Name, rows of the side picked most, decided rows.
    """
    decided = (annotators >= 0) & ((choices == 0) | (choices == 1))
    rows = np.bincount(annotators[decided], minlength=len(names))
    seconds = np.bincount(annotators[decided & (choices == 1)], minlength=len(names))
    most = np.maximum(seconds, rows - seconds)
    for name, number in names.items():
        if rows[number] >= ANNOTATOR_ROWS and most[number] > ANNOTATOR_SIDE * rows[number]:
            yield name, int(most[number]), int(rows[number])
