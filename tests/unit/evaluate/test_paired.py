from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import norm

from amenable.errors import DataError
from amenable.evaluate import statistics
from amenable.evaluate.paired import bootstrap_difference, mean_difference


def answers(both: int, lost: int, won: int, neither: int) -> tuple[list[int], list[int]]:
    """Right (1) or wrong (0) before and after, of so many documents each."""
    before = [1] * both + [1] * lost + [0] * won + [0] * neither
    after = [1] * both + [0] * lost + [1] * won + [0] * neither
    return before, after


def drawn(rng: np.random.Generator, n: int, won: float, lost: float) -> Sequence[np.ndarray]:
    """Answers of n documents, of which shares are won and lost, the rest alike."""
    moved = rng.choice([1, -1, 0], p=[won, lost, 1 - won - lost], size=n)
    before = np.where(moved == 0, rng.random(n) < 0.5, moved < 0).astype(float)
    return before, before + moved


def test_difference_and_p_by_hand() -> None:
    """b = 4 won, c = 12 lost of n = 100; k = b - c = -8, N = n + 2 = 102.

    z² = k²/n (N² - k²) / (N (b + c + 2) - k²) = 0.64 · 10340 / 1772 = 3.7345, p = 0.0533.
    """
    found = mean_difference(*answers(40, 12, 4, 44))
    assert (found.before, found.after) == (pytest.approx(0.52), pytest.approx(0.44))
    assert found.value == pytest.approx(-0.08)
    assert found.p_value == pytest.approx(2 * norm.sf(math.sqrt(0.64 * 10340 / 1772)))
    assert found.interval.high > 0, "as the p value is above 0.05"


def test_p_is_near_mcnemars() -> None:
    mcnemar = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    for lost, won in ((240, 300), (150, 100), (200, 200)):
        table = [[700, lost], [won, 800]]
        expected = mcnemar(table, exact=False, correction=False).pvalue
        found = mean_difference(*answers(700, lost, won, 800))
        assert found.p_value == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("moved", [(0, 0), (3, 5), (30, 8), (100, 0), (0, 100)])
def test_interval_is_the_win_rates_on_another_scale(moved: tuple[int, int]) -> None:
    """Differences -1, 0, 1 are losses, ties and wins; a win rate w is a difference of 2w - 1."""
    lost, won = moved
    before, after = answers(0, lost, won, 100 - lost - won)
    scores = [1.0] * won + [0.0] * lost + [0.5] * (100 - lost - won)
    expected = [2 * end - 1 for end in statistics.win_rate_interval(scores).as_list()]
    assert mean_difference(before, after).interval.as_list() == pytest.approx(expected)


def test_equal_systems_differ_by_nothing_but_not_surely() -> None:
    """With no document answered otherwise, up to 3 of 300 might have been (the rule of three)."""
    found = mean_difference([1, 0, 1] * 100, [1, 0, 1] * 100)
    assert (found.value, found.p_value) == (0, 1)
    assert found.interval.low == pytest.approx(-found.interval.high)
    assert 0.5 * 3 / 300 < found.interval.high < 2 * 3 / 300


def test_pairing_narrows_the_interval() -> None:
    """One document in twenty changes: two standard errors put together are three times as wide."""
    before, after = answers(190, 10, 10, 190)
    found = mean_difference(before, after)
    apart = 1.96 * math.sqrt(2 * 0.25 / 400)
    assert apart / found.interval.high == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("n", [100, 400, 1500])
@pytest.mark.parametrize(("won", "lost"), [(0.02, 0.02), (0.05, 0.1), (0.3, 0.1), (0.02, 0.06)])
def test_interval_covers_the_truth(n: int, won: float, lost: float) -> None:
    """Four of 100 documents that change are too few to be exact: it then covers more."""
    rng = np.random.default_rng(11)
    intervals = [mean_difference(*drawn(rng, n, won, lost)).interval for _ in range(600)]
    covered = np.mean([won - lost in interval for interval in intervals])
    assert 0.92 <= covered <= (0.985 if n * (won + lost) > 5 else 1)


