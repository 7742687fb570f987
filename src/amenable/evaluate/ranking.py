"""Several systems on one scale: Bradley-Terry with ties, and intervals that know of prompts.

    P(i beats j) = p_i / D    P(tie) = 2 v sqrt(p_i p_j) / D    D = p_i + p_j + 2 v sqrt(p_i p_j)

with p = exp(strength). In the strengths and log v it is a multinomial logit, whose likelihood is
concave: Newton's method finds the one maximum. Without a tie v is 0 and the model Bradley-Terry's.

Source: Davidson 1970; Bradley and Terry 1952.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, ndtri

from amenable.errors import DataError
from amenable.evaluate.statistics import RIDGE, Floats, Interval

_STEPS = 200
_Z = float(ndtri(0.975))


class Game(NamedTuple):
    """Two systems' answers to a prompt, judged."""

    prompt: str
    first: str
    second: str
    score: float
    """Of the second: 1 it wins, 0.5 a tie, 0 it loses; between: shares of two of these."""


@dataclass(frozen=True)
class Ranking:
    """Systems by strength, the strongest first.

    Intervals are those of the games with one win and one loss more between each two systems that
    have met, so that none has no width, and widened, where needed, to hold the estimate.
    """

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    """Natural logarithms; their mean is 0."""
    tie: float
    """v; 0 where no game was a tie."""
    shrunk: Floats
    """[m] strengths of the games with those wins and losses."""
    covariance: Floats
    """[m, m] of these."""

    def interval(self, name: str) -> Interval:
        """95 %, of a strength against the mean of all."""
        return self._interval(np.eye(len(self.names))[self.names.index(name)])

    def difference(self, first: str, second: str) -> tuple[float, Interval]:
        """Strength of the second less that of the first."""
        contrast = np.zeros(len(self.names))
        contrast[[self.names.index(first), self.names.index(second)]] = -1, 1
        return float(contrast @ self.strengths), self._interval(contrast)

    def rows(self) -> list[dict[str, Any]]:
        """Plain numbers, ready for JSON."""
        return [
            {
                "system": name,
                "strength": strength,
                "strength_ci95": self.interval(name).as_list(),
            }
            for name, strength in zip(self.names, self.strengths, strict=True)
        ]

    def _interval(self, contrast: Floats) -> Interval:
        value, middle = float(contrast @ self.strengths), float(contrast @ self.shrunk)
        half = _Z * math.sqrt(max(0.0, float(contrast @ self.covariance @ contrast)))
        return Interval(min(value, middle - half), max(value, middle + half))


def rank(games: Sequence[Game]) -> Ranking:
    """The strengths that make the games most likely.

    A ridge of 1e-7 a game keeps them finite where a system wins every game.

    Args:
        games: of at least two systems, all of which are linked by games.

    Raises:
        DataError: no game, a score outside [0, 1], or systems that no chain of games links.
    """
    names = sorted({name for game in games for name in (game.first, game.second)})
    _check(games, names)
    with_ties = any(_outcome(game.score)[2] for game in games)
    values = _fit(_Table.of(games, names, with_ties))[0]
    centre = np.eye(len(names)) - 1 / len(names)
    strengths = centre @ values[: len(names)]
    shrunk, covariance = _with_spread([*games, *_evened(games)], names, with_ties)
    order = np.argsort(-strengths, kind="stable")
    return Ranking(
        names=tuple(names[k] for k in order),
        strengths=tuple(float(strengths[k]) for k in order),
        tie=float(np.exp(values[-1]) / 2) if with_ties else 0.0,
        shrunk=shrunk[order],
        covariance=covariance[np.ix_(order, order)],
    )


def _evened(games: Sequence[Game]) -> list[Game]:
    """A win and a loss for each two systems that have met, each as a prompt of its own."""
    met = dict.fromkeys((game.first, game.second) for game in games)
    return [
        Game(f"\0{first}\0{second}\0{score}", first, second, score)
        for first, second in met
        for score in (0.0, 1.0)
    ]


