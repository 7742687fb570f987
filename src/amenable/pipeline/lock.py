"""One writer a run folder: a lock that a dead process does not hold."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amenable.artifacts import storage_errors
from amenable.errors import StageError


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Holds the lock at `path` while the block runs; the kernel frees it when the process dies.

    Raises:
        StageError: another process holds it; says which.
        StorageError: the folder cannot be made or written.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(handle):
            raise StageError(_held_message(path))
        with storage_errors(path):
            _sign(handle)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    import fcntl  # not on Windows, where this project does not run yet

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(handle: int) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(holder).encode())


def _held_message(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return (
        f"{path.parent}: {who}, is writing this run folder;"
        " wait for it, stop it, or choose another folder with --out"
    )