def test_interval_covers_the_truth_of_values_between_0_and_1() -> None:
    """Such as an overlap of words; the second system is 0.02 better in the mean."""
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(600):
        before = rng.beta(2, 2, size=200) * 0.9
        after = before + rng.beta(1, 4, size=200) * 0.1
        covered += 0.02 in mean_difference(before, after).interval
    assert covered / 600 >= 0.92


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.2])
def test_a_detectable_difference_shows_in_four_of_five(lost: float) -> None:
    rng = np.random.default_rng(13)
    n = 500
    seen = [mean_difference(*drawn(rng, n, lost, lost)).detectable for _ in range(40)]
    gain = float(np.mean(seen))
    share = max(2 * lost, gain)  # of documents that are answered otherwise
    truth = ((share + gain) / 2, (share - gain) / 2)
    shown = [mean_difference(*drawn(rng, n, *truth)).p_value < 0.05 for _ in range(500)]
    assert 0.74 <= np.mean(shown) <= (0.86 if lost else 0.92), "where hardly any changes, more"


def test_weights_let_every_task_count_alike() -> None:
    """A task of 100 documents gains 0.10, one of 300 loses 0.02: (0.10 - 0.02) / 2."""
    small, large = answers(40, 0, 10, 50), answers(150, 6, 0, 144)
    weights = [1 / 100] * 100 + [1 / 300] * 300
    before, after = small[0] + large[0], small[1] + large[1]
    alike = mean_difference(before, after, weights)
    assert alike.before == pytest.approx((0.40 + 0.52) / 2)
    assert alike.value == pytest.approx(0.04)
    assert mean_difference(before, after).value == pytest.approx((10 - 6) / 400)
    equal = mean_difference(before, after, [7.0] * 400)
    assert equal == mean_difference(before, after)


def test_weighted_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(14)
    weights = [1 / 100] * 100 + [1 / 400] * 400
    covered = 0
    for _ in range(600):
        parts = [drawn(rng, 100, 0.15, 0.05), drawn(rng, 400, 0.02, 0.06)]
        before, after = (np.concatenate(side) for side in zip(*parts, strict=True))
        covered += (0.10 - 0.04) / 2 in mean_difference(before, after, weights).interval
    assert 0.92 <= covered / 600 <= 0.985


def test_swapping_the_systems_mirrors_everything() -> None:
    before, after = answers(30, 12, 5, 53)
    there, back = mean_difference(before, after), mean_difference(after, before)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.interval.as_list() == pytest.approx([-back.interval.high, -back.interval.low])
    assert there.detectable == pytest.approx(back.detectable)


@pytest.mark.parametrize(
    ("before", "after"),
    [([], []), ([1, 0], [1]), ([1, 0], [1, 2]), ([1, 0], [1, math.nan]), ([[1]], [[1]])],
)
def test_what_is_no_pair_of_shares_is_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(DataError, match=r"paired difference needs|values in \[0, 1\]"):
        mean_difference(before, after)


def test_resampled_error_of_a_mean_is_the_textbooks() -> None:
    """sd(d) / sqrt(n), whatever the unit, by 400 draws: within a tenth."""
    rng = np.random.default_rng(1)
    before = rng.normal(50, 20, size=300)
    after = before + rng.normal(1, 4, size=300)
    found = bootstrap_difference(before.tolist(), after.tolist(), lambda rows: float(np.mean(rows)))
    error = np.std(after - before, ddof=1) / math.sqrt(300)
    assert found.value == pytest.approx(np.mean(after - before))
    half = (found.interval.high - found.interval.low) / 2
    assert half == pytest.approx(1.96 * error, rel=0.1)
    assert found.detectable == pytest.approx(2.8 * error, rel=0.1)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(found.value) / (half / 1.96)), rel=1e-3)


def test_resampled_interval_of_a_perplexity_covers_the_truth() -> None:
    """exp of mean negative log-likelihoods, which move together in both systems."""
    rng = np.random.default_rng(2)
    truth = math.exp(2.1) - math.exp(2.0)
    covered = 0
    for _ in range(200):
        common = rng.normal(2.0, 0.8, size=150)
        before = (common + rng.normal(0, 0.1, size=150)).tolist()
        after = (common + 0.1 + rng.normal(0, 0.1, size=150)).tolist()
        found = bootstrap_difference(
            before, after, lambda rows: math.exp(sum(rows) / len(rows)), samples=100
        )
        covered += truth in found.interval
    assert 0.9 <= covered / 200 <= 0.99


def test_resampling_needs_two_documents_of_both() -> None:
    for before, after in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(DataError, match="two at least"):
            bootstrap_difference(before, after, max)


def test_systems_that_are_one_have_no_resampled_difference() -> None:
    found = bootstrap_difference([1.0, 5.0], [1.0, 5.0], max)
    assert (found.value, found.p_value, found.interval.as_list()) == (0, 1, [0, 0])
