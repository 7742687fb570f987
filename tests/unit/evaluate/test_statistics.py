from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amenable.errors import DataError
from amenable.evaluate import statistics as S

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60)


def test_win_rate_counts_ties_one_half() -> None:
    """3 wins, 2 ties, 5 losses of 10: (3 + 1) / 10."""
    assert S.win_rate([1, 1, 1, 0.5, 0.5, 0, 0, 0, 0, 0]) == pytest.approx(0.4)


@pytest.mark.parametrize("bad", [[], [[0.5]], [0.5, math.nan], [1.2], [-0.1]])
def test_scores_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError, match="win-rate scores"):
        S.win_rate(bad)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_table(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    interval = S.wilson(successes, n)
    assert interval.as_list() == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(DataError, match="proportion"):
        S.wilson(successes, n)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (200, 400), (400, 400)])
def test_wilson_equals_statsmodels(successes: int, n: int) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(successes, n, method="wilson")
    assert S.wilson(successes, n).as_list() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("wins", [0, 1, 57, 100])
def test_interval_without_ties_is_wilsons(wins: int) -> None:
    scores = [1.0] * wins + [0.0] * (100 - wins)
    assert S.win_rate_interval(scores).as_list() == pytest.approx(S.wilson(wins, 100).as_list())


def test_interval_is_never_a_point() -> None:
    assert S.win_rate_interval(np.ones(400)).low == pytest.approx(400 / (400 + 1.959964**2))
    assert S.win_rate_interval(np.full(400, 0.5)).high - 0.5 == pytest.approx(0.0035, abs=5e-4)
    assert S.win_rate_interval([1.0]).low < 0.25


def test_ties_carry_information() -> None:
    """Half ties halve the variance of the mean: the interval shrinks by sqrt(2)."""
    decisive = S.win_rate_interval([1, 0] * 200)
    tied = S.win_rate_interval([1, 0, 0.5, 0.5] * 100)
    ratio = (decisive.high - decisive.low) / (tied.high - tied.low)
    assert ratio == pytest.approx(math.sqrt(2), abs=0.01)


