"""Each tracker itself, offline: what it was told is read back from its own files.

In an environment of its own (make test-trackers): the packages bring dozens of others, and pin
some of them lower than the tests of the package do.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amenable.artifacts import MetricsLog
from amenable.config.load import load_recipe
from amenable.trackers import Trackers

REASON = "not installed; run: make test-trackers"
Points = dict[str, list[tuple[int, float]]]


class Nobody:
    """Hears nothing."""

    def begin(self, rows: object) -> None: ...

    def see(self, step: int, figures: object) -> None: ...


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it remembers its mode


def killed_and_resumed(tracker: str, root: Path) -> list[str]:
    """Two stages; the second is cut off after step 3 and resumed from a checkpoint at 2."""
    sys.argv.append("--secret=hunter2")
    said: list[str] = []
    settings = [f"trackers={tracker}", "data.prompts=s3://me:hunter2@bucket/x", "model.base=tiny"]
    recipe = load_recipe(None, [*settings, "policy.reward=math:fsum", "name=killed"])
    for stage, after, steps in (
        ("sft", -1, (1, 2)),
        ("policy", -1, (1, 2, 3)),
        ("policy", 2, (3, 4)),
    ):
        trackers = Trackers(recipe, root, said.append)
        observer = trackers.of(stage, Nobody())
        log = MetricsLog(stage, root / stage, tensorboard=False, observer=observer)
        log.truncate(after)
        for step in steps:
            log.write(step, loss=step / 8, broken=float("nan"))
        trackers.finish(ok=after == 2)
    sys.argv.remove("--secret=hunter2")
    return said


EXPECTED: Points = {
    "sft/loss": [(1, 0.125), (2, 0.25)],
    "policy/loss": [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)],
}


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason=REASON)
    from mlflow.tracking import MlflowClient

    assert killed_and_resumed("mlflow", tmp_path / "run") == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("amenable")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("killed", "FINISHED")
    assert run.data.params["model.base"] == "tiny"
    assert "hunter2" not in str(run.data.params)
    found = {
        key: [
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)
        ]
        for key in run.data.metrics
    }
    assert found == EXPECTED


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason=REASON)
    from wandb.proto import wandb_internal_pb2

    assert killed_and_resumed("wandb", tmp_path / "run") == []
    sys.modules["wandb"].teardown()  # now all is on the disk
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # one run, a folder for each process
    found: Points = {}
    orders: list[int] = []
    texts = b""
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        for content in records(file.read_bytes()):
            texts += content
            record = wandb_internal_pb2.Record.FromString(content)
            orders += [record.history.step.num] if record.HasField("history") else []
            row = {
                item.key or "/".join(item.nested_key): float(item.value_json)
                for item in record.history.item
            }
            for key, value in row.items():
                stage, _, name = key.partition("/")
                if name == "loss":
                    found.setdefault(key, []).append((int(row[f"{stage}/step"]), value))
    assert found == EXPECTED
    assert orders == sorted(set(orders))
    assert b"hunter2" not in texts
    assert b"tiny" in texts
    files = [file for file in (tmp_path / "wandb").rglob("*") if file.is_file()]
    assert not [file for file in files if b"--secret=hunter2" in file.read_bytes()]


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason=REASON)
    assert killed_and_resumed("trackio", tmp_path / "run") == []
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("amenable")
    assert run.startswith("killed-")
    found: Points = {}
    for row in SQLiteStorage.get_logs("amenable", run):
        for key in EXPECTED:
            if key in row:
                found.setdefault(key, []).append((row["step"], row[key]))
    assert found == EXPECTED
    dump = "\n".join(sqlite3.connect(tmp_path / "trackio" / "amenable.db").iterdump())
    assert "hunter2" not in dump


def test_one_that_is_not_logged_in_is_left_out_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason=REASON)
    monkeypatch.delenv("WANDB_MODE")
    for name in [name for name in os.environ if name.startswith("WANDB_API")]:
        monkeypatch.delenv(name)
    said = killed_and_resumed("wandb", tmp_path / "run")
    assert len(said) == 3  # one for each of the three processes
    assert "wandb is left out from here on (No API key configured" in said[0]


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""
