"""Replies that have arrived, in a SQLite file: no question is asked twice, whatever happens.

A reply is committed when it arrives. It is found again by a hash of the judge's identity and of
the question with its order.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amenable.artifacts import storage_error
from amenable.errors import StorageError
from amenable.judges.types import Question, Reply, Verdict

_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY,
    judge TEXT NOT NULL,
    prompt_id TEXT NOT NULL,
    verdict TEXT NOT NULL,
    text TEXT NOT NULL,
    confidence REAL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    arrived TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) WITHOUT ROWID
"""
_BUSY_MS = 10_000


def question_key(identity: Mapping[str, Any], question: Question) -> str:
    """SHA-256 of all that a reply depends on."""
    messages = [[str(message.speaker), message.content] for message in question.prompt.messages]
    asked = [dict(identity), messages, question.first, question.second]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class ReplyStore:
    """A file of replies; several processes may write to it.

    Args:
        path: made with its folder if it is not there.

    Raises:
        StorageError: it cannot be opened, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except OSError as error:
            raise storage_error(path, error) from error
        except sqlite3.Error as error:
            raise self._refused(error) from error
        try:
            self._file.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute(_TABLE)
        except sqlite3.Error as error:
            self._file.close()
            raise self._refused(error) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def keep(self, key: str, judge: str, prompt_id: str, reply: Reply) -> None:
        """Commit a reply.

        Raises:
            StorageError: the disk is full or not writable.
        """
        row = (
            *(key, judge, prompt_id, str(reply.verdict), reply.text, reply.confidence),
            *(reply.prompt_tokens, reply.completion_tokens),
        )
        try:
            with self._lock:
                self._file.execute(
                    "INSERT OR IGNORE INTO replies (key, judge, prompt_id, verdict, text,"
                    " confidence, prompt_tokens, completion_tokens)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def find(self, keys: Sequence[str]) -> dict[str, Reply]:
        """Those that are there, by key."""
        found = {}
        with self._lock:
            for key in dict.fromkeys(keys):
                row = self._file.execute(
                    "SELECT verdict, text, confidence, prompt_tokens, completion_tokens"
                    " FROM replies WHERE key = ?",
                    (key,),
                ).fetchone()
                if row is not None:
                    found[key] = Reply(Verdict(row[0]), *row[1:])
        return found

    def _refused(self, error: sqlite3.Error) -> StorageError:
        return StorageError(
            f"{self._path}: {error}; free some space, make the folder writable, or name another "
            "with --out. Replies that were kept are intact."
        )
