"""Verdicts in both orders; every interval against simulated evaluations."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import DataError
from amenable.evaluate import statistics as S
from amenable.evaluate.both_orders import Orders, confidences, holm, judge_bias, slices
from amenable.judges import Reply, Verdict
from amenable.judges.asking import Look, Pair

FIRST, SECOND, TIE, BOTH_BAD, INVALID = Verdict
REPLIES = {verdict: Reply(verdict) for verdict in Verdict}


@cache
def pair(name: str) -> Pair:
    return Pair(Prompt(messages=(Message(Speaker.USER, name),), id=name, group=name), "a", "b")


def look(name: str, swapped: bool, verdict: Verdict) -> Look:
    """At the pair of the prompt of this name."""
    return Look(pair(name), swapped, REPLIES[verdict])


def test_a_preference_for_a_place_cancels() -> None:
    """p: the judge likes what is first; q: b in both orders; r: b once, else a tie."""
    looks = [
        *(look("p", False, FIRST), look("p", True, FIRST)),
        *(look("q", False, SECOND), look("q", True, FIRST)),
        *(look("r", False, BOTH_BAD), look("r", True, FIRST)),
    ]
    orders = Orders.of(looks)
    assert orders.prompts == ("p", "q", "r")
    assert orders.by_order.tolist() == [[0, 1], [1, 1], [0.5, 1]]
    assert orders.scores.tolist() == [0.5, 1, 0.75]


def test_repeats_are_averaged_within_their_order() -> None:
    """Three looks in one order weigh as much as one in the other."""
    looks = [look("p", False, v) for v in (SECOND, SECOND, FIRST)] + [look("p", True, SECOND)]
    assert Orders.of(looks).scores.tolist() == [pytest.approx((2 / 3 + 0) / 2)]


def test_a_prompt_needs_a_valid_verdict_in_both_orders() -> None:
    looks = [
        *(look("p", False, TIE), look("p", True, INVALID)),
        *(look("q", False, TIE), look("q", True, TIE), look("q", True, INVALID)),
        look("r", False, FIRST),
    ]
    orders = Orders.of(looks)
    assert (orders.prompts, orders.left_out) == (("q",), ("p", "r"))
    with pytest.raises(DataError, match="of 2 prompts none"):
        Orders.of([one for one in looks if one.pair.prompt.id != "q"])


def test_bias_by_hand() -> None:
    """Looks that the first wins: p 2 of 2, q 1 of 2, r half and one."""
    looks = [
        *(look("p", False, FIRST), look("p", True, FIRST)),
        *(look("q", False, SECOND), look("q", True, FIRST)),
        *(look("r", False, TIE), look("r", True, FIRST)),
    ]
    found = judge_bias(Orders.of(looks), {"p": 3, "q": 5, "r": 4}, {"p": 3, "q": 2, "r": 9})
    assert found["first_wins"] == pytest.approx(4.5 / 6)
    assert found["flips"] == pytest.approx(1 / 3)
    assert found["longer_wins"] == pytest.approx((0 + 0.75) / 2)
    assert found["longer_prompts"] == 2
    same = dict.fromkeys("pqr", 1.0)
    assert judge_bias(Orders.of(looks), same, same)["longer_wins"] is None


def test_confidences_are_of_b_by_order() -> None:
    """p: 0.9 for a, then 0.7 for b; q: two looks in one order, none told in the other."""
    looks = [
        Look(pair("q"), False, Reply(FIRST, confidence=0.8)),
        Look(pair("q"), False, Reply(SECOND, confidence=0.4)),
        Look(pair("q"), True, Reply(FIRST)),
        Look(pair("q"), True, Reply(INVALID, confidence=0.9)),
        Look(pair("p"), False, Reply(FIRST, confidence=0.9)),
        Look(pair("p"), True, Reply(FIRST, confidence=0.7)),
        Look(pair("r"), True, Reply(FIRST, confidence=0.7)),
    ]
    found = confidences(looks, ("p", "q"))
    assert found == pytest.approx(np.array([[0.1, 0.7], [0.4, np.nan]]), nan_ok=True)
    assert confidences(looks, ()).shape == (0, 2)


def test_holm_equals_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        p = rng.random(size) ** 3
        assert holm(p.tolist()) == pytest.approx(multitest.multipletests(p, method="holm")[1])
    assert holm([]) == []


def test_slices() -> None:
    scores = np.array([1, 1, 1, 1, 1, 1, 0, 0.75, 0.5])
    members = {"all": np.ones(9, bool), "none": np.zeros(9, bool), "last": np.arange(9) > 5}
    rows = slices(scores, members)
    assert [(row["slice"], row["prompts"]) for row in rows] == [("all", 9), ("last", 3)]
    assert rows[0]["p_value"] == pytest.approx(S.sign_test_p(7, 1))
    assert rows[0]["p_holm"] == pytest.approx(2 * rows[0]["p_value"])
    assert rows[1]["win_rate"] == pytest.approx(1.25 / 3)


EVALUATIONS = 1000


def simulate(rng: np.random.Generator, n: int) -> tuple[list[Look], dict[str, float]]:
    """Prompts whose two orders go together, a judge that likes the first place and long answers.

    Latent: quality of the prompt's pair, sd 1.2, and noise of each look, sd 0.8; looks between two
    thresholds are ties.
    """
    longer = rng.normal(size=n)
    merit = 0.45 + 1.2 * rng.normal(size=n) + 0.5 * np.tanh(longer)
    looks = []
    for swapped in (False, True):
        sees = merit + (0.25 if swapped else -0.25) + 0.8 * rng.normal(size=n)
        b_wins = np.where(sees > 0.3, 1, np.where(sees < -0.3, 0, 0.5))
        verdicts = {1.0: FIRST, 0.0: SECOND, 0.5: TIE}
        of_first = b_wins if swapped else 1 - b_wins
        looks += [look(str(k), swapped, verdicts[float(x)]) for k, x in enumerate(of_first)]
    return looks, {str(k): float(x) for k, x in enumerate(longer)}


def measured(n: int, seed: int, large: bool = False) -> dict[str, tuple[float, S.Interval]]:
    """Every estimate of one evaluation with its interval; of a large one no resampling."""
    looks, longer = simulate(np.random.default_rng(seed), n)
    orders = Orders.of(looks)
    bias = judge_bias(orders, dict.fromkeys(longer, 0.0), longer)
    lengths = np.array([longer[p] for p in orders.prompts])
    zero = np.zeros(n)
    found = {
        "win_rate": (S.win_rate(orders.scores), S.win_rate_interval(orders.scores)),
        "length_controlled": (
            S.length_controlled_win_rate(orders.scores, zero, lengths),
            S.Interval(0, 1)
            if large
            else S.length_controlled_interval(orders.scores, zero, lengths, seed=seed, samples=500),
        ),
    }
    if not large:
        found["rows"] = row_bootstrap(orders, seed)
    for key in ("first_wins", "flips", "longer_wins"):
        found[key] = (bias[key], S.Interval(*bias[f"{key}_ci95"]))
    return found


def row_bootstrap(orders: Orders, seed: int) -> tuple[float, S.Interval]:
    """What not to do: both looks at a prompt drawn as if they were two prompts."""
    looks = orders.by_order.ravel()
    rng = np.random.default_rng(seed)
    means = looks[rng.integers(0, looks.size, (500, looks.size))].mean(1)
    return float(looks.mean()), S.Interval(*np.percentile(means, [2.5, 97.5]))


@cache
def truth() -> dict[str, float]:
    """Of 400,000 prompts."""
    return {key: estimate for key, (estimate, _) in measured(400_000, 10**6, large=True).items()}


@pytest.mark.parametrize("n", [200, 400])
def test_every_interval_covers_and_that_of_rows_does_not(n: int) -> None:
    covered = dict.fromkeys([*truth(), "rows"], 0)
    for seed in range(EVALUATIONS):
        for key, (_, interval) in measured(n, seed).items():
            covered[key] += truth()["win_rate" if key == "rows" else key] in interval
    shares = {key: count / EVALUATIONS for key, count in covered.items()}
    assert shares.pop("rows") < 0.92
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares
