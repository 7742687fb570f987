from __future__ import annotations

import json
import time

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
