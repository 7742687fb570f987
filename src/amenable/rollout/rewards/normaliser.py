"""Brings rewards of different scales to one before they are added."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Normaliser:
    """Leaves scores as they are, or subtracts their running mean and divides by their deviation.

    Mean and (population) standard deviation are over all finite scores that `apply` was ever
    given, the present ones included, so that a call a roll-out batch makes the result independent
    of micro-batches. While all scores seen are equal, only the mean is subtracted.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1
    (Welford's update for whole batches).
    """

    def __init__(self, running: bool) -> None:
        self._running = running
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    @property
    def mean(self) -> float:
        """What is subtracted."""
        return self._mean if self._running else 0.0

    @property
    def spread(self) -> float:
        """What is divided by; above 0."""
        if not self._running or self._squares <= 0:
            return 1.0
        return math.sqrt(self._squares / self._count)

    def apply(self, scores: Tensor) -> Tensor:
        """Takes the scores [N] into account and returns them normalised; NaN stays NaN."""
        if not self._running:
            return scores
        self._see(scores.detach().double().cpu())
        return ((scores.double() - self.mean) / self.spread).to(scores.dtype)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-able."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self._count, self._mean = int(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])

    def _see(self, scores: Tensor) -> None:
        scores = scores[torch.isfinite(scores)]
        count = len(scores)
        if count == 0:
            return
        mean = float(scores.mean())
        total, difference = self._count + count, mean - self._mean
        self._squares += float((scores - mean).square().sum())
        self._squares += difference**2 * self._count * count / total
        self._mean += difference * count / total
        self._count = total
