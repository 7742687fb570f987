from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from amenable.errors import StageError, StorageError, UsageError
from amenable.pipeline.store import WAIT_VARIABLE, Store, StoreRefuses

from .stores import clear, memory_store


class Failing:
    """A filesystem in memory whose first calls, or those of one method, end in the errors given."""

    def __init__(self, *errors: Exception, at: str = "") -> None:
        self._at = at
        self._system = fsspec.filesystem("memory")
        self._errors = list(errors)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if self._errors and self._at in ("", name):
                raise self._errors.pop(0)
            return getattr(self._system, name)(*given, **options)

        return call


@pytest.fixture(autouse=True)
def _empty() -> None:
    clear("box")


def test_small_objects_are_written_read_listed_and_deleted() -> None:
    store = memory_store("box")
    store.write("a/b.json", b"1")
    store.write("c.json", b"22")
    assert store.read("a/b.json") == b"1"
    assert store.read("none") is None
    assert store.sizes() == {"a/b.json": 1, "c.json": 2}
    assert store.sizes("a") == {"a/b.json": 1}
    assert store.sizes("none") == {}
    store.delete("c.json")
    store.delete("c.json")
    assert store.sizes() == {"a/b.json": 1}


def test_an_object_is_created_once() -> None:
    store = memory_store("box")
    assert store.create("lease", b"mine")
    assert not store.create("lease", b"yours")
    assert store.read("lease") == b"mine"


def test_files_go_there_and_back_and_are_hashed(tmp_path: Path) -> None:
    store = memory_store("box")
    # sha256 of "abc": FIPS 180-2, appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert store.upload(tmp_path / "abc", "x/abc") == (3, known)
    store.copy("x/abc", "y")
    assert store.download("y", tmp_path / "new" / "y") == known
    assert (tmp_path / "new" / "y").read_bytes() == b"abc"
    assert store.download("none", tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_folders_are_made_where_a_place_has_folders(tmp_path: Path) -> None:
    store = Store(f"local://{tmp_path}/runs/x", wait_s=0)
    store.write("stages/a.json", b"1")
    assert (tmp_path / "runs" / "x" / "stages" / "a.json").read_bytes() == b"1"
    assert store.sizes() == {"stages/a.json": 1}


def test_what_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    system = Failing(ConnectionError("gone"), TimeoutError("slow"))
    Store("memory://box", wait_s=60, system=system).write("a", b"1")
    assert memory_store("box").read("a") == b"1"
    assert pauses == [0.5, 1.0]


def test_what_comes_before_is_asked_in_every_try_and_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    memory_store("box").write("old", b"0")

    def tries(act: Callable[[Store, Callable[[], None]], object], call: str) -> int:
        asked: list[str] = []

        def before() -> None:
            asked.append(call)
            if len(asked) == 2:
                raise StageError("taken over")

        store = Store("memory://box", wait_s=60, system=Failing(ConnectionError("gone"), at=call))
        with pytest.raises(StageError, match="taken over"):
            act(store, before)
        return len(asked)

    assert tries(lambda store, before: store.write("a", b"1", before), "pipe_file") == 2
    assert tries(lambda store, before: store.copy("old", "a", before), "cp_file") == 2
    assert tries(lambda store, before: store.delete("old", before), "rm_file") == 2
    assert memory_store("box").sizes() == {"old": 1}


@pytest.mark.parametrize("last", [1, 2], ids=["before it begins", "before it counts"])
def test_an_upload_is_asked_for_twice(tmp_path: Path, last: int) -> None:
    (tmp_path / "new").write_text("new")
    store = Store(f"local://{tmp_path}/box", wait_s=60)
    store.write("a", b"old")
    asked: list[int] = []

    def before() -> None:
        asked.append(1)
        if len(asked) == last:
            raise StageError("taken over")

    with pytest.raises(StageError, match="taken over"):
        store.upload(tmp_path / "new", "a", before)
    assert len(asked) == last
    assert store.read("a") == b"old"


def test_a_store_that_stays_away_is_told_after_the_wait() -> None:
    store = Store("memory://box", wait_s=0, system=Failing(*[ConnectionError("no route")] * 9))
    with pytest.raises(StorageError, match=r"memory://box: the store cannot be reached, tried for"):
        store.write("a", b"1")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("Forbidden"), "no access: Forbidden; give credentials by"),
        (FileNotFoundError("The specified bucket does not exist"), "make the bucket first"),
        (NotImplementedError("read-only"), "the store refuses: read-only"),
    ],
)
def test_what_cannot_pass_is_told_at_once(error: Exception, told: str) -> None:
    store = Store("memory://box", wait_s=1e6, system=Failing(error))
    with pytest.raises(StoreRefuses, match=told) as caught:
        store.write("a", b"1")
    assert caught.value.exit_code == 2


def test_no_secret_in_a_message() -> None:
    error = ConnectionError("https://me:hunter2@host/x?X-Amz-Signature=abc failed")
    store = Store("memory://me:hunter2@box", wait_s=0, system=Failing(error, error))
    with pytest.raises(StorageError) as caught:
        store.write("a", b"1")
    assert "hunter2" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_local_disk_that_refuses_is_told_as_such(tmp_path: Path) -> None:
    store = memory_store("box")
    store.write("a", b"1")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is in the way of a folder"):
        store.download("a", tmp_path / "file" / "a")


def test_a_wrong_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, WAIT_VARIABLE, "soon")
    with pytest.raises(UsageError, match="AMENABLE_STORE_WAIT_S: found 'soon'; expected seconds"):
        Store("memory://box")
