from __future__ import annotations

import json

import numpy as np
import pytest

from amenable.errors import DataError
from amenable.evaluate.side_by_side import compare, verdicts

RNG = np.random.default_rng(0)
A, B = RNG.normal(0, 1, 80), RNG.normal(0.3, 1, 80)
LENGTH_A, LENGTH_B = RNG.integers(5, 20, 80), RNG.integers(5, 25, 80)


def test_second_system_wins_where_its_score_is_higher() -> None:
    assert verdicts([1, 1, 1], [2, 1, 0]).tolist() == [1.0, 0.5, 0.0]


def test_identical_texts_are_ties_whatever_the_scores() -> None:
    entry = compare("sft", "tuned", "annotator", [0, 0], [1, 1], [3, 3], [3, 3], seed=0,
                    bootstrap_samples=50, identical=[True, False])  # fmt: skip
    assert (entry["wins"], entry["ties"], entry["losses"]) == (1, 1, 0)
    assert entry["win_rate"] == 0.75


def test_entry_has_the_keys_of_the_summary_and_plain_values() -> None:
    entry = compare(
        "sft", "tuned", "annotator", A, B, LENGTH_A, LENGTH_B, seed=0, bootstrap_samples=100
    )
    wanted = (
        "a b judge prompts wins ties losses win_rate win_rate_ci95 length_controlled_win_rate "
        "length_controlled_ci95 p_value smallest_detectable mean_length_a mean_length_b"
    )
    assert set(entry) == set(wanted.split())
    assert json.loads(json.dumps(entry)) == entry
    assert entry["wins"] + entry["ties"] + entry["losses"] == entry["prompts"] == 80
    assert entry["win_rate_ci95"][0] < entry["win_rate"] < entry["win_rate_ci95"][1]


def test_swapping_the_systems_mirrors_the_result() -> None:
    there = compare("a", "b", "j", A, B, LENGTH_A, LENGTH_B, seed=0, bootstrap_samples=50)
    back = compare("b", "a", "j", B, A, LENGTH_B, LENGTH_A, seed=0, bootstrap_samples=50)
    assert there["win_rate"] + back["win_rate"] == pytest.approx(1)
    both = there["length_controlled_win_rate"] + back["length_controlled_win_rate"]
    assert both == pytest.approx(1, abs=1e-9)
    assert there["p_value"] == back["p_value"]


def test_all_ties_show_nothing() -> None:
    entry = compare("a", "b", "j", [1, 1], [1, 1], [1, 1], [1, 1], seed=0, bootstrap_samples=50)
    assert entry["win_rate"] == 0.5
    assert entry["p_value"] == 1.0
    assert entry["smallest_detectable"] == 0.5


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "one score a prompt"),
        ([1], [1, 2], "one score a prompt"),
        ([np.nan], [1], "not finite"),
    ],
)
def test_bad_scores_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare("a", "b", "j", a, b, a, b, seed=0)


def test_missing_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="one length a completion"):
        compare("a", "b", "j", [1, 2], [2, 1], [1], [1], seed=0)
