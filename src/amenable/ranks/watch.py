"""Every rank's heart beats in a store; who falls silent, or fails, ends all, by name.

A collective hangs, or fails without saying whose fault it is, when one of its ranks is gone. So a
thread of each rank writes a beat every two seconds and reads those of the others. A rank whose
process has ended on this host, or which has not been heard of for 15 seconds, is gone; a rank that
fails leaves its message before it ends. What the thread finds, the main thread raises as soon as it
can; where it hangs, the thread itself says it and ends the process.

    beat/R   host, pid and a count       failed   the first message       left/R   it ended well
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from amenable.masking import without_secrets
from amenable.ranks import group

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEAT_S = 2.0
SILENT_S = 15.0
GRACE_S = 8.0
"""For the main thread to end by itself, once something is known."""
_ANSWER = timedelta(seconds=10)  # for the store


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    host: str
    pid: int
    count: int = 0

    @classmethod
    def own(cls, count: int) -> Beat:
        """Of this process."""
        return cls(_host(), os.getpid(), count)

    @property
    def has_ended(self) -> bool:
        """True for a process of this host that is no more; False where that cannot be seen."""
        if self.host != _host():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return Path("/proc/self/stat").exists()
        except OSError:
            return False
        return state in "ZX"


def _host() -> str:
    """This host, and this container of it."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class Watch:
    """The heartbeat of this rank, and its eye on the others. Made by all ranks together."""

    def __init__(self) -> None:
        self._rank, self._size = group.rank(), group.size()
        self._host = os.environ.get("MASTER_ADDR") or socket.getfqdn()
        self._server = self._open(0, is_master=True) if self._rank == 0 else None
        where = group.told((self._host, self._server.port if self._server else 0))
        self._host, self._port = where
        self.store = self._open(self._port)  # of the main thread; a wait holds its lock
        self._beats = self._open(self._port)
        self._known: dict[int, Beat] = {}
        self._verdict: str | None = None
        self._found = threading.Event()
        self._stopped = threading.Event()
        self._write(0)
        seen = group.gathered(Beat.own(0))
        self._known = dict(enumerate(seen))
        self._thread = threading.Thread(target=self._run, name="amenable ranks", daemon=True)
        self._thread.start()

    def _open(self, port: int, *, is_master: bool = False) -> TCPStore:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        return TCPStore(
            self._host, port, is_master=is_master, wait_for_workers=False, timeout=_ANSWER
        )

    def who(self, rank: int) -> str:
        """A rank in messages."""
        beat = self._known[rank]
        return f"rank {rank} of {self._size} (host {beat.host.split()[0]}, pid {beat.pid})"

    @property
    def hosts(self) -> set[str]:
        """Of all ranks."""
        return {beat.host for beat in self._known.values()}

    def fail(self, message: str) -> None:
        """Leave a message for the others, unless another rank is to blame, or has left one."""
        if self._verdict is not None:
            return
        with suppress(Exception):
            self.store.compare_set("failed", "", json.dumps([self._rank, message]))

    def verdict(self, wait_s: float = 0.0) -> str | None:
        """Which other rank failed or is gone, and why; None if nothing is known in so many seconds.

        Args:
            wait_s: a rank that is gone may be found out only after `SILENT_S` and a beat.
        """
        self._found.wait(wait_s)
        return self._verdict

    def leave(self, *, well: bool) -> None:
        """Stop watching: this rank ends, or the run does. Rank 0, whose store it is, goes last.

        Args:
            well: nothing failed here.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        with suppress(Exception):
            self.store.set(f"left/{self._rank}", "1")
            end = time.monotonic() + (SILENT_S if well else 2 * BEAT_S + 1)
            others = [f"left/{n}" for n in range(1, self._size)]
            while self._rank == 0 and time.monotonic() < end and not self.store.check(others):
                time.sleep(0.05)
        # Python's end would cut the thread off inside the store's C++, which aborts the process.
        self._thread.join(_ANSWER.total_seconds() + 1)

    def _write(self, count: int) -> None:
        beat = Beat.own(count)
        self._beats.set(f"beat/{self._rank}", json.dumps([beat.host, beat.pid, count]))

    def _run(self) -> None:
        heard = dict.fromkeys(self._known, time.monotonic())
        count = 0
        while not self._stopped.wait(BEAT_S if count else 0.1):
            count += 1
            try:
                self._write(count)
                verdict = self._look(heard)
            except Exception:  # the store is rank 0's: it has gone with it
                verdict = None if self._rank == 0 else self._without_store()
            if verdict is not None and not self._stopped.is_set():
                self._verdict = verdict
                self._found.set()
                if not self._stopped.wait(GRACE_S):
                    self._end(verdict)
                return

    def _look(self, heard: dict[int, float]) -> str | None:
        if self._beats.check(["failed"]):
            rank, message = json.loads(self._beats.get("failed"))
            if rank != self._rank:
                return f"{self.who(rank)} failed: {message}"
            return None
        now = time.monotonic()
        for rank in self._known:
            if rank == self._rank or self._beats.check([f"left/{rank}"]):
                continue
            beat = Beat(*json.loads(self._beats.get(f"beat/{rank}")))
            if beat.has_ended:
                return f"{self.who(rank)} is gone: its process has ended"
            if beat != self._known[rank]:
                self._known[rank], heard[rank] = beat, now
            elif now - heard[rank] > SILENT_S:
                return f"{self.who(rank)} is gone: no sign of life for {now - heard[rank]:.0f} s"
        return None

    def _without_store(self) -> str:
        if self._known[0].has_ended:
            return f"{self.who(0)} is gone: its process has ended"
        return f"{self.who(0)} is gone: its store at {self._host}:{self._port} does not answer"

    def _end(self, verdict: str) -> None:
        """The main thread hangs in a collective that will never end."""
        print(f"amenable: {without_secrets(verdict)}", file=sys.stderr, flush=True)
        os._exit(1)
