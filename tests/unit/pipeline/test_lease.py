from __future__ import annotations

import json
import time
from typing import Any

import fsspec
import pytest

from amenable.errors import StageError
from amenable.pipeline import lease as lease_module
from amenable.pipeline.lease import STALE_S, Lease
from amenable.pipeline.store import Store

from .stores import clear, memory_store


@pytest.fixture
def store() -> Store:
    clear("leased")
    return memory_store("leased")


def age(store: Store, seconds: float) -> None:
    """Let the lease's last sign of life lie further back."""
    holder = json.loads(store.read(".lease.json") or b"")
    store.write(".lease.json", json.dumps({**holder, "time": holder["time"] - seconds}).encode())


def test_a_second_writer_is_refused_until_the_first_gives_it_back(store: Store) -> None:
    first, second = Lease(store), Lease(store)
    first.acquire()
    with pytest.raises(StageError, match=r"memory://leased: process \d+ on .*, last heard of 0 s"):
        second.acquire()
    first.release()
    second.acquire()
    second.check()
    second.release()
    assert store.read(".lease.json") is None


def test_a_stale_lease_is_taken_over_and_its_holder_finds_out(store: Store) -> None:
    first, second = Lease(store), Lease(store)
    first.acquire()
    age(store, STALE_S - 5)
    with pytest.raises(StageError, match=r"takes over in [45] s"):
        second.acquire()
    age(store, 6)
    second.acquire()
    with pytest.raises(StageError, match="has taken this run folder over"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_a_dead_process_of_the_same_working_folder_is_followed_at_once(store: Store) -> None:
    dead = Lease(store)
    dead.acquire()
    dead.abandon()
    heir = Lease(store, dead.token)
    heir.acquire()
    heir.release()


def test_a_lease_that_was_removed_by_hand_is_put_back(store: Store) -> None:
    lease = Lease(store)
    lease.acquire()
    store.delete(".lease.json")
    lease.check()
    assert json.loads(store.read(".lease.json") or b"")["token"] == lease.token
    lease.release()


def test_an_unreadable_lease_is_none(store: Store) -> None:
    store.write(".lease.json", b"half a l")
    lease = Lease(store)
    lease.acquire()
    lease.release()


def test_the_holder_keeps_it_fresh(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    lease = Lease(store)
    lease.acquire()
    age(store, 1000)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if time.time() - json.loads(store.read(".lease.json") or b"")["time"] < 100:
            break
        time.sleep(0.01)
    else:
        pytest.fail("no sign of life")
    lease.release()


class Flaky:
    """A filesystem in memory that calls `instead` at the next write, and then loses the answer."""

    def __init__(self) -> None:
        self._system = fsspec.filesystem("memory")
        self.instead: Any = None

    def pipe_file(self, *given: Any, **options: Any) -> None:
        if self.instead is None:
            self._system.pipe_file(*given, **options)
            return
        instead, self.instead = self.instead, None
        instead(*given, **options)
        raise ConnectionError("gone")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)


def test_a_sign_of_life_that_fails_leaves_the_lease_of_another(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Flaky()
    lease = Lease(Store("memory://leased", wait_s=60, system=system))
    lease.acquire()
    other = b'{"token": "of another"}'

    def taken_over(*given: Any, **options: Any) -> None:
        store.write(".lease.json", other)
        lease.abandon()

    system.instead = taken_over
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(lease._ended, "wait", lambda seconds: lease._ended.is_set())
    lease._beat()
    assert system.instead is None
    assert store.read(".lease.json") == other


def test_a_lease_whose_answer_was_lost_is_ours(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    system = Flaky()
    system.instead = fsspec.filesystem("memory").pipe_file
    lease = Lease(Store("memory://leased", wait_s=60, system=system))
    lease.acquire()
    store.delete(".lease.json")
    system.instead = fsspec.filesystem("memory").pipe_file
    lease.check()
    lease.release()
    assert store.read(".lease.json") is None
