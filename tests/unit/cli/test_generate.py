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
from amenable.pipeline.lock import file_lock


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


def test_shards_make_up_the_whole_and_are_shaped_as_wanted(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"input_text": "Text {n}"}}\n' for n in range(7)))
    words = ("--prompts", str(prompts), "--format", "gcpc")
    found = {}
    for shard in ("0/1", "0/2", "1/2"):
        out = tmp_path / f"{shard.replace('/', '-')}.jsonl"
        assert (
            generate(monkeypatch, str(run_folder), *words, "--shard", shard, "--out", str(out)) == 0
        )
        found[shard] = list(read_jsonl(out))
    assert found["0/1"][::2] == found["0/2"]
    assert found["0/1"][1::2] == found["1/2"]
    row = found["0/1"][3]
    assert row["inputs"] == {"inputs_pretokenized": "Text 3", "targets_pretokenized": ""}
    assert isinstance(row["prediction"], str)
    assert generate(monkeypatch, str(run_folder), *words, "--shard", "2/2") == 2


def test_a_stopped_command_goes_on_and_another_one_begins_anew(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import amenable.cli.generate as module

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"input_text": "Text {n}"}}\n' for n in range(7)))
    words = ("--prompts", str(prompts), "--temperature", "1", "--out")
    assert generate(monkeypatch, str(run_folder), *words, str(tmp_path / "whole.jsonl")) == 0
    monkeypatch.setattr(module, "_BETWEEN_WRITES", 2)
    make, made = module.complete, []

    def stopped(*given: object):
        for number, row in enumerate(make(*given)):
            if number == 5:
                raise KeyboardInterrupt
            made.append(row["id"])
            yield row

    monkeypatch.setattr(module, "complete", stopped)
    assert generate(monkeypatch, str(run_folder), *words, str(out)) == 130
    assert not out.exists()
    with (tmp_path / "out.jsonl.part").open("a") as file:
        file.write('{"torn')
    made.clear()
    assert generate(monkeypatch, str(run_folder), *words, str(out)) == 0
    assert len(made) == 3, "four rows were there"
    assert "4 of 7 rows are there already" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.part").exists()


def test_a_second_command_on_the_same_file_is_refused(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before it reads a weight; what the first one has written stays, and other files are free."""
    out = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    part.write_text(first := '{"of": "the first"}\n')
    words = (str(run_folder), "A ferry waits.", "--out")
    with file_lock(out):
        assert generate(monkeypatch, *words, str(out)) == 1
        assert part.read_text() == first
        assert generate(monkeypatch, *words, str(tmp_path / "other.jsonl")) == 0
    assert "out.jsonl: process " in (told := capsys.readouterr().err)
    assert "is writing this file; wait for it, stop it, or choose another file" in told
    assert generate(monkeypatch, *words, str(out)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "s3://bucket/x"), "--out: takes a file on this machine, no URL; copy it to"),
        (("--workers", "2"), "--workers: goes with --on; without it, share the prompts with --sh"),
    ],
)
def test_what_is_not_done_is_refused(
    words: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(monkeypatch, "none", "A", *words) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_on_a_cluster_rows_go_to_a_file(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(monkeypatch, str(run_folder), "A", "--on", "ray", "--workers", "2") == 2
    assert "--on: say where the rows go, with --out FILE" in capsys.readouterr().err
