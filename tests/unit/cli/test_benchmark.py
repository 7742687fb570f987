"""What `amenable benchmark` refuses; what it measures is in tests/peers/test_lm_eval.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from amenable.cli import main as cli
from amenable.config.load import load_recipe, to_toml
from amenable.errors import UsageError
from amenable.evaluate.systems import System, systems_of_run


def benchmark(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["amenable", "benchmark", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that has made no model yet."""
    root = tmp_path / "run"
    root.mkdir()
    overrides = ["model.base=tiny", "data.prompts=x.jsonl", "policy.reward=m:f"]
    (root / "recipe.toml").write_text(to_toml(load_recipe(None, overrides)))
    return root


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("smollm2-135m",), "smollm2-135m: no run folder (no recipe.toml); give one, or two"),
        (("{run}",), "has no models/sft or models/tuned yet"),
        (("tiny", "ready.jsonl"), "ready.jsonl: ready completions cannot be asked new questions"),
        (("tiny", "tiny"), "two systems are called 'tiny'"),
        (("a=tiny", "b=tiny", "--tasks", ","), "--tasks names no task"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    filled = [word.format(run=run_folder) for word in words]
    tasks = () if "--tasks" in words else ("--tasks", "arc_easy")
    assert benchmark(monkeypatch, *filled, *tasks) == 2
    assert told in capsys.readouterr().err


def test_without_the_harness_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert benchmark(monkeypatch, "a=tiny", "b=tiny", "--tasks", "arc_easy") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert 'pip install "amenable[lm-eval]"' in told


def test_a_run_is_its_base_and_the_models_it_has_made(run_folder: Path) -> None:
    tuned = run_folder / "models" / "tuned"
    tuned.mkdir(parents=True)
    assert systems_of_run(run_folder) == [System("base", "tiny"), System("tuned", str(tuned))]
    (run_folder / "models" / "sft").mkdir()
    assert [system.name for system in systems_of_run(run_folder)] == ["base", "sft", "tuned"]
    with pytest.raises(UsageError, match="no run folder"):
        systems_of_run(run_folder / "models")
