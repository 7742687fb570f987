from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from amenable.config.data import DataConfig
from amenable.config.model import ModelConfig
from amenable.config.recipe import Recipe
from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker
from amenable.errors import DataError
from amenable.evaluate.folds import (
    clustered_interval,
    group_folds,
    half_step,
    held_out_accuracy,
    paired_difference,
)
from amenable.evaluate.statistics import win_rate_interval
from amenable.models.build import Foundation
from amenable.models.heads import ScalarHead
from amenable.models.tiny import build_tiny
from amenable.train.reward import pair_margins, preference_group, reward_gradient

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "reward_folds.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`benchmarks/reward_folds.py`; benchmarks are no package."""
    spec = importlib.util.spec_from_file_location("reward_folds", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward_folds"] = module
    spec.loader.exec_module(module)
    return module


def pair(prompt: str, good: str, bad: str, *, first: bool = True) -> Preference:
    return Preference(
        prompt=Prompt(
            messages=(Message(Speaker.USER, prompt),), id=f"{prompt}{good}", group=prompt
        ),
        candidate_0=good if first else bad,
        candidate_1=bad if first else good,
        choice=Choice.FIRST if first else Choice.SECOND,
    )


# Folds ---------------------------------------------------------------------------------------


def test_groups_stay_whole_and_every_row_is_held_out_once() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in rng.integers(0, 40, 500)]
    folds = group_folds(groups, 5, seed=3)
    assert folds.shape == (500,)
    assert set(folds.tolist()) == set(range(5))
    assert all(len({f for g, f in zip(groups, folds, strict=True) if g == n}) == 1 for n in groups)
    assert Counter(folds.tolist()).total() == 500


def test_folds_of_few_unequal_groups_are_even() -> None:
    sizes = [30, 29, 28, 27, 22, 22, 21, 19, 18, 18, 18, 17, 13, 12, 12, 9, 6]  # 17 documents
    groups = [str(name) for name, size in enumerate(sizes) for _ in range(size)]
    counts = np.bincount(group_folds(groups, 5, seed=0))
    assert counts.sum() == 321
    assert counts.max() < 1.1 * 321 / 5  # by hash alone half of all draws have 104 or more


def test_folds_do_not_depend_on_the_order_of_rows_but_on_the_seed() -> None:
    groups = [f"g{i // 2}" for i in range(60)]
    order = np.random.default_rng(1).permutation(60)
    folds = group_folds(groups, 5, seed=0)
    assert (group_folds([groups[i] for i in order], 5, seed=0) == folds[order]).all()
    assert (group_folds(groups, 5, seed=1) != folds).any()


@pytest.mark.parametrize("folds", [1, 4])
def test_impossible_folds_are_refused(folds: int) -> None:
    with pytest.raises(DataError, match=f"{folds} folds of 3 groups"):
        group_folds(["a", "b", "c", "c"], folds, seed=0)


# Intervals -----------------------------------------------------------------------------------


def test_half_step_counts_a_draw_as_one_half() -> None:
    assert half_step([2.0, -0.1, 0.0]).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_margins_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        half_step([1.0, bad])


def test_rows_of_a_group_that_agree_count_as_one() -> None:
    groups = [f"g{i // 10}" for i in range(200)]
    correct = np.repeat(np.arange(20) % 2, 10).astype(float)  # whole groups right or wrong
    wide = clustered_interval(correct, groups)
    narrow = clustered_interval(np.tile([0.0, 1.0], 100), [str(i) for i in range(200)])
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    # twenty draws of 0 or 1: t(19) = 2.093 standard errors of 0.5/sqrt(20), less Wilson's shrinkage
    assert wide.high - wide.low == pytest.approx(2 * 2.093 * 0.5 / math.sqrt(20), rel=0.12)


