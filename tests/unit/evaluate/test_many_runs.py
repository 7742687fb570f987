"""Several runs on one page, and the spread of those that differ in their seed alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from amenable.cli.main import app
from amenable.errors import UsageError
from amenable.evaluate.many_runs import gather, page, spread_of

Build = Callable[..., Path]


def make(build_run: Build, root: Path, seed: int, rate: float, **recipe: Any) -> Path:
    folder = build_run(root / f"seed-{seed}", prompts=12)
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^seed = \d+\n", "", text)
    extra = "".join(f"{key} = {value}\n" for key, value in recipe.items())
    (folder / "recipe.toml").write_text(f"seed = {seed}\n{extra}{text}", encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text())
    summary["seed"] = seed
    for row in summary["evaluate"]:
        row["win_rate"] = rate
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def three(tmp_path: Path, build_run: Build) -> list[Path]:
    return [make(build_run, tmp_path, seed, rate) for seed, rate in enumerate((0.6, 0.7, 0.65))]


def test_the_spread_is_that_of_the_win_rates(three: list[Path]) -> None:
    found = gather(three)
    assert [row["seed"] for row in found["runs"]] == [0, 1, 2]
    row = next(r for r in found["spread"] if (r["a"], r["b"]) == ("sft", "tuned"))
    assert row["win_rates"] == [0.6, 0.7, 0.65]
    assert (row["mean"], row["lowest"], row["highest"]) == pytest.approx((0.65, 0.6, 0.7))
    low, high = stats.t.interval(0.95, 2, loc=0.65, scale=stats.sem([0.6, 0.7, 0.65]))
    assert row["ci95"] == pytest.approx([low, high], abs=1e-12)


def test_the_interval_holds_the_mean_of_normal_seeds() -> None:
    """1,000 draws of five seeds: within 92 and 98 of 100."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        low, high = spread_of(dict(enumerate(generator.normal(0.6, 0.03, 5))))["ci95"]
        held += low <= 0.6 <= high
    assert 920 <= held <= 980


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(
    tmp_path: Path, build_run: Build
) -> None:
    runs = [
        make(build_run, tmp_path, 0, 0.6),
        make(build_run, tmp_path, 1, 0.7, other=1),
    ]
    found = gather(runs)
    assert found["spread"] == []
    assert "No two of them differ in their seed alone" in page(runs, found)


def test_the_page_leads_with_tuned_against_sft_and_its_spread(three: list[Path]) -> None:
    html = page(three, gather(three))
    heading = re.sub(r"<.*?>", "", re.findall(r"<h1>.*?</h1>", html)[0])
    assert heading == (
        "Tuned was preferred to SFT on 65.0\u00a0% of the prompts, "
        "and on 60.0 to 70.0\u00a0% by seed"
    )
    assert html.count("seed 2") > 3
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert html == page(three, gather(three)), "the same runs give the same bytes"


def test_the_command_writes_page_and_figures(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "all"
    words = ["report", *map(str, three), "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "tuned against sft: wins 0.650 over 3 seeds (standard deviation 0.050" in done.stdout
    assert json.loads((out / "runs.json").read_text())["spread"]
    assert (out / "report.html").stat().st_size < 400_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{0}", "{0}"], "named twice"),
        (["{0}", "{0}/nothing"], "no run folder"),
        (["{0}", "--out", "x"], "goes with several runs"),
        (["{0}", "{1}", "--check"], "takes one folder"),
    ],
)
def test_what_does_not_go_together_is_refused(
    three: list[Path], words: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["report", *(word.format(*three) for word in words)])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


@pytest.mark.parametrize("words", [["--seeds", "0,0"], ["--seeds", "a"], ["--seeds=1", "--seed=1"]])
def test_seeds_that_are_no_list_are_refused(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["run", "examples/tiny.toml", *words])
    assert isinstance(done.exception, UsageError)
