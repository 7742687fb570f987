"""The whole of Amenable on a random two-layer Llama: every stage, skipping, and a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.unit.disks import small_disk

from amenable.artifacts import read_json, read_jsonl
from amenable.pipeline.summary import COMPARISON, SECTIONS

ROOT = Path(__file__).parents[2]
STAGES = ["data", "sft", "collect", "reward", "policy", "evaluate", "report"]
LIMIT_S = 60
SKIP_LIMIT_S = 5


def command(out: Path, *words: str) -> list[str]:
    recipe = ["run", "examples/tiny.toml", "--out", str(out)]
    return [sys.executable, "-m", "amenable", *recipe, *words]


def environment() -> dict[str, str]:
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path}


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(out, *words),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=5 * LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run(out)
    return out


def test_every_stage_is_done_in_time(whole: Path) -> None:
    summary = read_json(whole / "summary.json")
    assert {name: row["status"] for name, row in summary["stages"].items()} == dict.fromkeys(
        STAGES, "done"
    )
    assert summary["wall_s"] < LIMIT_S
    assert summary["peak_rss_gb"] < 6


def test_summary_has_every_figure(whole: Path) -> None:
    summary = read_json(whole / "summary.json")
    for section, keys in SECTIONS.items():
        missing = [key for key in keys if summary[section].get(key) is None]
        assert missing == [], f"{section}: {missing}"
    rows = summary["evaluate"]
    assert {(row["a"], row["b"]) for row in rows} >= {("base", "tuned"), ("sft", "tuned")}
    assert {row["judge"] for row in rows} == {"annotator", "reward_model"}
    assert all(set(COMPARISON) <= set(row) for row in rows)
    assert all(row["wins"] + row["ties"] + row["losses"] == row["prompts"] for row in rows)


def test_folder_holds_every_artifact(whole: Path) -> None:
    files = ["recipe.toml", "manifest.json", "report.html", "data/preferences.train.jsonl"]
    files += [f"models/{name}/model.safetensors" for name in ("sft", "reward", "tuned")]
    files += [f"models/{name}/adapter/adapter_config.json" for name in ("sft", "reward", "tuned")]
    files += [f"stages/{name}/metrics.jsonl" for name in ("sft", "reward", "policy")]
    files += ["stages/policy/samples.jsonl", "stages/evaluate/completions.jsonl"]
    assert [name for name in files if not (whole / name).exists()] == []
    assert not list(whole.rglob("*.partial"))
    assert list((whole / "stages" / "policy" / "tensorboard").iterdir())


def test_policy_starts_at_the_reference(whole: Path) -> None:
    first = next(iter(read_jsonl(whole / "stages" / "policy" / "metrics.jsonl")))
    assert abs(first["policy/kl_loss"]) < 1e-6
    assert first["step"] == 0


def test_second_run_skips_every_stage_at_once(whole: Path) -> None:
    before = (whole / "summary.json").read_bytes()
    start = time.monotonic()
    done = run(whole)
    assert time.monotonic() - start < SKIP_LIMIT_S
    assert done.stderr.count("unchanged, skipped") == len(STAGES)
    assert (whole / "summary.json").read_bytes() == before


def started(out: Path) -> bool:
    """True when the policy stage has written its first figures."""
    metrics = out / "stages" / "policy" / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "wall_s"} for row in read_jsonl(path)]


def assert_same_bits(out: Path, whole: Path) -> None:
    """Models, checkpoints, figures and samples of every training stage."""
    for stage, model in (("sft", "sft"), ("reward", "reward"), ("policy", "tuned")):
        for name in ("metrics.jsonl", "samples.jsonl"):
            log = Path("stages") / stage / name
            assert (out / log).exists() == (whole / log).exists()
            if (whole / log).exists():
                assert timeless(out / log) == timeless(whole / log), log
        folders = [max((run / "stages" / stage).glob("checkpoints/step-*")) for run in (out, whole)]
        assert folders[0].name == folders[1].name
        hashes = [read_json(folder / "hashes.json") for folder in folders]
        assert hashes[0] == hashes[1], stage
        weights = [run / "models" / model / "model.safetensors" for run in (out, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), model
    summaries = [read_json(run / "summary.json") for run in (out, whole)]
    for section in ("sft", "reward", "policy", "evaluate"):
        assert summaries[0][section] == summaries[1][section]


DIES_IN_A_WRITE = """
import os, signal, sys
from amenable.cli.main import main
from amenable.train import checkpoints
write = checkpoints.write_json
def dying(path, obj):
    if (path.parent.name, path.name) == (".step-000004.partial", "hashes.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, obj)
checkpoints.write_json = dying
main()
"""
"""Of the checkpoint after the fourth step of a stage everything but its hashes is there."""


def test_run_that_is_killed_stopped_and_killed_goes_on(whole: Path, tmp_path: Path) -> None:
    """In the middle of a checkpoint; with SIGTERM; and at any moment: nothing is another bit."""
    out = tmp_path / "killed"
    script = [sys.executable, "-c", DIES_IN_A_WRITE, *command(out)[3:]]
    died = subprocess.run(script, cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL
    kept = [path.name for path in (out / "stages" / "sft" / "checkpoints").iterdir()]
    assert sorted(kept) == [".step-000004.partial", "step-000002"]
    said = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            command(out), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 5 * LIMIT_S
        while not started(out) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        said.append(process.communicate()[1])
        assert process.returncode == (143 if number == signal.SIGTERM else -number), said[-1]
    assert "sft: step 2 of 4 restored: best, optimizer, weights, losses, logs\n" in said[0]
    told = "amenable: stopped in stage policy by SIGTERM; the same command goes on from there\n"
    assert said[0].endswith(told)
    assert "Traceback" not in said[0]
    done = run(out, "--json")
    assert done.stderr.count("unchanged, skipped") >= 4
    assert re.search(r"policy: update [1-4] of 4 restored: best, critic, ", said[1] + done.stderr)
    assert {row["status"] for row in json.loads(done.stdout)["stages"].values()} == {"done"}
    assert_same_bits(out, whole)


def test_run_on_a_disk_that_is_too_small_goes_on_when_it_is_larger(
    whole: Path, tmp_path: Path
) -> None:
    """It fills up wherever it does, with one line each time; then there is more room."""
    size_kb, failures = 1500, 0
    with small_disk(tmp_path / "small", f"{size_kb}k") as disk:
        out = disk.path / "run"
        while True:
            done = subprocess.run(
                command(out),
                cwd=ROOT,
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                break
            failures += 1
            assert done.returncode == 1, done.stderr
            last = done.stderr.splitlines()[-1]
            assert re.match(r"amenable: cannot write .*: the disk is full; free some", last), last
            assert "Traceback" not in done.stderr
            size_kb *= 2
            disk.remount(f"size={size_kb}k")
        assert failures >= 2
        assert_same_bits(out, whole)


def test_tuned_model_completes_prompts(whole: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amenable", "generate", str(whole), "A heron.", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    assert json.loads(done.stdout)["tokens"] <= 16
