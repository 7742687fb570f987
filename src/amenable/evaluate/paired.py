"""Two systems on the same documents: the difference of a metric, paired document by document.

Most documents are answered alike by both systems and say nothing about their difference: an
interval of the paired differences is narrower than two standard errors put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from amenable.errors import DataError
from amenable.evaluate.statistics import Floats, Interval, wilson

Aggregate = Callable[[list[Any]], float]

_Z_LEVEL = float(ndtri(0.975))  # 95 %, two-sided
_Z_POWER = float(ndtri(0.8))


@dataclass(frozen=True, slots=True)
class Difference:
    """After minus before, on the same documents."""

    before: float
    """The metric of the first system."""

    after: float
    """The metric of the second system."""

    interval: Interval
    """Of after minus before, at 95 %."""

    p_value: float
    """Two-sided, of no difference; below 0.05 exactly where the interval leaves 0 out."""

    detectable: float
    """Smallest true difference that would show with a chance of 80 %."""

    @property
    def value(self) -> float:
        """After minus before."""
        return self.after - self.before


def mean_difference(
    before: npt.ArrayLike, after: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Difference:
    """The difference of two means over the same documents, with values in [0, 1].

    The differences d, as scores (1 + d) / 2, have Wilson's interval with the effective number of
    trials of `statistics.effective_trials`: with a pseudo-document that each side wins, so that two
    systems that differ nowhere do not get an interval of no width. The p value is of the same test:
    for values of 0 and 1 near McNemar's, with b documents won, c lost, k = b - c and N = n + 2

        z² = k² / n · (N² - k²) / (N (b + c + 2) - k²)

    Args:
        before: [n] values of the first system.
        after: [n] of the second, same documents.
        weights: [n] above 0, of the documents; None: all alike. Only their ratios count.

    Raises:
        DataError: no document, lengths that differ, or values outside [0, 1].

    Source: McNemar 1947; Wilson 1927; Agresti and Min 2005 (pseudo-documents).
    """
    first, second = _values(before), _values(after)
    if not (first.ndim == 1 and first.size and first.shape == second.shape):
        raise DataError(
            "a paired difference needs the same documents of both systems, got shapes "
            f"{first.shape} and {second.shape}"
        )
    n = first.size
    shares = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    means = min(float(shares @ first), 1.0), min(float(shares @ second), 1.0)
    trials = _trials((1 + second - first) / 2, shares)
    rate = (1 + means[1] - means[0]) / 2
    found = wilson(rate * trials, trials)
    return Difference(
        *means,
        interval=Interval(2 * found.low - 1, 2 * found.high - 1),
        p_value=_two_sided(2 * (rate - 0.5) * math.sqrt(trials)),
        detectable=_detectable(second - first, shares),
    )


def bootstrap_difference(
    before: Sequence[Any],
    after: Sequence[Any],
    aggregate: Aggregate,
    *,
    seed: int = 0,
    samples: int = 400,
) -> Difference:
    """The difference of a metric that is no plain mean: F1, a perplexity, BLEU.

    Documents are drawn with replacement, the same ones for both systems; the interval is
    ± 1.96 standard deviations of the difference over the draws.

    Args:
        before: [n] what the metric is made of, a document each, of the first system.
        after: [n] of the second, same documents.
        aggregate: from such a list to the metric.
        seed: of the draws.
        samples: draws.

    Raises:
        DataError: fewer than two documents, or lengths that differ.

    Source: Efron and Tibshirani 1993, chapter 6 (the bootstrap's standard error).
    """
    n = len(before)
    if n < 2 or n != len(after):
        raise DataError(
            f"a resampled difference needs the same documents of both systems, two at least, got "
            f"{n} and {len(after)}"
        )
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        chosen = rng.integers(n, size=n).tolist()
        drawn.append(aggregate([after[i] for i in chosen]) - aggregate([before[i] for i in chosen]))
    error = float(np.std(drawn, ddof=1)) * math.sqrt(n / (n - 1))
    values = float(aggregate(list(before))), float(aggregate(list(after)))
    difference = values[1] - values[0]
    half = _Z_LEVEL * error
    return Difference(
        *values,
        interval=Interval(difference - half, difference + half),
        p_value=_two_sided(difference / error) if error > 0 else float(difference == 0),
        detectable=(_Z_LEVEL + _Z_POWER) * error,
    )


def _values(values: npt.ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.size and not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
        raise DataError("a mean difference needs values in [0, 1]; use bootstrap_difference")
    return found


def _trials(scores: Floats, shares: Floats) -> float:
    """`statistics.effective_trials` of weighted scores; the same number where weights are equal."""
    n = scores.size
    padded = np.append(scores, [0.0, 1.0])
    weights = np.append(shares * n, [1.0, 1.0]) / (n + 2)
    mean = float(weights @ padded)
    variance = float(np.square(weights * (padded - mean)).sum())
    return mean * (1 - mean) / variance * n / (n + 2)


def _two_sided(z: float) -> float:
    return float(2 * ndtr(-abs(z)))


def _detectable(differences: Floats, shares: Floats) -> float:
    """The true difference at which the test above rejects in 80 of 100 samples like this one.

    Solves delta = 1.96 sqrt((q + 2/n) / n) + 0.84 sqrt((q - delta²) / n), with q the mean square of
    the differences. A difference of delta between answers that are right or wrong needs q >= delta.
    """
    n = 1 / float(np.square(shares).sum())
    seen = float(shares @ np.square(differences))
    right_or_wrong = bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())
    delta = 0.0
    for _ in range(200):
        q = max(seen, delta if right_or_wrong else delta**2)
        spread = max(0.0, q - delta**2)
        delta = min(1.0, _Z_LEVEL * math.sqrt((q + 2 / n) / n) + _Z_POWER * math.sqrt(spread / n))
    return delta
