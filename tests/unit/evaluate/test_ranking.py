from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from amenable.errors import DataError
from amenable.evaluate.ranking import Game, rank

STRENGTHS = {"p": 0.0, "q": 0.8, "r": -0.5}


def games(prompts: int, seed: int, tie: float = 0.4) -> list[Game]:
    """Every pair of three systems on every prompt; a prompt's games share a shift."""
    rng, found = np.random.default_rng(seed), []
    for n in range(prompts):
        for first, second in (("p", "q"), ("p", "r"), ("q", "r")):
            chances = davidson(STRENGTHS[first], STRENGTHS[second], tie)
            score = rng.choice([0.0, 1.0, 0.5], p=chances)
            found.append(Game(str(n), first, second, float(score)))
    return found


def davidson(first: float, second: float, tie: float) -> list[float]:
    """Chances that the first wins, that the second does, and of a tie."""
    weights = np.array([np.exp(first), np.exp(second), 2 * tie * np.exp((first + second) / 2)])
    return list(weights / weights.sum())


def test_equals_a_direct_maximisation() -> None:
    played = games(200, 1)

    def loss(values: np.ndarray) -> float:
        own = dict(zip("pqr", (*values[:2], -values[:2].sum()), strict=True))
        chances = [
            davidson(own[g.first], own[g.second], np.exp(values[2]))[
                {0.0: 0, 1.0: 1}.get(g.score, 2)
            ]
            for g in played
        ]
        return -float(np.log(chances).sum())

    wanted = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
    found = rank(played)
    assert found.names == ("q", "p", "r")
    strengths = dict(zip(found.names, found.strengths, strict=True))
    assert [strengths["p"], strengths["q"]] == pytest.approx(wanted[:2], abs=1e-5)
    assert found.tie == pytest.approx(np.exp(wanted[2]), abs=1e-5)


def test_equals_evalica_with_ties_and_choix_without() -> None:
    evalica = pytest.importorskip("evalica")
    choix = pytest.importorskip("choix")
    played = games(300, 2)
    winner = {0.0: evalica.Winner.X, 1.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    theirs = evalica.newman(
        [g.first for g in played],
        [g.second for g in played],
        [winner[g.score] for g in played],
        tolerance=1e-12,
        limit=10_000,
    )
    found = rank(played)
    ours = dict(zip(found.names, found.strengths, strict=True))
    logs = {name: np.log(theirs.scores[name]) for name in "pqr"}
    middle = np.mean(list(logs.values()))
    assert [ours[name] for name in "pqr"] == pytest.approx(
        [logs[name] - middle for name in "pqr"], abs=1e-6
    )
    decisive = [g for g in played if g.score != 0.5]
    number = {"p": 0, "q": 1, "r": 2}
    pairs = [
        (number[g.second], number[g.first]) if g.score else (number[g.first], number[g.second])
        for g in decisive
    ]
    wanted = choix.ilsr_pairwise(3, pairs, tol=1e-12)
    plain = rank(decisive)
    assert plain.tie == 0
    own = dict(zip(plain.names, plain.strengths, strict=True))
    assert [own[name] for name in "pqr"] == pytest.approx(wanted - wanted.mean(), abs=1e-6)


def test_intervals_cover_the_truth() -> None:
    """95 %: 400 evaluations of 200 prompts."""
    inside = total = 0
    for seed in range(400):
        found = rank(games(200, seed))
        for name in found.names:
            inside += STRENGTHS[name] - 0.1 in found.interval(name)
        value, interval = found.difference("p", "q")
        assert value in interval
        inside += 0.8 in interval
        total += 4
    assert 0.935 <= inside / total <= 0.965


def test_swapping_sides_changes_nothing() -> None:
    played = games(50, 3)
    turned = [Game(g.prompt, g.second, g.first, 1 - g.score) for g in played]
    ours, theirs = rank(played), rank(turned)
    assert ours.names == theirs.names
    assert ours.strengths == pytest.approx(theirs.strengths)


def test_a_system_that_always_wins_has_a_finite_strength() -> None:
    found = rank([Game(str(n), "p", "q", 1.0) for n in range(30)])
    assert found.names == ("q", "p")
    assert 3 < found.strengths[0] < 20
    assert 0 < found.interval("q").low < 2


def test_rows_are_plain() -> None:
    rows = rank(games(20, 4)).rows()
    assert [row["system"] for row in rows] == ["q", "p", "r"]
    assert rows[0]["strength_ci95"][0] < rows[0]["strength"] < rows[0]["strength_ci95"][1]


@pytest.mark.parametrize(
    ("played", "told"),
    [
        ([], "needs games"),
        ([Game("1", "p", "q", 1.5)], "must lie in"),
        ([Game("1", "p", "p", 1.0)], "against itself"),
        ([Game("1", "p", "q", 1.0), Game("1", "r", "s", 0.0)], "no chain of games"),
    ],
)
def test_games_that_say_nothing_are_refused(played: list[Game], told: str) -> None:
    with pytest.raises(DataError, match=told):
        rank(played)
