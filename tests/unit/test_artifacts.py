from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from amenable import artifacts
from amenable.artifacts import (
    MetricsLog,
    RunFolder,
    atomic_dir,
    is_left_out,
    read_json,
    read_jsonl,
    storage_errors,
    write_json,
    write_jsonl,
    write_text,
    writes_left_out,
)
from amenable.errors import DataError, StorageError


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_file_is_read_back_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"é": [1, 2.5, None]})
    assert read_json(tmp_path / "deep" / "a.json") == {"é": [1, 2.5, None]}
    assert names(tmp_path / "deep") == ["a.json"]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf")], "c": (1, Path("x"))})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [None], "c": [1, "x"]}


def test_array_scalars_become_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    write_json(tmp_path / "a.json", {"a": numpy.float32(0.5), "b": numpy.arange(2)})
    assert read_json(tmp_path / "a.json") == {"a": 0.5, "b": [0, 1]}


def test_full_disk_keeps_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(artifacts.os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"a\.txt: the disk is full; free some space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(StorageError, match="a file is in the way"):
        write_text(tmp_path / "a" / "b.txt", "text")


def test_full_disk_is_recognised_in_other_errors(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="the disk is full"),
        storage_errors(tmp_path),
    ):
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), storage_errors(tmp_path):
        raise KeyError("x")


def test_rows_that_fail_leave_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"a": 1}
        raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert names(tmp_path) == []


def test_jsonl_is_read_back_without_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}, {"b": "\u2028"}])
    path.write_text(path.read_text() + "\n")
    assert list(read_jsonl(path)) == [{"a": 1}, {"b": "\u2028"}]


@pytest.mark.parametrize(("text", "words"), [("{", "no JSON"), ("[1]", "one JSON object")])
def test_faulty_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + text + "\n")
    with pytest.raises(DataError, match=words) as caught:
        list(read_jsonl(path))
    assert caught.value.line == 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_dir(tmp_path / "model") as aside:
            (aside / content).write_text(content)
            assert not (tmp_path / "model" / content).exists()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["two"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_folder_stays_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with atomic_dir(tmp_path / "model") as aside:
        (aside / "weights").write_text("old")

    def write_half() -> None:
        with atomic_dir(tmp_path / "model") as aside:
            (aside / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("")
    with atomic_dir(tmp_path / "model") as aside:
        (aside / "whole").write_text("")
    assert names(tmp_path / "model") == ["whole"]


def test_stage_folder_is_made_on_demand(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.stage_path("sft").exists()
    assert folder.stage("sft").is_dir()
    assert folder.state_path("sft") == tmp_path / "run" / "stages" / "sft" / "state.json"


def log(folder: Path) -> MetricsLog:
    return MetricsLog("policy", folder, tensorboard=False)


def test_metrics_carry_the_stage_and_are_on_disk_at_once(tmp_path: Path) -> None:
    log(tmp_path).write(3, reward=1.5, kl_loss=float("nan"))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("wall_s") >= 0
    assert row == {"step": 3, "policy/reward": 1.5, "policy/kl_loss": None}


def test_truncate_forgets_later_steps_of_metrics_and_samples(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    for step in range(4):
        metrics.write(step, reward=step)
        metrics.samples([{"step": step, "completion": "a"}, {"step": step, "completion": "b"}])
    metrics.truncate(1)
    metrics.write(2, reward=7)
    assert [row["policy/reward"] for row in metrics.rows()] == [0, 1, 7]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 1, 1]


def test_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    log(tmp_path).write(0, reward=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "pol')
    again = log(tmp_path)
    assert [row["step"] for row in again.rows()] == [0]
    again.write(1, reward=2)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_wall_time_goes_on_after_a_restart(tmp_path: Path) -> None:
    row = {"step": 0, "wall_s": 100.0, "policy/reward": 1.0}
    write_jsonl(tmp_path / "metrics.jsonl", [row])
    again = log(tmp_path)
    again.write(1, reward=1)
    assert again.rows()[-1]["wall_s"] >= 100


def test_full_disk_while_logging_is_told(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: the disk is full"):
        metrics.write(0, reward=1)


def test_tensorboard_tags_have_no_prefix_and_survive_truncation(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsLog("policy", tmp_path)
    for step in range(3):
        metrics.write(step, kl_loss=step)
    metrics.truncate(0)
    metrics.write(1, kl_loss=5)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["kl_loss"]
    assert [(event.step, event.value) for event in events.Scalars("kl_loss")] == [(0, 0), (1, 5)]


def test_writes_of_another_rank_are_left_out(tmp_path: Path) -> None:
    """Below the folder nothing is made, changed or removed; elsewhere all is as ever."""
    run, other = tmp_path / "run", tmp_path / "other"
    write_json(run / "kept.json", 1)
    with writes_left_out(run):
        assert is_left_out(run / "x")
        assert not is_left_out(other)
        write_json(run / "kept.json", 2)
        write_jsonl(run / "rows.jsonl", [{}])
        with atomic_dir(run / "model") as folder:
            (folder / "weights").write_text("w")
            assert not folder.is_relative_to(run)
        log = MetricsLog("sft", run, tensorboard=False)
        log.write(0, loss=1.0)
        log.samples([{}])
        log.truncate(-1)
        write_json(other / "made.json", 3)
    assert [path.name for path in run.iterdir()] == ["kept.json"]
    assert read_json(run / "kept.json") == 1
    assert read_json(other / "made.json") == 3
    assert not is_left_out(run / "x")
