from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amenable.algorithms import ALGORITHMS
from amenable.errors import NumericsError, UsageError
from amenable.lab import fixed_points, problems, settings
from amenable.lab.fixed_points import cell, controls, jobs, judged, target_of, trained
from amenable.lab.optima import kl
from amenable.lab.problems import PROBLEMS
from amenable.lab.rows import Options
from amenable.lab.runs import make_context
from amenable.lab.settings import KL_BOUND, SETTINGS, Setting

from .conftest import SMALL, OpenWorld

PPO = next(setting for setting in SETTINGS if setting.algorithm == "ppo")
DPO = next(setting for setting in SETTINGS if setting.algorithm == "dpo")


@pytest.fixture(autouse=True)
def small_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.RATES, "small", 0.2)
    monkeypatch.setitem(settings.UPDATES, "table", 60)
    monkeypatch.setitem(settings.STEPS, "table", 60)
    monkeypatch.setattr(problems, "PROBLEMS", (*PROBLEMS, SMALL))
    monkeypatch.setattr(fixed_points, "PROBLEMS", (*PROBLEMS, SMALL))


@pytest.mark.parametrize("setting", [PPO, DPO], ids=["ppo", "dpo"])
def test_lands_on_the_closed_form(setting: Setting, opened: OpenWorld, tmp_path: Path) -> None:
    world, base = opened(SMALL)
    policy = trained(setting, world, base, tmp_path, 0)
    row = judged(setting, world, policy, target_of(setting, world, SMALL.beta), 0, SMALL.beta)
    assert row.passed, row
    assert row.target == "pi_star"
    assert (tmp_path / "stages/policy/metrics.jsonl").is_file()


def test_the_controls_fail(opened: OpenWorld) -> None:
    rows = controls("small")
    assert [row.setting for row in rows] == ["untrained", "0.8 beta"]
    assert all(row.control and not row.passed and row.as_it_should for row in rows)
    untrained, wrong = (row.kl_to_target for row in rows)
    assert untrained == pytest.approx(SMALL.kl, abs=1e-4)
    assert wrong is not None
    assert KL_BOUND < wrong < untrained


def test_a_policy_that_cannot_be_enumerated_is_a_failed_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*_: object) -> None:
        raise NumericsError("the probabilities of a prompt miss 1 by 0.1")

    monkeypatch.setattr(fixed_points, "trained", lost)
    (row,) = cell(SETTINGS.index(PPO), "small", 0)
    assert not row.as_it_should
    assert (row.algorithm, row.problem, row.kl_to_target) == ("ppo", "small", None)
    assert "miss 1 by 0.1" in row.note


def test_a_policy_on_the_target_passes_and_one_beside_it_does_not(opened: OpenWorld) -> None:
    world, _ = opened(SMALL)
    star = world.pi_star
    assert judged(PPO, world, star, star, 0, 1.0).passed
    beside = np.log((np.exp(star) + 0.06 * np.exp(world.reference)) / 1.06)
    assert kl(beside, star) < KL_BOUND
    far = np.log((np.exp(star) + np.exp(world.reference)) / 2)
    assert not judged(PPO, world, far, star, 0, 1.0).passed
    close = replace(world, reference=np.log(0.9 * np.exp(star) + 0.1 * np.exp(world.reference)))
    assert not judged(PPO, close, beside, star, 0, 1.0).passed, "the gap has a bound of its own"


def test_every_setting_makes_a_recipe(opened: OpenWorld, tmp_path: Path) -> None:
    world, base = opened(SMALL)
    for number, setting in enumerate(SETTINGS):
        rows = [{"id": "0"}] if setting.pairs else []
        keys = setting.recipe_keys(world)
        ctx = make_context(world, base, tmp_path / str(number), 5, keys, rows)
        policy = ctx.recipe.policy
        assert policy.algorithm == setting.algorithm
        assert ctx.recipe.seed == 5
        assert policy.top_p == 1
        assert policy.temperature == 1
        assert policy.score_clip == 0
        assert not policy.whiten_scores
        assert policy.final_learning_rate_fraction == 0
        wanted = setting.kl_coef(world)
        assert (policy.preference.beta if setting.pairs else policy.kl.coef) == wanted


def test_every_algorithm_with_an_optimum_has_a_row() -> None:
    """DAPO has no KL term, so it has no optimum: its gradient alone can be checked."""
    assert {setting.algorithm for setting in SETTINGS} == set(ALGORITHMS) - {"dapo"}


def test_jobs_follow_the_options() -> None:
    every = jobs(Options(seeds=2))
    cells = [job for job in every if job.run.endswith(":cell")]
    assert len(cells) == 2 * len(SETTINGS) * (len(PROBLEMS) + 1)
    some = jobs(Options(("dpo",), ("random table",), 1))
    assert [job.run.partition(":")[2] for job in some] == ["cell", "controls"]
    assert json.loads(json.dumps(some[0].arguments))["problem"] == "random table"
    assert jobs(Options(("dapo",))) == []


def test_an_unknown_problem_is_told() -> None:
    with pytest.raises(UsageError, match="--problems: 'x' is unknown"):
        jobs(Options(problems=("x",)))
