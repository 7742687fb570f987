from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import write_json
from amenable.cli import main as cli
from amenable.cli.run import result_lines

ROOT = Path(__file__).parents[3]
COMMANDS = [
    (),
    ("demo",),
    ("run",),
    ("generate",),
    ("report",),
    ("data",),
    *(("data", name) for name in ("check", "convert", "show", "stats", "formats")),
    ("models",),
    ("models", "list"),
    ("models", "pull"),
    ("lab",),
    ("lab", "exact"),
    ("kfp",),
    ("kfp", "compile"),
    ("kfp", "run"),
]


def amenable(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "amenable", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def run_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """The command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["amenable", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words) or "amenable")
def test_help_explains(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, *command, "--help") == 0
    text = capsys.readouterr().out
    assert "Usage: amenable" in text
    if command not in ((), ("data",), ("models",), ("lab",), ("kfp",)):
        assert f"Example: amenable {' '.join(command)}" in text


def test_module_runs_and_says_its_version() -> None:
    done = amenable("--version")
    assert (done.returncode, done.stdout) == (0, "amenable 0.1.0\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "none.toml"), "none.toml: no such recipe file"),
        (
            ("run", "examples/tiny.toml", "--set", "polcy.updates=3"),
            "polcy: unknown key; did you mean policy?",
        ),
        (
            ("run", "examples/tiny.toml", "--set", "data.prompts=none.jsonl"),
            "none.jsonl: there is no such",
        ),
        (("run", "examples/tiny.toml", "--set", "model.base=examples"), "no config.json"),
        (("run", "examples/tiny.toml", "--only", "polish"), "no stage 'polish'"),
        (("report", "examples"), "no run folder"),
        (("models", "pull", "smol"), "no built-in model"),
        (("generate", "tiny"), "nothing to complete"),
        (("run",), "which recipe? Try: amenable run examples/tiny.toml"),
        (("fly",), "No such command"),
        (("run", "--fly"), "No such option"),
    ],
)
def test_bad_input_gives_one_message_and_code_2(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_here(monkeypatch, *words) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert "Traceback" not in streams.err
    assert streams.out == ""


@pytest.mark.parametrize("command", ["compile", "run"])
def test_without_kfp_one_line_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kfp", None)
    monkeypatch.delitem(sys.modules, "amenable.pipeline.kfp", raising=False)
    out = ["out.yaml"] if command == "compile" else []
    assert run_here(monkeypatch, "kfp", command, "examples/tiny.toml", *out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("amenable: Kubeflow Pipelines is not installed (")
    assert line.endswith('run: pip install "amenable[kfp]"')


def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "run", "none.toml", "--debug") == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("amenable: none.toml: no such recipe file")


def test_defect_is_named_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero\nmore")

    monkeypatch.setattr(cli, "app", fail)
    assert run_here(monkeypatch, "demo") == 1
    text = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: by zero. This is a defect" in text
    assert "Traceback" not in text


def test_keys_lists_every_recipe_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch, "run", "--keys")
    assert (
        "policy.updates = 100  (a whole number)\n    Roll-out batches." in capsys.readouterr().out
    )
    run_here(monkeypatch, "run", "--keys", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["key"] == "schema_version"


class Recorder:
    """Takes the place of the pipeline."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, recipe: Any, folder: Path, **options: Any) -> dict[str, Any]:
        self.options = {"name": recipe.name, "seed": recipe.seed, "folder": folder, **options}
        return {"name": recipe.name}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr("amenable.pipeline.local.run", made)
    return made


def test_run_passes_its_options_on(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = ("--set", "seed=3", "--seed", "5", "--until", "sft", "--max-minutes", "2", "--json")
    assert run_here(monkeypatch, "run", "examples/tiny.toml", *words) == 0
    assert recorder.options == {
        "name": "tiny",
        "seed": 5,
        "folder": Path("runs/tiny"),
        "only": None,
        "until": "sft",
        "max_minutes": 2.0,
    }
    assert json.loads(capsys.readouterr().out) == {"name": "tiny"}


def test_demo_runs_the_packaged_recipe(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "demo", "--seed", "1", "--out", "runs/demo-1") == 0
    assert recorder.options["name"] == "demo"
    assert recorder.options["seed"] == 1
    assert recorder.options["folder"] == Path("runs/demo-1")


def test_result_is_told_in_lines(tmp_path: Path) -> None:
    write_json(tmp_path / "report.html", {})
    reward = {"pairs_eval": 400, "accuracy": 0.75, "accuracy_ci95": [0.7, 0.8]}
    row = {"a": "base", "b": "tuned", "judge": "annotator", "prompts": 400}
    row |= {"win_rate": 0.61234, "win_rate_ci95": None}
    assert result_lines({"reward": reward, "evaluate": [row]}, tmp_path) == [
        "reward model: accuracy 0.750 [0.700, 0.800] on 400 held-out pairs",
        "tuned against base: wins 0.612 on 400 prompts, judged by annotator",
        f"report: {tmp_path / 'report.html'}",
    ]
    assert result_lines({"reward": None, "evaluate": None}, tmp_path / "none") == []


def test_models_list_says_what_is_pulled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch, "models", "list", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {"smollm2-135m", "tiny"}
    run_here(monkeypatch, "models", "list")
    assert "smollm2-135m" in capsys.readouterr().out
