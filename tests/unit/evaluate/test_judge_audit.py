from __future__ import annotations

import numpy as np
import pytest

from amenable.errors import DataError
from amenable.evaluate.judge_audit import Row, ac1, audit, corrected_win_rate, kappa, people


def row(n: int, human: float, judge: float, longer: float = 0.5, pair: str = "") -> Row:
    return Row(str(n), pair or str(n), False, human, judge, longer)


def noisy(count: int, seed: int, right: tuple[float, float], share: float = 0.5) -> list[Row]:
    """A judge that is right in so many of people's firsts and seconds."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        human = float(rng.random() < share)
        judge = human if rng.random() < right[int(human)] else 1 - human
        found.append(row(n, human, judge))
    return found


def test_figures_equal_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    human = rng.choice([0.0, 1.0], 300)
    judge = np.where(rng.random(300) < 0.7, human, 1 - human)
    found = audit([row(n, *x) for n, x in enumerate(zip(human, judge, strict=True))], seed=0)
    first = human == 0, judge == 0
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(human, judge), abs=1e-9)
    assert found["precision"] == pytest.approx(metrics.precision_score(*first), abs=1e-9)
    assert found["recall"] == pytest.approx(metrics.recall_score(*first), abs=1e-9)
    assert found["f1"] == pytest.approx(metrics.f1_score(*first), abs=1e-9)
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(*first), abs=1e-9)
    for name in ("accuracy", "precision", "recall", "f1", "kappa", "ac1"):
        low, high = found[f"{name}_ci95"]
        assert low < found[name] < high


def test_kappa_with_ties_equals_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    human, judge = rng.choice([0.0, 0.5, 1.0], (2, 200))
    found = audit([row(n, *x) for n, x in enumerate(zip(human, judge, strict=True))], seed=0)
    assert found["kappa"] == pytest.approx(
        metrics.cohen_kappa_score((2 * human).astype(int), (2 * judge).astype(int)), abs=1e-9
    )
    assert found["decided"] == int((human != 0.5).sum())


def test_ac1_by_hand() -> None:
    """118 and 2 agree, 5 do not: p_o 0.96; chance takes most of it by kappa, little by AC1."""
    table = np.array([[[118, 5, 0], [0, 2, 0], [0, 0, 0]]]) / 125
    expected = (p := (123 + 118) / 250) * (1 - p) + (q := (2 + 7) / 250) * (1 - q)
    assert ac1(table)[0] == pytest.approx((0.96 - expected) / (1 - expected))
    assert ac1(table)[0] == pytest.approx(0.957, abs=1e-3)
    assert kappa(table)[0] == pytest.approx((0.96 - 0.929792) / (1 - 0.929792))


def test_ties_of_the_judge_count_one_half_and_those_of_people_not() -> None:
    found = audit([row(0, 1, 0.5), row(1, 0, 0.25), row(2, 0.5, 1)], seed=0, samples=20)
    assert (found["decided"], found["judge_ties"]) == (2, 1)
    assert found["accuracy"] == pytest.approx(0.75)
    with pytest.raises(DataError, match="decided in no row"):
        audit([row(0, 0.5, 1)], seed=0)


def test_a_figure_that_is_not_defined_is_none() -> None:
    found = audit([row(n, 1, 1) for n in range(5)], seed=0, samples=20)
    assert (found["precision"], found["recall"], found["kappa"]) == (None, None, None)
    assert found["accuracy"] == 1


def test_a_judge_near_chance_is_called_so() -> None:
    assert not audit(noisy(300, 0, (0.5, 0.5)), seed=0)["better_than_chance"]
    assert audit(noisy(300, 0, (0.7, 0.7)), seed=0)["better_than_chance"]


def test_people_are_the_ceiling() -> None:
    """Pair x: two of three agree, one of whom saw it turned round; y: both; z: once."""
    rows = [
        *(row(0, 1, 1, pair="x"), Row("0", "x", True, 0.0, 0.0, 0.5), row(0, 0, 1, pair="x")),
        *(row(1, 0, 0, pair="y"), row(1, 0, 0, pair="y"), row(2, 1, 0, pair="z")),
    ]
    found = people(rows)
    assert found["pairs"] == 2
    assert found["agreement"] == pytest.approx((1 / 3 + 1) / 2)
    by = audit(rows, seed=0, samples=20)["by_agreement"]
    assert by["unanimous"] == {"rows": 2, "accuracy": 1}
    assert by["contested"]["accuracy"] == pytest.approx(2 / 3)
    assert people(rows[-1:])["agreement"] is None


def test_correction_gives_the_win_rate_of_people() -> None:
    """95 %: 400 audits of 300 rows, and 300 prompts of which people give b 70 %."""
    right, inside, values = (0.75, 0.85), 0, []
    for seed in range(400):
        audited = noisy(300, seed, right)
        judged = [r.judge for r in noisy(300, 10_000 + seed, right, share=0.7)]
        corrected = corrected_win_rate(judged, audited)
        assert corrected is not None
        value, interval = corrected
        inside += 0.7 in interval
        values.append(value)
    assert np.mean(values) == pytest.approx(0.7, abs=0.01)
    assert 0.92 <= inside / 400 <= 0.98


def test_no_correction_by_a_judge_at_chance() -> None:
    assert corrected_win_rate([1.0, 0.0], noisy(100, 0, (0.3, 0.3))) is None
    assert corrected_win_rate([1.0], [row(0, 1, 1)]) is None


def test_a_perfect_share_is_not_taken_for_a_certain_one() -> None:
    """Twelve of twelve: Wilson's lower end is 12 / (12 + 1.96²)."""
    rows = [Row(str(n), str(n), False, float(n % 2), float(n % 2), 0.5) for n in range(24)]
    found = audit(rows, seed=0)
    for name in ("precision", "recall"):
        assert found[name] == 1
        assert found[f"{name}_ci95"] == pytest.approx([12 / (12 + 1.96**2), 1.0], abs=1e-3)
