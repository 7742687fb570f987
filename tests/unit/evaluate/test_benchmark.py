"""Comparisons of scores, and the shape of the harness's results.

`lm_eval_results.json` is what `simple_evaluate` of lm-eval 0.4.13 returned for two tiny models on a
group of two tasks (10 and 40 documents; `tests/peers/test_lm_eval.py` has them), prompts and
environment left out; that test also holds its keys to the installed harness.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from amenable.errors import StageError
from amenable.evaluate.benchmark import compared
from amenable.evaluate.harness import Group, Scores, scores_of, tasks_of

RECORDED = json.loads((Path(__file__).parent / "lm_eval_results.json").read_text())
TASKS = ("both::small", "both::large")
POOLED = Group("both", "acc", None, True, TASKS)


def scores(
    values: Sequence[Any], *, task: str = "task", better: bool | None = True, **fields: Any
) -> Scores:
    found = {
        "task": task,
        "metric": "acc",
        "filter": "none",
        "higher_is_better": better,
        "aggregate": None,
        "documents": dict(enumerate(values)),
        "hashes": {n: f"hash {n}" for n in range(len(values))},
    }
    return Scores(**(found | fields))


def only(before: Scores, after: Scores) -> dict[str, Any]:
    (row,) = compared({"base": [before], "tuned": [after]})
    return row


def test_recorded_results_are_read_as_the_harness_reckons_them() -> None:
    systems = {name: scores_of(results, {}) for name, results in RECORDED.items()}
    rows = {(row["task"], row["metric"]): row for row in compared(systems, [POOLED])}
    assert {task for task, _ in rows} == {*TASKS, "both"}
    assert {metric for _, metric in rows} == {"acc", "acc_norm"}
    for (task, metric), row in rows.items():
        for side in ("before", "after"):
            expected = RECORDED[side]["results"][task][f"{metric},none"]
            assert row[f"{side}_value"] == pytest.approx(expected)
    large = rows["both::large", "acc"]
    samples = [RECORDED[side]["samples"]["both::large"] for side in ("before", "after")]
    moves = [b["acc"] - a["acc"] for a, b in zip(*samples, strict=True)]
    assert (large["improved"], large["worsened"]) == (moves.count(1), moves.count(-1))
    assert large["documents"] == 40
    assert rows["both", "acc"]["documents"] == 50


def test_recorded_tasks() -> None:
    assert tasks_of(RECORDED["after"]) == [
        {"task": task, "version": "Yaml", "data": "json", "few_shot": 0, "documents": n, "of": n}
        for task, n in zip(TASKS, (10, 40), strict=True)
    ]


@pytest.mark.parametrize(
    ("better", "worse_after", "verdict", "told"),
    [
        (True, True, "cost", "cost: acc fell from 0.500 to 0.400"),
        (True, False, "gain", "gain: acc rose from 0.400 to 0.500"),
        (False, True, "gain", "gain: acc fell from 0.500 to 0.400"),
        (False, False, "cost", "cost: acc rose from 0.400 to 0.500"),
        (None, True, "changed", "changed: acc fell from 0.500 to 0.400"),
    ],
)
def test_verdict_knows_which_way_is_better(
    better: bool | None, worse_after: bool, verdict: str, told: str
) -> None:
    high, low = [1] * 100 + [0] * 100, [1] * 80 + [0] * 120
    sides = (high, low) if worse_after else (low, high)
    row = only(*(scores(side, better=better) for side in sides))
    assert (row["verdict"], row["meaning"]) == (verdict, told)
    moved = (row["improved"], row["worsened"])
    assert moved == ((20, 0) if verdict == "gain" else (0, 20))


@pytest.mark.parametrize(("better", "loss"), [(True, 0), (False, 1)])
def test_nothing_shown_says_what_is_ruled_out(better: bool, loss: int) -> None:
    """Won 8 and lost 4 of 200: whichever way is worse, that end of the interval is the loss."""
    before = [1] * 104 + [0] * 96
    row = only(
        scores(before, better=better),
        scores([1] * 100 + [0] * 4 + [1] * 8 + [0] * 88, better=better),
    )
    end = abs(row["difference_ci95"][loss])
    assert row["verdict"] == "nothing shown"
    assert row["meaning"] == (
        f"nothing shown: a loss of more than {end:.3f} is unlikely, and a difference of "
        f"{row['smallest_detectable']:.3f} would have shown"
    )


def test_one_finding_among_many_may_be_chance() -> None:
    """11 lost of 200, p 0.0017: stands among 20 figures (0.034), not among 30 (0.052)."""
    answers = [1] * 100 + [0] * 100
    lost = [0] * 11 + answers[11:]
    for others, chance in ((19, False), (29, True)):
        names = [f"same {n}" for n in range(others)]
        same = [scores(answers, task=name) for name in names]
        rows = compared({"base": [*same, scores(answers)], "tuned": [*same, scores(lost)]})
        row = rows[-1]
        assert row["verdict"] == "cost"
        assert row["p_holm"] == pytest.approx(row["p_value"] * len(rows))
        assert (f"among {len(rows)} figures may be chance" in row["meaning"]) is chance


def test_few_documents_say_little() -> None:
    assert only(scores([1] * 99), scores([0] * 99))["meaning"].endswith("; 99 documents say little")
    assert "little" not in only(scores([1] * 100), scores([0] * 100))["meaning"]


def test_every_pair_of_systems_is_compared() -> None:
    systems = {name: [scores([1, 0])] for name in ("base", "sft", "tuned")}
    pairs = [(row["before"], row["after"]) for row in compared(systems)]
    assert pairs == [("base", "sft"), ("base", "tuned"), ("sft", "tuned")]


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(StageError, match="task: the systems were asked different documents"):
        only(scores([1, 0]), scores([1, 0], hashes={0: "hash 0", 1: "another"}))


def test_documents_without_the_metric_are_left_out_of_both() -> None:
    hashes = dict.fromkeys(range(3), "same")
    row = only(
        scores([], documents={0: 1, 1: 1, 2: 0}, hashes=hashes),
        scores([], documents={0: 0, 2: 0}, hashes=hashes),
    )
    assert (row["documents"], row["before_value"], row["after_value"]) == (2, 0.5, 0)


def test_a_metric_of_pairs_is_resampled_by_its_own_rule() -> None:
    """Sums of errors over sums of words: 30 / 300, then 60 / 300; the values are no numbers."""

    def rate(rows: list[Any]) -> float:
        return sum(errors for errors, _ in rows) / sum(words for _, words in rows)

    before, after = [(1, 10)] * 30, [(2, 10)] * 30
    row = only(*(scores(side, better=False, aggregate=rate) for side in (before, after)))
    assert (row["before_value"], row["after_value"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert row["improved"] is row["worsened"] is None
    assert row["verdict"] == "cost"


def test_groups_have_rows_only_for_means_and_their_filters() -> None:
    def total(rows: list[Any]) -> float:
        return float(sum(rows))

    parts = [scores([1, 0], task="a"), scores([1, 1], task="b", filter="strict")]
    summed = [scores([1, 0], task=name, metric="sum", aggregate=total) for name in "ab"]
    rules = [
        Group("all", "acc", None, True, ("a", "b")),
        Group("named", "acc", ("strict",), True, ("a", "b")),
        Group("one", "acc", None, True, ("b",)),
        Group("summed", "sum", None, True, ("a", "b")),
    ]
    rows = compared({"base": [*parts, *summed], "tuned": [*parts, *summed]}, rules)
    found = [(row["task"], row["filter"], row["documents"]) for row in rows[4:]]
    assert found == [
        ("all", "none", 2),
        ("all", "strict", 2),
        ("named", "strict", 2),
        ("one", "strict", 2),
    ]
