"""The forecast beside the run: what `manifest.json` says of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_json

ROOT = Path(__file__).parents[2]


def test_memory_of_every_stage_is_within_fifteen_per_cent(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "amenable", "run", "examples/tiny.toml", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stages = read_json(out / "manifest.json")["forecast"]["stages"]
    assert list(stages) == ["data", "sft", "collect", "reward", "policy", "evaluate", "report"]
    for name in ("sft", "collect", "reward", "policy", "evaluate"):
        row = stages[name]
        assert row["memory_gb"] == pytest.approx(row["measured_memory_gb"], rel=0.15), name
        assert row["wall_s"] > 0
        assert row["measured_wall_s"] > 0