def test_few_groups_take_the_quantile_of_student() -> None:
    correct = np.repeat([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 200)
    groups = np.repeat(np.arange(6), 200).tolist()
    ours, normal = clustered_interval(correct, groups), win_rate_interval(correct, groups)
    # t(5) = 2.571 against 1.960; Wilson's form shrinks both
    assert (ours.high - ours.low) / (normal.high - normal.low) == pytest.approx(1.2, abs=0.1)


def test_one_group_has_no_interval() -> None:
    with pytest.raises(DataError, match="at least two"):
        clustered_interval([1.0, 0.0], ["a", "a"])


def test_intervals_cover_with_few_groups() -> None:
    rng = np.random.default_rng(7)
    held = paired = 0
    for _ in range(400):
        groups = np.repeat(np.arange(17), rng.integers(6, 31, 17))
        right = rng.beta(0.7 * 8, 0.3 * 8, 17)[groups]
        correct = (rng.random(groups.size) < right).astype(float)
        coin = (rng.random(groups.size) < 0.5).astype(float)
        held += 0.7 in clustered_interval(correct, groups.tolist())
        paired += 0.2 in paired_difference(correct, coin, groups.tolist())[1]
    assert held / 400 > 0.915  # the normal quantile covers 0.917 in 2,000; 0.915 is 3 errors below
    assert paired / 400 > 0.90


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(2)
    base = (rng.random(400) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:40]] = 1.0
    groups = [str(i // 2) for i in range(400)]
    gain, interval = paired_difference(better, base, groups)
    assert gain == pytest.approx(0.1)
    assert interval.low > 0.06  # unpaired, the interval would reach below 0.04
    back, mirrored = paired_difference(base, better, groups)
    assert back == pytest.approx(-gain)
    assert mirrored.low == pytest.approx(-interval.high)


def test_a_model_that_equals_its_baseline_has_an_interval_around_zero() -> None:
    same = np.tile([0.0, 1.0], 20)
    gain, interval = paired_difference(same, same, list(range(40)))
    assert gain == 0
    assert -0.2 < interval.low < 0 < interval.high < 0.2


def test_accuracy_names_its_clusters() -> None:
    found = held_out_accuracy([1.0, -1.0, 0.0, 2.0], ["a", "a", "b", "c"])
    assert (found["rows"], found["clusters"], found["accuracy"]) == (4, 3, 0.625)
    assert found["accuracy_ci95"][0] < 0.625 < found["accuracy_ci95"][1]


# The benchmark -------------------------------------------------------------------------------


def tiny_recipe(folder: Path) -> Recipe:
    return Recipe(
        model=ModelConfig(base=str(build_tiny(folder / "tiny")), dtype="fp32"),
        data=DataConfig(max_prompt_tokens=64, max_completion_tokens=24),
    )


def many() -> list[Preference]:
    texts = ["a red fox", "a blue whale swims", "stars", "the sea is cold today", "rain"]
    return [
        pair(f"Say something of {n}.", texts[i], texts[j], first=(i + j) % 2 == 0)
        for n in ("animals", "weather")
        for i in range(5)
        for j in range(i)
    ]


def test_shared_prompts_give_the_stage_s_gradient_and_margins(
    tmp_path: Path, script: ModuleType
) -> None:
    rows = many()
    foundation = Foundation.open(tiny_recipe(tmp_path))
    role = foundation.role("reward", head=ScalarHead(64, seed=1))
    renderer = foundation.renderer
    units = script.units_of(renderer, rows, range(len(rows)), share=4)
    assert sorted(row for unit in units for row in unit.rows) == list(range(len(rows)))
    assert max(len(unit.rows) for unit in units) == 4
    assert any(len(unit.group.completions) < 2 * len(unit.rows) for unit in units)

    groups = [preference_group(renderer, row) for row in rows]
    expected = reward_gradient(role, groups, rows, renderer.pad_id, 256)
    wanted = [torch.clone(p.grad) for p in role.trainable_parameters() if p.grad is not None]
    for parameter in role.trainable_parameters():
        parameter.grad = None
    found = script.gradient(role, units, rows, renderer.pad_id, 256)
    got = [p.grad for p in role.trainable_parameters() if p.grad is not None]
    assert found["rank_loss"] == pytest.approx(expected["rank_loss"], abs=1e-5)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    ours = script.margins_of(role, units, range(len(rows)), renderer.pad_id, 256)
    np.testing.assert_allclose(ours, pair_margins(role, renderer, rows, 256), atol=1e-5)


def test_every_fold_starts_from_the_same_weights(tmp_path: Path, script: ModuleType) -> None:
    rows = many()
    trainer = script.Trainer(tiny_recipe(tmp_path), 4)
    config = script.STAGE
    first = trainer.margins(config, rows, range(10), range(10, 20))
    trainer.margins(config, rows, range(10, 20), range(10))
    again = trainer.margins(config, rows, range(10), range(10, 20))
    np.testing.assert_array_equal(first, again)


def test_frozen_features_separate_what_words_do(tmp_path: Path, script: ModuleType) -> None:
    rows = [pair(f"Say {n}.", "good " * (1 + n % 3), "bad " * (1 + n % 4)) for n in range(40)]
    trainer = script.Trainer(tiny_recipe(tmp_path), 4)
    features = trainer.features(rows)
    assert features.shape == (40, 2, 64)
    task = script.Task("t", rows, [list(range(0, 40, 2)), list(range(1, 40, 2))])
    for name in ("frozen", "frozen-last", "frozen-mean"):
        margins = script.fold_margins(script.SETTINGS[name], task, 1, trainer)
        assert half_step(margins).mean() == 1.0


def test_pooled_margins_stand_in_the_order_of_rows(script: ModuleType) -> None:
    task = script.Task("t", many(), [[1, 3, 5], [0, 2, 4]])
    assert task.pool([np.array([1.0, 3, 5]), np.array([0.0, 2, 4])]).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_stopped_run_goes_on_from_its_log(tmp_path: Path, script: ModuleType) -> None:
    path = tmp_path / "log.jsonl"
    log = script.Log(path, {"seed": 0})
    log.add(np.array([0.5, -1.0]), 1.0, file="f", setting="stage", fold=0)
    again = script.Log(path, {"seed": 0})
    assert again.find(file="f", setting="stage", fold=0).tolist() == [0.5, -1.0]
    assert again.find(file="f", setting="stage", fold=1) is None
    assert script.Log(path, {"seed": 1}).find(file="f", setting="stage", fold=0) is None


def test_words_margins_equal_the_report_s_accuracy(script: ModuleType) -> None:
    from amenable.evaluate.reward_report import bag_of_words_accuracy

    rng = np.random.default_rng(0)
    words = np.array(["red", "green", "blue", "one", "two", "three", "four", "five", "six"])
    rows = [
        pair(str(i // 2), " ".join(rng.choice(words, 6)), " ".join(rng.choice(words[2:], 5)))
        for i in range(80)
    ]
    margins = script.word_margins(rows[:60], rows[60:], 0)
    assert half_step(margins).mean() == bag_of_words_accuracy(rows[:60], rows[60:], 0)