def test_rows_of_one_prompt_count_once() -> None:
    """Four identical rows a prompt say no more than one."""
    once = S.win_rate_interval([1.0] * 60 + [0.0] * 40)
    four = S.win_rate_interval([1.0] * 240 + [0.0] * 160, [k // 4 for k in range(400)])
    assert four.as_list() == pytest.approx(once.as_list(), abs=0.01)
    with pytest.raises(DataError, match="group labels"):
        S.win_rate_interval([1.0, 0.0], ["a"])


@given(SCORES)
def test_swapping_sides_mirrors_rate_and_interval(scores: list[float]) -> None:
    there, back = S.win_rate_interval(scores), S.win_rate_interval([1 - s for s in scores])
    assert S.win_rate(scores) in there
    assert [1 - there.high, 1 - there.low] == pytest.approx(back.as_list(), abs=1e-9)


@pytest.mark.parametrize("n", [200, 400])
@pytest.mark.parametrize(
    ("rate", "ties"), [(0.5, 0.0), (0.5, 0.6), (0.6, 0.2), (0.8, 0.3), (0.95, 0.0)]
)
def test_interval_covers_the_truth(n: int, rate: float, ties: float) -> None:
    rng = np.random.default_rng(7)
    chances = [rate - ties / 2, ties, 1 - rate - ties / 2]
    draws = rng.choice([1.0, 0.5, 0.0], p=chances, size=(600, n))
    covered = np.mean([rate in S.win_rate_interval(scores) for scores in draws])
    assert 0.92 <= covered <= 0.98


def test_clustered_interval_covers_and_the_row_interval_does_not() -> None:
    """Four rows a prompt with a common chance of winning, Beta(1.5, 1) with mean 0.6."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(50), 4).tolist()
    clustered, rows = 0, 0
    for _ in range(600):
        scores = (rng.random(200) < np.repeat(rng.beta(1.5, 1, 50), 4)).astype(float)
        clustered += 0.6 in S.win_rate_interval(scores, groups)
        rows += 0.6 in S.win_rate_interval(scores)
    assert 0.92 <= clustered / 600 <= 0.98
    assert rows / 600 < 0.9


def test_one_stratum_is_a_plain_win_rate() -> None:
    rng = np.random.default_rng(5)
    scores, groups = rng.choice([0, 0.5, 1, 0.3], 80), (np.arange(80) // 3).tolist()
    for of in (None, groups):
        found = S.balanced_interval(scores, ["a"] * 80, groups=of)
        expected = S.win_rate_interval(scores, of)
        assert found.as_list() == pytest.approx(expected.as_list(), abs=1e-12)
    assert S.balanced_win_rate(scores, ["a"] * 80) == pytest.approx(scores.mean(), abs=1e-12)


def test_balanced_interval_by_brute_force() -> None:
    """The variance as a sum over all pairs of rows of one prompt, the interval by statsmodels."""
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    rng = np.random.default_rng(6)
    scores = rng.choice([0.0, 0.5, 1.0], 60)
    strata = rng.choice(["a", "b", "c"], 60, p=[0.6, 0.3, 0.1]).tolist()
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    prompts = rng.integers(0, 40, 60).tolist()
    rows = list(zip(scores.tolist(), strata, prompts, strict=True))
    rows += [(score, name, f"{name}{score}") for name in shares for score in (0.0, 1.0)]
    sizes = {name: strata.count(name) for name in shares}
    means = {name: sum(s for s, of, _ in rows if of == name) / (sizes[name] + 2) for name in shares}

    def pull(row: tuple[float, str, object]) -> float:
        score, name, _ = row
        return shares[name] * (score - means[name]) / (sizes[name] * (sizes[name] + 2)) ** 0.5

    variance = sum(pull(a) * pull(b) for a in rows for b in rows if a[2] == b[2])
    clusters = len({row[2] for row in rows})
    variance *= clusters / (clusters - 1)
    mean = sum(shares[name] * means[name] for name in shares)
    trials = mean * (1 - mean) / variance
    rate = sum(
        shares[name] * np.mean([s for s, of in zip(scores, strata, strict=True) if of == name])
        for name in shares
    )
    assert S.balanced_win_rate(scores, strata, shares) == pytest.approx(rate, abs=1e-12)
    expected = proportion.proportion_confint(rate * trials, trials, method="wilson")
    found = S.balanced_interval(scores, strata, shares, prompts)
    assert found.as_list() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(DataError, match="names of strata"):
        S.balanced_win_rate(scores, strata[1:])


@pytest.mark.parametrize(
    ("sizes", "rates"), [((150, 50), (0.9, 0.4)), ((40, 160), (0.5, 0.7)), ((30, 20), (0.95, 0.9))]
)
def test_balanced_interval_covers_the_truth(
    sizes: tuple[int, int], rates: tuple[float, float]
) -> None:
    """Two unequal strata; the interval that takes all rows for one covers less or wanders off."""
    rng = np.random.default_rng(8)
    strata = ["a"] * sizes[0] + ["b"] * sizes[1]
    chances = np.repeat(rates, sizes)
    draws = (rng.random((600, sum(sizes))) < chances).astype(float)
    covered = np.mean([np.mean(rates) in S.balanced_interval(row, strata) for row in draws])
    assert 0.92 <= covered <= 0.98


def test_balanced_interval_covers_where_prompts_stand_in_both_strata() -> None:
    """One row of each stratum a prompt, with a common chance; as if apart, it covers less."""
    rng = np.random.default_rng(9)
    strata, prompts = ["a", "b"] * 100, np.repeat(np.arange(100), 2).tolist()
    covered = apart = 0
    for _ in range(600):
        row = (rng.random(200) < np.repeat(rng.beta(0.6, 0.4, 100), 2)).astype(float)
        covered += 0.6 in S.balanced_interval(row, strata, groups=prompts)
        apart += 0.6 in S.balanced_interval(row, strata)
    assert 0.92 <= covered / 600 <= 0.98
    assert apart / 600 < 0.92


def test_sign_test_by_hand() -> None:
    """9 of 10: 2 (C(10,9) + C(10,10)) / 2^10 = 22 / 1024."""
    assert S.sign_test_p(9, 1) == pytest.approx(22 / 1024)
    assert S.sign_test_p(1, 9) == pytest.approx(22 / 1024)
    assert S.sign_test_p(5, 5) == 1.0
    assert S.sign_test_p(0, 0) == 1.0


@given(st.integers(0, 300), st.integers(1, 300))
def test_sign_test_equals_scipys(wins: int, losses: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(wins, wins + losses, 0.5).pvalue
    assert S.sign_test_p(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "difference"), [(805, 0.05), (210, 0.10), (90, 0.15), (55, 0.20)])
def test_smallest_detectable_difference(n: int, difference: float) -> None:
    """Sizes for 80 % power of the exact sign test at 55, 60, 65 and 70 %."""
    assert S.smallest_detectable_difference(n) == pytest.approx(difference, abs=0.003)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_prompts_detect_nothing(n: int) -> None:
    """Even 5 of 5 has p = 2/32 > 0.05."""
    assert S.smallest_detectable_difference(n) == 0.5
    assert S.smallest_detectable_difference(6) < 0.5


# Length control


def _game(rng: np.random.Generator, n: int, rate: float, phi: float) -> tuple[np.ndarray, ...]:
    difference = rng.normal(3, 6, n).round()
    chance = 1 / (1 + np.exp(-(math.log(rate / (1 - rate)) + phi * np.tanh(difference / 6))))
    first = rng.random(n) < chance
    second = np.where(rng.random(n) < 0.5, first, rng.random(n) < chance)
    return 0.5 * first + 0.5 * second, np.full(n, 10.0), 10.0 + difference


def test_length_control_equals_statsmodels() -> None:
    api = pytest.importorskip("statsmodels.api")
    scores, a, b = _game(np.random.default_rng(0), 300, 0.6, 1.2)
    design = np.stack([np.ones(300), np.tanh((b - a) / (b - a).std())], axis=1)
    theta = api.GLM(scores, design, family=api.families.Binomial()).fit().params[0]
    expected = 1 / (1 + math.exp(-theta))
    assert S.length_controlled_win_rate(scores, a, b) == pytest.approx(expected, abs=1e-6)


def test_length_control_without_length_differences_is_the_win_rate() -> None:
    scores = [1, 1, 0.5, 0, 1]
    assert S.length_controlled_win_rate(scores, [4] * 5, [4] * 5) == pytest.approx(0.7, abs=1e-6)
    assert S.length_controlled_win_rate(scores, [4] * 5, [9] * 5) > 0.5


def test_length_control_takes_out_a_bonus_for_length() -> None:
    """At equal length the systems are even; b is longer and the judge likes that."""
    scores, a, b = _game(np.random.default_rng(1), 20_000, 0.5, 1.5)
    assert S.win_rate(scores) > 0.58
    assert S.length_controlled_win_rate(scores, a, b) == pytest.approx(0.5, abs=0.015)


def test_length_control_survives_separation() -> None:
    lengths_a, lengths_b = np.arange(50.0), np.arange(50.0)[::-1].copy()
    scores = (lengths_b > lengths_a).astype(float)
    assert 0 <= S.length_controlled_win_rate(scores, lengths_a, lengths_b) <= 1
    interval = S.length_controlled_interval(np.ones(50), lengths_a, lengths_b, seed=0, samples=200)
    assert interval.low < 0.97
    assert interval.high > 0.99


def test_length_controlled_interval_is_seeded_and_mirrored() -> None:
    scores, a, b = _game(np.random.default_rng(2), 100, 0.7, 1.0)
    first = S.length_controlled_interval(scores, a, b, seed=1, samples=300)
    assert first == S.length_controlled_interval(scores, a, b, seed=1, samples=300)
    assert first != S.length_controlled_interval(scores, a, b, seed=2, samples=300)
    assert S.length_controlled_win_rate(scores, a, b) in first
    rate = S.length_controlled_win_rate(scores, a, b)
    assert S.length_controlled_win_rate(1 - scores, b, a) == pytest.approx(1 - rate, abs=1e-9)


@pytest.mark.parametrize(("n", "rate", "phi"), [(200, 0.6, 1.5), (200, 0.8, 1.0), (400, 0.5, 1.0)])
def test_length_controlled_interval_covers_the_truth(n: int, rate: float, phi: float) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(250):
        game = _game(rng, n, rate, phi)
        covered += rate in S.length_controlled_interval(*game, seed=seed, samples=250)
    assert 0.92 <= covered / 250 <= 0.98


# Calibration


def test_calibration_error_by_hand() -> None:
    """Two bins of two: |0.5 - 0.6| and |1 - 0.9|, each half of the rows: 0.1."""
    confidence, correct = [0.9, 0.6, 0.6, 0.9], [1, 0, 1, 1]
    assert S.expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.1)
    bins = S.calibration_bins(confidence, correct, bins=2)
    assert [(b.n, b.accuracy) for b in bins] == [(2, 0.5), (2, 1.0)]
    assert S.expected_calibration_error([], []) == 0.0
    assert S.calibration_error_null([], seed=0) == 0.0


def test_calibration_bins_equal_scikit_learns_quantile_bins() -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(0)
    p = rng.random(1000)
    y = (rng.random(1000) < p).astype(float)
    true, mean = calibration.calibration_curve(y, p, n_bins=10, strategy="quantile")
    bins = S.calibration_bins(p, y)
    assert [b.accuracy for b in bins] == pytest.approx(true.tolist())
    assert [b.confidence for b in bins] == pytest.approx(mean.tolist())


def test_calibrated_models_stay_inside_the_null_band() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for seed in range(300):
        p = rng.uniform(0.5, 1, 200)
        error = S.expected_calibration_error(p, rng.random(200) < p)
        inside += error <= S.calibration_error_null(p, seed=seed, samples=200)
    assert inside / 300 >= 0.93


def test_temperature_is_recovered() -> None:
    """Choices follow sigmoid(d); the model says 2 d, so T = 2."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1.5, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    assert S.fit_temperature(2 * margins) == pytest.approx(2.0, abs=0.1)


def test_temperature_without_an_optimum_stops_at_its_bounds() -> None:
    assert S.fit_temperature([1.0, 2.0]) == pytest.approx(0.01)
    assert S.fit_temperature([-1.0, -2.0]) == pytest.approx(100.0)


def test_proper_scores_equal_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    p, y = rng.uniform(0.01, 0.99, 200), rng.integers(0, 2, 200)
    assert S.brier(p, y) == pytest.approx(metrics.brier_score_loss(y, p), abs=1e-12)
    margins = np.log(p / (1 - p)) * np.where(y == 1, 1, -1)
    assert S.log_loss(margins) == pytest.approx(metrics.log_loss(y, p), abs=1e-12)
    assert S.log_loss([-1000.0]) == 1000.0


# Diversity


def test_distinct_n_by_hand() -> None:
    """`a b a` and `A b`: words a, b of 5; pairs ab, ba of 3."""
    texts = ["a b a", "A b"]
    assert S.distinct_n(texts, 1) == pytest.approx(2 / 5)
    assert S.distinct_n(texts, 2) == pytest.approx(2 / 3)
    assert S.distinct_n(texts, 4) == 0.0


def test_duplicate_share() -> None:
    assert S.duplicate_share(["x y", "X  y", "z", "x y"]) == 0.5
    assert S.duplicate_share([]) == 0.0
