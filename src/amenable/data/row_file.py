"""Rows of a file that Amenable wrote itself, read one by one when they are asked for.

A user's file is checked once, by `readers`; the data stage writes native rows, and every later
stage reads those through a `RowFile`: a sequence that holds 8 bytes a row, not the texts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import msgspec
import numpy as np
import numpy.typing as npt

from amenable.artifacts import plain, storage_errors
from amenable.data.formats.native import DEMONSTRATION_KEYS, PREFERENCE_KEYS, PROMPT_KEYS
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.errors import DataError

T = TypeVar("T")
Json = dict[str, Any]

BLOCK_BYTES = 2**20
"""How much of a file is read at a time."""

_LINES_AT_ONCE = 256
_LINE_END = ord("\n")

_SPEAKERS = {speaker.value: speaker for speaker in Speaker}
_CHOICES = {choice.value: choice for choice in Choice}
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_decode = msgspec.json.Decoder(Json).decode


class RowFile(Sequence[T], Generic[T]):
    """The rows of a JSON Lines file as typed rows, decoded when asked for.

    Slices are views without texts. Reading leaves no position behind, so that threads, and
    processes that were forked or given a pickled copy, may share one.

    Args:
        path: the file; it must not change.
        parse: makes a row of a decoded line; may raise KeyError, TypeError or ValueError.
    """

    def __init__(self, path: Path, parse: Callable[[Json], T]) -> None:
        self.path = path
        self._parse = parse
        offsets = _line_offsets(path)
        self._starts, self._ends = offsets[:-1], offsets[1:]
        self._handle: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> RowFile[T]: ...
    def __getitem__(self, index: int | slice) -> T | RowFile[T]:
        if isinstance(index, slice):
            part: RowFile[T] = RowFile.__new__(RowFile)
            part.path, part._parse, part._handle = self.path, self._parse, None
            part._starts, part._ends = self._starts[index], self._ends[index]
            return part
        start, end = int(self._starts[index]), int(self._ends[index])
        try:
            return self._parse(_decode(self._read(start, end)))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"is no row that Amenable wrote ({error!r}); run the data stage again",
                path=self.path,
                line=self._line(start),
            ) from error

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> Json:
        return {**self.__dict__, "_handle": None}  # a number that means nothing elsewhere

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            with suppress(OSError):
                os.close(self._handle)  # type: ignore[arg-type]

    def digest(self) -> str:
        """SHA-256 of the whole file, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _read(self, start: int, end: int) -> bytes:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._handle, end - start, start)

    def _line(self, start: int) -> int:
        with self.path.open("rb") as file:
            return file.read(start).count(b"\n") + 1


def open_prompts(path: Path) -> RowFile[Prompt]:
    """Prompts as `formats.native.prompt_to_row` writes them.

    Raises:
        DataError: there is no such file. A faulty row is told when it is read.
    """
    return RowFile(path, parse_prompt)


def open_demonstrations(path: Path) -> RowFile[Demonstration]:
    """Demonstrations as `formats.native.demonstration_to_row` writes them.

    Raises:
        DataError: as `open_prompts`.
    """
    return RowFile(path, parse_demonstration)


def open_preferences(path: Path) -> RowFile[Preference]:
    """Preferences as `formats.native.preference_to_row` writes them.

    Raises:
        DataError: as `open_prompts`.
    """
    return RowFile(path, parse_preference)


def parse_prompt(row: Json) -> Prompt:
    """The prompt of a row that Amenable wrote; nothing is checked."""
    return _prompt(row, PROMPT_KEYS)


def parse_demonstration(row: Json) -> Demonstration:
    """The demonstration of a row that Amenable wrote; nothing is checked."""
    return Demonstration(prompt=_prompt(row, DEMONSTRATION_KEYS), output_text=row["output_text"])


def parse_preference(row: Json) -> Preference:
    """The preference of a row that Amenable wrote; nothing is checked."""
    margin = row.get("margin")
    return Preference(
        prompt=_prompt(row, PREFERENCE_KEYS),
        candidate_0=row["candidate_0"],
        candidate_1=row["candidate_1"],
        choice=_CHOICES[row["choice"]],
        weight=float(row.get("weight", 1.0)),
        margin=None if margin is None else float(margin),
        annotator=row.get("annotator"),
        strength=row.get("strength"),
    )


def row_line(row: Mapping[str, Any]) -> bytes:
    """The row as one line of JSON, its line feed included; NaN and infinity become null."""
    try:
        return _encode(row).encode() + b"\n"
    except (TypeError, ValueError):  # not JSON's own types: rare, and plain() is slow
        return _encode(plain(row)).encode() + b"\n"


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Writes lines aside, flushes them to the disk and renames the file over `path`.

    Args:
        path: holds all of the lines in the end, or what it held before.
        lines: each with its line feed; a few hundred are in memory at a time.

    Raises:
        StorageError: the disk is full or not writable.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with storage_errors(path), aside.open("wb") as file:
            rest = iter(lines)
            while part := b"".join(islice(rest, _LINES_AT_ONCE)):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        with storage_errors(path):
            aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _prompt(row: Json, known: frozenset[str]) -> Prompt:
    text = row.get("input_text")
    if text is not None:
        messages: tuple[Message, ...] = (Message(Speaker.USER, text),)
    else:
        messages = tuple(Message(_SPEAKERS[m["role"]], m["content"]) for m in row["messages"])
    return Prompt(
        messages=messages,
        id=row["id"],
        group=row["group"],
        meta={key: value for key, value in row.items() if key not in known},
    )


def _line_offsets(path: Path) -> npt.NDArray[np.int64]:
    """[rows + 1] where each line begins, and where the last one ends."""
    found = [np.zeros(1, dtype=np.int64)]
    size = 0
    last = b"\n"
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                found.append(size + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == _LINE_END))
                size, last = size + len(block), block[-1:]
    except FileNotFoundError as error:
        raise DataError("no such file; run the stage that makes it", path=path) from error
    if last != b"\n":
        found.append(np.array([size]))
    return np.concatenate(found)
