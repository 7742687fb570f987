"""One writer a run folder on a store: an object that its holder keeps fresh.

The lease names host, process and time. One that has not been renewed for `STALE_S` is taken over;
times are compared across machines, whose clocks must agree to well under that. A holder that was
taken over finds out before it writes anything: `check` reads the lease, in every try of a request
that changes the store. Within that request two could still write. Where the store can put an
object only if there is none (Amazon S3), two that find no lease are told apart by the store,
elsewhere by a second look. Of two that take over a stale one, the later may remove what the earlier
has just put: both have passed `acquire`, and the earlier is refused by its next `check`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from amenable.errors import AmenableError, StageError
from amenable.pipeline.store import Store

STALE_S = 120.0
"""A lease without a sign of life for so long is no lease."""

HEARTBEAT_S = 20.0
"""Seconds between two signs of life."""

_PATH = ".lease.json"


class Lease:
    """The right to write below a store's URL.

    Args:
        store: where.
        mine: the token of a lease that a dead process of this very working folder held.
    """

    def __init__(self, store: Store, mine: str = "") -> None:
        self._store, self._mine = store, mine
        self._beaten = store.waited_for(0)  # the next beat is the next try
        self.token = uuid.uuid4().hex
        self._taken: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lease and keeps it fresh in a thread.

        Raises:
            StageError: another process holds it; says which.
            StorageError: the store refuses or stays away.
        """
        if (holder := self._rival()) is not None:
            if holder and holder.get("token") != self._mine and _age_s(holder) < STALE_S:
                raise StageError(self._held_message(holder))
            self._store.delete(_PATH)
            if (holder := self._rival()) is not None:
                raise StageError(self._held_message(holder))
        self.check()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Returns while the lease is this one.

        Raises:
            StageError: another process has taken it over.
        """
        holder = self._taken or self._holder()
        if holder.get("token") == self.token:
            return
        if not holder:  # someone removed it
            rival = self._rival()
            if rival is None:
                return
            holder = rival
        self._taken = holder
        raise StageError(
            f"{self._store.shown}: {_who(self._taken)} has taken this run folder over, as this one "
            f"gave no sign of life for {STALE_S:.0f} s; nothing more is written there"
        )

    def release(self) -> None:
        """Gives the lease back, if it is still this one; a store that stays away is left alone."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT_S)
        with suppress(AmenableError):
            if self._holder().get("token") == self.token:
                self._store.delete(_PATH)

    def abandon(self) -> None:
        """Stops keeping it fresh and leaves it to go stale."""
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(AmenableError):  # the next publication tells
                self._beaten.write(_PATH, self._signed(), before=self.check)

    def _rival(self) -> dict[str, Any] | None:
        """Puts the lease where there is none; who holds it instead.

        None when it is this one, also if it was put and the store's answer was lost.
        """
        if self._store.create(_PATH, self._signed()):
            return None
        holder = self._holder()
        return None if holder.get("token") == self.token else holder

    def _signed(self) -> bytes:
        holder = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        return json.dumps(holder).encode()

    def _holder(self) -> dict[str, Any]:
        """Who holds it; empty if nobody does, or nothing readable stands there."""
        with suppress(ValueError):
            found = json.loads(self._store.read(_PATH) or b"{}")
            return found if isinstance(found, dict) else {}
        return {}

    def _held_message(self, holder: dict[str, Any]) -> str:
        left_s = max(1.0, STALE_S - _age_s(holder))
        return (
            f"{self._store.shown}: {_who(holder)}, last heard of {max(0.0, _age_s(holder)):.0f} s "
            "ago, is writing this run folder; wait for it, stop it, or choose another with --out. "
            f"If it is dead, the same command takes over in {left_s:.0f} s"
        )


def _age_s(holder: dict[str, Any]) -> float:
    try:
        return time.time() - float(holder["time"])
    except (KeyError, TypeError, ValueError):
        return STALE_S


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}"
