from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amenable.cli.lab import app
from amenable.errors import UsageError
from amenable.lab import exact
from amenable.lab.rows import Job, Options, Row

ROW = Row(
    check="fixed point",
    algorithm="ppo",
    setting="lambda 1",
    problem="random table",
    beta=0.05,
    seed=0,
    target="pi_star",
    kl_to_target=0.002,
    objective_gap=0.003,
    passed=True,
)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """What the lab's only job finds; options end in its notes."""
    module, rows = types.ModuleType("lab_results"), [ROW]

    def jobs(options: Options) -> list[Job]:
        return [Job("lab_results:find", {"note": repr(options)})]

    module.jobs = jobs  # type: ignore[attr-defined]
    module.find = lambda note: [replace(row, note=note) for row in rows]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lab_results", module)
    monkeypatch.setattr(exact, "CHECKS", {"fixed point": "lab_results:jobs"})
    return rows


def test_prints_the_table_and_ends_well(results: list[Row]) -> None:
    done = CliRunner().invoke(app, ["exact"])
    assert done.exit_code == 0
    assert "ppo" in done.stdout
    assert "1 of 1 as they should" in done.stdout


@pytest.mark.parametrize(
    "row", [replace(ROW, passed=False), replace(ROW, control=True)], ids=["failed", "missed"]
)
def test_a_row_that_is_not_as_it_should_ends_with_1(results: list[Row], row: Row) -> None:
    results.append(row)
    assert CliRunner().invoke(app, ["exact"]).exit_code == 1


def test_options_and_json(results: list[Row]) -> None:
    words = ["exact", "--only", "ppo, rloo", "--problems", "levels table", "--seeds", "1", "--json"]
    done = CliRunner().invoke(app, [*words, "--workers", "1"])
    (row,) = json.loads(done.stdout)["rows"]
    wanted = Options(("ppo", "rloo"), ("levels table",), 1, 1)
    assert row["note"] == repr(wanted)
    assert row["kl_to_target"] == 0.002


def test_out_keeps_table_json_and_picture(results: list[Row], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["exact", "--out", str(tmp_path / "lab")]).exit_code == 0
    assert json.loads((tmp_path / "lab/exact.json").read_text())["passed"] is True
    assert "lambda 1" in (tmp_path / "lab/exact.txt").read_text()
    assert (tmp_path / "lab/exact.svg").read_text().startswith("<svg")


def test_an_unknown_algorithm_is_bad_usage(results: list[Row]) -> None:
    done = CliRunner().invoke(app, ["exact", "--only", "sarsa"])
    assert isinstance(done.exception, UsageError)


@pytest.mark.parametrize("command", ["exact", "overoptimize", "health"])
def test_a_url_is_no_place_for_results(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--out", "s3://bucket/x"])
    assert isinstance(done.exception, UsageError)
    assert "--out: takes a folder on this machine" in str(done.exception)
