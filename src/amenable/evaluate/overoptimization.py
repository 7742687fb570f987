"""Proxy and gold score against the distance from the start: curves, turning point, best of n.

The policy climbs the proxy; the gold score is what the proxy stands for. With d = sqrt(KL), nats,
gold over the start's follows d (a - b log d) under reinforcement learning and d (a - b d) under
best of n (Gao et al. 2022, arXiv:2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from amenable.evaluate.statistics import Floats

Shape = Literal["rl", "best-of-n"]


@dataclass(frozen=True)
class GoldCurve:
    """gold(d) = start + d (a - b log d), or start + d (a - b d) for best of n."""

    shape: Shape
    start: float
    a: float
    b: float

    def at(self, distance: float) -> float:
        """Score at a distance d >= 0, in square roots of nats."""
        if distance <= 0:
            return self.start
        bend = math.log(distance) if self.shape == "rl" else distance
        return self.start + distance * (self.a - self.b * bend)

    @property
    def turning_point(self) -> float | None:
        """The distance of the highest score; None where the curve has no maximum."""
        if self.b <= 0:
            return None
        if self.shape == "rl":
            exponent = self.a / self.b - 1
            return math.exp(exponent) if exponent < 50 else None
        return self.a / (2 * self.b) if self.a > 0 else None


def fit_gold(
    distances: Sequence[float], scores: Sequence[float], shape: Shape = "rl"
) -> GoldCurve | None:
    """Least squares in start, a and b; None with fewer than four different distances.

    Args:
        distances: [n] square roots of the KL, at least 0.
        scores: [n] mean gold scores.
        shape: of the curve.
    """
    d = np.asarray(distances, dtype=np.float64)
    y = np.asarray(scores, dtype=np.float64)
    if len(np.unique(d)) < 4:
        return None
    bend = np.where(d > 0, d * np.log(np.where(d > 0, d, 1.0)), 0.0) if shape == "rl" else d * d
    design = np.stack([np.ones_like(d), d, -bend], axis=1)
    start, a, b = np.linalg.lstsq(design, y, rcond=None)[0]
    return GoldCurve(shape, float(start), float(a), float(b))


def best_of_n(proxy: Floats, scores: Floats, n: int) -> float:
    """Mean score of the best of n samples by proxy, without bias, from N >= n samples a prompt.

    Every subset of n of the N counts alike: sum_i C(i - 1, n - 1) / C(N, n) of the i-th smallest
    by proxy (Nakano et al. 2021, arXiv:2112.09332, appendix I). Equal proxies keep their order.

    Args:
        proxy: [prompts, N] what chooses.
        scores: [prompts, N] what is reported of the chosen one.
        n: samples to choose among, from 1 to N.
    """
    count = proxy.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n = {n} is not within 1 and the {count} samples of a prompt")
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    weights = [math.comb(place, n - 1) / math.comb(count, n) for place in range(count)]
    return float((ranked @ np.array(weights)).mean())


def best_of_n_kl(n: int) -> float:
    """KL of best of n from the start: log n - (n - 1) / n nats, met where no two samples are equal.

    Else it is an upper bound (Beirami et al. 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
