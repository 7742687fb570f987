"""One writer a folder or file: a lock that a dead process does not hold."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from amenable.artifacts import storage_errors
from amenable.errors import StageError


@contextmanager
def run_lock(path: Path, kind: str = "run folder") -> Iterator[None]:
    """Holds the lock at `path` while the block runs; the kernel frees it when the process dies.

    Args:
        path: of the lock, in the folder that is written.
        kind: of folder, for the message.

    Raises:
        StageError: another process holds it; says which.
        StorageError: the folder cannot be made or written.
    """
    handle = _open_locked(path, path.parent, kind)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock of the file at `path`, `.NAME.lock` beside it, which is gone afterwards.

    Raises:
        StageError: another process writes the file; says which.
        StorageError: the folder cannot be made or written.
    """
    lock = path.with_name(f".{path.name}.lock")
    handle = _open_locked(lock, path, "file")
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def _open_locked(path: Path, written: Path, kind: str) -> int:
    """The open lock of what is written; a lock that its holder has removed meanwhile is none."""
    while True:
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(handle):
                raise StageError(_held_message(path, written, kind))
            with storage_errors(path):
                _sign(handle)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
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


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _held_message(path: Path, written: Path, kind: str) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return (
        f"{written}: {who}, is writing this {kind};"
        f" wait for it, stop it, or choose another {kind.split()[-1]} with --out"
    )
