"""Good rows into one file, rejects into another; both written aside and renamed when whole."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

from amenable.artifacts import storage_errors
from amenable.data.formats.native import demonstration_to_row, preference_to_row, prompt_to_row
from amenable.data.reading.check_report import Fixed
from amenable.data.reading.records import Row
from amenable.data.schemas import Demonstration, Preference, Prompt
from amenable.errors import DataError, StorageError, UsageError


class FixedRows:
    """Writes `out` and, where there are any, rejects beside it. A context manager.

    Until `finish` has run both stand aside under hidden names, and leaving the context removes
    them.

    Args:
        out: where the good rows go; its name ends with `.jsonl`.
        inputs: the local files that are read.

    Raises:
        UsageError: `out` or the file of rejects exists, an input is `out`, or the name is unusable.
        StorageError: on entering, the folder cannot be written.
    """

    def __init__(self, out: Path, inputs: Iterable[Path]) -> None:
        if out.suffix != ".jsonl":
            raise UsageError(f"--fix {out}: expected a name that ends with .jsonl")
        self.out, self.rejects = out, out.with_name(f"{out.stem}.rejects.jsonl")
        resolved = {path.resolve() for path in inputs}
        for path in (self.out, self.rejects):
            if path.resolve() in resolved:
                raise UsageError(f"--fix: {path} is one of the files to check; name another")
            if path.exists() or path.is_symlink():
                raise UsageError(f"--fix: {path} exists and is not overwritten; name another")
        self.rows = self.rejected = 0
        self._files = ExitStack()

    def __enter__(self) -> FixedRows:
        with storage_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._good = self._open(_aside(self.out))
            self._bad = self._open(_aside(self.rejects))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()
        for path in (_aside(self.out), _aside(self.rejects), _second(self.out)):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def write(self, row: Row, item: Demonstration | Preference | Prompt) -> None:
        """Writes a good row in the native format, which loses nothing.

        Raises:
            DataError: the row cannot be written as a native row; names its place.
        """
        try:
            line = _encoded(_native(item))
        except DataError as error:  # of the writer, which knows no place
            raise row.fault(None, error.reason) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise row.fault(None, f"cannot be written as JSON ({error}); remove the row") from error
        with storage_errors(self.out):
            self._good.write(line)
        self.rows += 1

    def reject(self, error: DataError, raw: object) -> None:
        """Writes what was wrong, and the bytes or the record that it was wrong with."""
        entry = {
            "file": str(error.path),
            "line": error.line,
            "field": error.field,
            "reason": error.reason,
            "raw": raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw,
        }
        try:
            line = _encoded(entry)
        except (ValueError, TypeError, RecursionError):
            line = _encoded({**entry, "raw": ascii(raw)})
        with storage_errors(self.rejects):
            self._bad.write(line)
        self.rejected += 1

    def finish(self, dropped: Collection[int] = ()) -> Fixed:
        """Makes the files appear, the rows of these numbers (from 0) left out.

        Raises:
            StorageError: the disk is full, or a file appeared meanwhile.
        """
        with storage_errors(self.out):
            self._flush(self._good)
            self._flush(self._bad)
            aside = _aside(self.out)
            if dropped:
                aside = self._without(dropped)
            for path in (self.out, self.rejects):
                if path.exists():
                    raise StorageError(f"{path} has appeared since the check began; name another")
            if self.rejected:
                _aside(self.rejects).rename(self.rejects)
            aside.rename(self.out)
        self.rows -= len(dropped)
        rejects = str(self.rejects) if self.rejected else None
        return Fixed(out=str(self.out), rows=self.rows, rejects=rejects, rejected=self.rejected)

    def _open(self, path: Path) -> IO[bytes]:
        return self._files.enter_context(path.open("wb", buffering=2**20))

    def _without(self, dropped: Collection[int]) -> Path:
        """A second file aside, without these lines."""
        path = _second(self.out)
        with _aside(self.out).open("rb") as rows, path.open("wb", buffering=2**20) as kept:
            for number, line in enumerate(rows):
                if number not in dropped:
                    kept.write(line)
            self._flush(kept)
        return path

    @staticmethod
    def _flush(file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())


def _native(item: Demonstration | Preference | Prompt) -> dict[str, Any]:
    if isinstance(item, Preference):
        return preference_to_row(item)
    return demonstration_to_row(item) if isinstance(item, Demonstration) else prompt_to_row(item)


def _encoded(row: dict[str, Any]) -> bytes:
    """One line of JSON; half a surrogate pair raises ValueError."""
    try:
        return msgspec.json.encode(row) + b"\n"
    except OverflowError:  # whole numbers of more than 64 bits, which Python's own writer can
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _second(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.kept.partial")
