from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_jsonl
from amenable.cli import main as cli
from amenable.config.load import load_recipe, to_toml
from amenable.models.tiny import build_tiny


def generate(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["amenable", "generate", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that holds a tuned model and its recipe."""
    root = tmp_path_factory.mktemp("run")
    build_tiny(root / "models" / "tuned")
    overrides = ["data.max_completion_tokens=5", "data.prompts=x.jsonl", "policy.reward=m:f"]
    (root / "recipe.toml").write_text(to_toml(load_recipe(None, overrides)))
    return root


def test_rows_say_what_was_completed(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("A ferry waits.", "A heron sings.", "--json", "--temperature", "1")
    assert generate(monkeypatch, str(run_folder), *words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["input_text"] for row in rows] == ["A ferry waits.", "A heron sings."]
    assert all(1 <= row["tokens"] <= 5 for row in rows)


def test_same_seed_gives_the_same_text(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_text": "A"}\n{"input_text": "B"}\n')
    outs = []
    for seed in ("1", "1", "2"):
        out = tmp_path / f"{len(outs)}.jsonl"
        words = ("--prompts", str(prompts), "--out", str(out), "--seed", seed, "--temperature", "1")
        assert generate(monkeypatch, str(run_folder), *words) == 0
        outs.append([row["completion"] for row in read_jsonl(out)])
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


def test_impossible_sampling_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(monkeypatch, str(run_folder), "A", "--top-p", "2") == 2
    assert "top_p must lie in (0, 1]" in capsys.readouterr().err
