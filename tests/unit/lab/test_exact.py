from __future__ import annotations

import sys
import types
from collections.abc import Sequence

import pytest

from amenable.errors import UsageError
from amenable.lab import exact
from amenable.lab.rows import Job, Options, Row, run_jobs


def made(numbers: Sequence[int]) -> list[Row]:
    return [
        Row(
            check="fixed point",
            algorithm="ppo",
            setting="lambda 1",
            problem="random table",
            beta=0.05,
            seed=number,
            passed=True,
        )
        for number in numbers
    ]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A check of two jobs, the only one of the lab."""
    module = types.ModuleType("lab_check")
    module.made = made  # type: ignore[attr-defined]
    module.jobs = lambda options: [  # type: ignore[attr-defined]
        Job("lab_check:made", {"numbers": [n]}, cost=n) for n in range(options.seeds)
    ]
    monkeypatch.setitem(sys.modules, "lab_check", module)
    monkeypatch.setattr(exact, "CHECKS", {"fixed point": "lab_check:jobs"})
    return module


def test_runs_every_job_longest_first_and_sorts_the_rows(module: types.ModuleType) -> None:
    found = list(exact.run(Options(seeds=3, workers=1)))
    assert [rows[0].seed for rows in found] == [2, 1, 0]
    rows = exact.in_order([row for rows in found for row in rows])
    assert [row.seed for row in rows] == [0, 1, 2]
    assert all(row.wall_s > 0 for row in rows)


def test_processes_give_the_same_rows() -> None:
    jobs = [Job(f"{__name__}:made", {"numbers": [n]}) for n in range(2)]
    with pytest.raises(ModuleNotFoundError):
        list(run_jobs([Job("no_such_module:f"), Job("no_such_module:f")], 2))
    assert sorted(rows[0].seed for rows in run_jobs(jobs, 1)) == [0, 1]


def test_json_keeps_controls_apart() -> None:
    (row,) = made([0])
    (control,) = made([1])
    given = exact.to_json([row, Row(**{**control.to_json(), "control": True})])
    assert [len(given["rows"]), len(given["controls"]), given["passed"]] == [1, 1, False]
    wanted = {
        "algorithm",
        "setting",
        "problem",
        "beta",
        "seed",
        "target",
        "kl_to_target",
        "objective_gap",
        "gradient_p_value",
    }
    assert wanted <= set(given["rows"][0])


def test_an_unknown_algorithm_is_told(module: types.ModuleType) -> None:
    with pytest.raises(UsageError, match="--only: 'sarsa' is no algorithm"):
        exact.jobs(Options(("sarsa",)))


def test_nothing_to_do_is_told(module: types.ModuleType) -> None:
    with pytest.raises(UsageError, match="nothing to check"):
        exact.jobs(Options(seeds=0))
