from __future__ import annotations

import os
from pathlib import Path

import pytest

from amenable.errors import StageError
from amenable.pipeline import lock
from amenable.pipeline.lock import file_lock, run_lock


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    path, own = tmp_path / "run" / ".lock", rf"run: process {os.getpid()} on .*"
    with run_lock(path):
        with pytest.raises(StageError, match=f"{own} is writing this run folder;"), run_lock(path):
            pass
        with pytest.raises(StageError, match=f"{own} is writing this f"), run_lock(path, "folder"):
            pass
    with run_lock(path):
        pass


def test_a_files_lock_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with file_lock(path):
        assert [path.name for path in tmp_path.iterdir()] == [".rows.jsonl.lock"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), file_lock(path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the first holder ends: what is locked then is no file's lock."""
    path, try_lock, tries = tmp_path / "rows.jsonl", lock._try_lock, []

    def first_one_ends(handle: int) -> bool:
        if not tries:
            (tmp_path / ".rows.jsonl.lock").unlink()
        tries.append(handle)
        return try_lock(handle)

    monkeypatch.setattr(lock, "_try_lock", first_one_ends)
    with file_lock(path):
        assert len(tries) == 2
        told = r"rows.jsonl: process .* is writing this file"
        with pytest.raises(StageError, match=told), file_lock(path):
            pass