def _with_spread(
    games: Sequence[Game], names: Sequence[str], with_ties: bool
) -> tuple[Floats, Floats]:
    """[m] strengths and their [m, m] covariance, by the sandwich estimator clustered by prompt."""
    table = _Table.of(games, names, with_ties)
    values, information, residuals = _fit(table)
    groups = {prompt: n for n, prompt in enumerate(dict.fromkeys(game.prompt for game in games))}
    clusters = np.zeros((len(groups), values.size))
    gradients = np.einsum("gkp,gk->gp", table.design, residuals)
    np.add.at(clusters, [groups[game.prompt] for game in games], gradients)
    bread = np.linalg.inv(information)
    correction = len(groups) / (len(groups) - 1)
    whole = correction * bread @ (clusters.T @ clusters) @ bread
    own, centre = slice(0, len(names)), np.eye(len(names)) - 1 / len(names)
    return centre @ values[own], centre @ whole[own, own] @ centre


def _check(games: Sequence[Game], names: Sequence[str]) -> None:
    if not games:
        raise DataError("a ranking needs games; judge the answers of at least two systems")
    for game in games:
        if not 0 <= game.score <= 1:
            raise DataError(f"prompt {game.prompt!r}: a score must lie in [0, 1], not {game.score}")
        if game.first == game.second:
            raise DataError(f"prompt {game.prompt!r}: {game.first!r} plays against itself")
    linked, more = {games[0].first}, True
    while more:
        reached = {
            name
            for game in games
            if game.first in linked or game.second in linked
            for name in (game.first, game.second)
        }
        more, linked = len(reached) > len(linked), linked | reached
    if apart := [name for name in names if name not in linked]:
        raise DataError(
            f"no chain of games links {', '.join(map(repr, apart))} with {games[0].first!r}; "
            "judge them against each other, or rank them apart"
        )


def _outcome(score: float) -> tuple[float, float, float]:
    """Shares of a win of the first, of the second, and of a tie."""
    tie = 1 - abs(2 * score - 1)
    return max(0.0, 1 - 2 * score), max(0.0, 2 * score - 1), tie


class _Table(NamedTuple):
    """Games as a multinomial logit."""

    design: Floats
    """[games, outcomes, parameters] of the utilities: strengths, then log 2 v."""
    outcomes: Floats
    """[games, outcomes] shares."""

    @classmethod
    def of(cls, games: Sequence[Game], names: Sequence[str], with_ties: bool) -> _Table:
        place = {name: n for n, name in enumerate(names)}
        systems, rows = len(names), np.arange(len(games))
        first, second = (
            np.array([place[name] for name in side])
            for side in ([game.first for game in games], [game.second for game in games])
        )
        design = np.zeros((len(games), 3, systems + 1))
        design[rows, 0, first] = design[rows, 1, second] = 1
        design[rows, 2, first] = design[rows, 2, second] = 0.5
        design[:, 2, systems] = 1
        outcomes = np.array([_outcome(game.score) for game in games])
        if with_ties:
            return cls(design, outcomes)
        return cls(design[:, :2, :systems], outcomes[:, :2])


def _fit(table: _Table) -> tuple[Floats, Floats, Floats]:
    """Parameters, their information matrix and the games' residuals [games, outcomes]."""
    design, outcomes = table
    ridge = RIDGE * len(design) * np.eye(design.shape[2])
    values = np.zeros(design.shape[2])
    for _ in range(_STEPS):
        chances = np.exp(log_softmax(design @ values, axis=1))
        residuals = outcomes - chances
        centred = design - np.einsum("gk,gkp->gp", chances, design)[:, None]
        information = np.einsum("gk,gkp,gkq->pq", chances, centred, centred) + ridge
        gradient = np.einsum("gkp,gk->p", design, residuals) - ridge @ values
        step = np.linalg.solve(information, gradient)
        if np.abs(step).max() < 1e-12:
            break
        values += np.clip(step, -2.0, 2.0)
    return values, information, residuals
