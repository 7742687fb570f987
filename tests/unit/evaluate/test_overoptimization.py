"""The curves of Gao et al. and the unbiased best of n, against scipy and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import curve_fit

from amenable.evaluate.overoptimization import GoldCurve, best_of_n, best_of_n_kl, fit_gold


@pytest.mark.parametrize("shape", ["rl", "best-of-n"])
def test_the_fit_is_that_of_scipy(shape: str) -> None:
    generator = np.random.default_rng(3)
    d = np.sqrt(generator.uniform(0.01, 12, 40))
    bend = np.log if shape == "rl" else lambda x: x

    def curve(x, start, a, b):
        return start + x * (a - b * bend(x))

    y = curve(d, 0.3, 1.1, 0.4) + generator.normal(0, 0.05, 40)
    wanted, _ = curve_fit(curve, d, y, p0=(0.0, 1.0, 1.0))
    found = fit_gold(d.tolist(), y.tolist(), shape)
    assert found is not None
    assert [found.start, found.a, found.b] == pytest.approx(wanted.tolist(), abs=1e-6)


@pytest.mark.parametrize("shape", ["rl", "best-of-n"])
def test_nothing_lies_above_the_turning_point(shape: str) -> None:
    curve = GoldCurve(shape, 0.2, 1.3, 0.5)
    assert curve.turning_point is not None
    top = curve.at(curve.turning_point)
    assert top > curve.at(0.0)
    assert all(curve.at(d) <= top + 1e-12 for d in np.linspace(0, 12, 500))


def test_a_curve_that_only_rises_has_no_turning_point() -> None:
    assert GoldCurve("rl", 0.0, 1.0, 0.0).turning_point is None
    assert GoldCurve("rl", 0.0, 1.0, -0.1).turning_point is None
    assert GoldCurve("best-of-n", 0.0, -1.0, 0.1).turning_point is None
    assert GoldCurve("rl", 0.0, 1.0, 0.01).turning_point is None, "beyond all that can be measured"


def test_three_distances_are_no_curve() -> None:
    assert fit_gold([0.0, 1.0, 2.0, 2.0], [0.0, 1.0, 1.0, 1.1]) is None


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    generator = np.random.default_rng(n)
    proxy, gold = generator.normal(size=(2, 4, 5))
    wanted = np.mean(
        [
            gold[row, max(chosen, key=lambda i: proxy[row, i])]
            for row in range(4)
            for chosen in itertools.combinations(range(5), n)
        ]
    )
    assert best_of_n(proxy, gold, n) == pytest.approx(float(wanted), abs=1e-12)


def test_best_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="within 1 and the 5"):
        best_of_n(np.zeros((1, 5)), np.zeros((1, 5)), 6)


def test_the_kl_of_best_of_n() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(1.3863 - 0.75, abs=1e-4)
