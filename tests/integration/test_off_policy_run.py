"""Runs whose policy learns from pairs: without a reward model, from a file, and after a kill."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
LIMIT_S = 240
METRICS = "stages/policy/metrics.jsonl"
SETTINGS = (
    "policy.preference.batch_size=8",
    "policy.preference.epochs=2",
    "policy.preference.evaluations=3",
    "policy.preference.learning_rate=1e-2",
    "evaluate.diversity_prompts=0",
)


def command(out: Path, *settings: str) -> list[str]:
    words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    recipe = ["run", "examples/tiny.toml", "--out", str(out)]
    return [sys.executable, "-m", "amenable", *recipe, *words]


def environment() -> dict[str, str]:
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path}


def run(out: Path, *settings: str) -> str:
    done = subprocess.run(
        command(out, *settings),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


COLLECTED = ("policy.algorithm=dpo", "reward.enabled=false")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO on pairs that the run collected itself; no reward model."""
    out = tmp_path_factory.mktemp("runs") / "dpo"
    run(out, *COLLECTED)
    return out


def test_dpo_needs_no_reward_model(collected: Path) -> None:
    summary = read_json(collected / "summary.json")
    statuses = {name: row["status"] for name, row in summary["stages"].items()}
    assert statuses.pop("reward") == "off"
    assert set(statuses.values()) == {"done"}
    assert not (collected / "models" / "reward").exists()
    assert (collected / "models" / "tuned" / "adapter").is_dir()
    assert {row["judge"] for row in summary["evaluate"]} == {"annotator"}
    policy = summary["policy"]
    assert policy["algorithm"] == "dpo"
    assert policy["updates"] == 6
    assert (policy["episodes"], policy["reward_first"], policy["reward_last"]) == (None,) * 3
    assert policy["kl_last"] is not None
    assert policy["completion_tokens_mean"] > 0
    first = next(iter(read_jsonl(collected / METRICS)))
    assert first["policy/loss"] == pytest.approx(math.log(2), abs=1e-6)
    page = (collected / "report.html").read_text(encoding="utf-8")
    assert 'data-key="policy.loss_first"' in page
    assert 'data-key="policy.reward_first"' not in page
    card = (collected / "models" / "tuned" / "README.md").read_text(encoding="utf-8")
    assert f"DPO on {policy['pairs']} pairs" in card


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "wall_s"} for row in read_jsonl(path)]


def test_run_killed_between_steps_goes_on_with_the_same_bits(
    collected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(out, *COLLECTED), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + LIMIT_S
    metrics = out / METRICS
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = run(out, *COLLECTED)
    assert said.count("unchanged, skipped") >= 3
    assert timeless(metrics) == timeless(collected / METRICS)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        path = Path("models") / "tuned" / name
        assert (out / path).read_bytes() == (collected / path).read_bytes()


def test_a_file_of_pairs_is_enough(collected: Path, tmp_path: Path) -> None:
    """ORPO from the base, with no demonstrations, no annotator and no judge: nothing to compare."""
    pairs = tmp_path / "pairs.jsonl"
    parts = (collected / "data").glob("preferences.*.jsonl")
    pairs.write_text("".join(part.read_text(encoding="utf-8") for part in sorted(parts)))
    out = tmp_path / "orpo"
    settings = (
        "policy.algorithm=orpo",
        f'data.preferences="{pairs}"',
        "data.demonstrations=[]",
        "data.prompts=[]",
        'collect.annotator="none"',
        "reward.enabled=false",
        "evaluate.best_of=0",
    )
    run(out, *settings)
    summary = read_json(out / "summary.json")
    statuses = {name: row["status"] for name, row in summary["stages"].items()}
    assert [name for name, status in statuses.items() if status == "off"] == [
        "sft",
        "collect",
        "reward",
    ]
    assert summary["evaluate"] == []
    assert summary["policy"]["pairs"] + summary["policy"]["ties_left_out"] > 0
    assert (out / "stages" / "evaluate" / "completions.jsonl").stat().st_size > 0
    assert run(out, *settings).count("unchanged, skipped") == 4


def test_the_policy_does_not_start_without_pairs(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "none", "policy.algorithm=kto", 'collect.annotator="none"'),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert "kto has nothing to learn from" in done.stderr
    assert not (tmp_path / "none").exists()
