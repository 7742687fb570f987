"""All rows of one kind as columns of numbers, while their texts lie in a file.

Rows are read as a stream. Each goes as its native line into a spool file, and what the data stage
decides by stays in memory: hashes of group, prompt and content, word counts, its place and its id.
That is `ROW_BYTES` and the id of each row, whatever the length of its texts.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from amenable.artifacts import storage_errors
from amenable.data.formats.native import (
    PREFERENCE_KEYS,
    PROMPT_KEYS,
    demonstration_to_row,
    preference_to_row,
    prompt_to_row,
)
from amenable.data.reading.readers import id_used_twice
from amenable.data.reading.records import ReadLog, Row
from amenable.data.row_file import BLOCK_BYTES, Json, row_line
from amenable.data.schemas import Choice, Demonstration, Preference, Prompt, prompt_key
from amenable.data.splits import Codes, Marks, Places, rank_bits

T = TypeVar("T", Prompt, Demonstration, Preference)

TEXTS = ("prompt", "output_text", "candidate_0", "candidate_1")
"""Whose lengths are counted; all but the first are keys of the row, where they hold a text."""

CHOICES = tuple(Choice)
"""What a number in the column of choices means."""

ROW_BYTES = 74
"""Memory of a row in a `RowTable`, in bytes, besides its id."""

_ONLY_IN_PREFERENCES = PREFERENCE_KEYS - PROMPT_KEYS
_decode = msgspec.json.Decoder(Json).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """n rows: columns in memory, in the order in which they were read; lines in a spool file."""

    spool: Path
    """Holds the native lines."""

    as_prompts: bool = False
    """Whether the rows are the prompts of the preferences in the spool."""

    group: Codes
    """[n] `rank_bits` of the group's name."""

    key: Codes
    """[n] `prompt_key`: rows of one key stay on one side."""

    asked: Codes
    """[n] hash of the prompt as it stands, every turn, case and white space included."""

    content: Codes
    """[n] hash of everything that two exact duplicates have in common, as it stands."""

    choice: npt.NDArray[np.int8]
    """[n] place in `CHOICES`; -1 where there is nothing to choose."""

    equal: Marks
    """[n] whether both candidates are one text."""

    words: npt.NDArray[np.int32]
    """[n, 4] words of each of `TEXTS`; -1 where the row has no such text."""

    start: npt.NDArray[np.int64]
    """[n] where the row's line begins in the spool, in bytes."""

    length: npt.NDArray[np.uint32]
    """[n] bytes of the line, its line feed included."""

    id_start: npt.NDArray[np.int64]
    """[n] where the row's id begins in `ids`."""

    id_length: npt.NDArray[np.uint32]
    """[n] bytes of the id."""

    ids: bytes
    """The ids, UTF-8, one after the other."""

    def __len__(self) -> int:
        return len(self.group)

    def id_of(self, row: int) -> str:
        """The row's id."""
        start = int(self.id_start[row])
        return self.ids[start : start + int(self.id_length[row])].decode()

    def ids_of(self, rows: Places) -> Iterator[str]:
        """Ids of these rows."""
        starts = self.id_start[rows]
        ends = starts + self.id_length[rows]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield self.ids[start:end].decode()

    def lines(self, rows: Places) -> Iterator[bytes]:
        """The native lines of these rows, in the order given; one in memory at a time."""
        handle = os.open(self.spool, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for row in rows.tolist():
                line = os.pread(handle, int(self.length[row]), int(self.start[row]))
                yield _prompt_line(line) if self.as_prompts else line
        finally:
            os.close(handle)

    def rows(self, rows: Places) -> Iterator[Json]:
        """The decoded lines of these rows."""
        return map(_decode, self.lines(rows))

    def prompts_of_preferences(self) -> RowTable:
        """The prompts of these preferences: what else their rows hold, but no judgement."""
        words = self.words.copy()
        words[:, TEXTS.index("candidate_0") :] = -1
        return replace(self, as_prompts=True, words=words)

    def keep(self, rows: Marks) -> RowTable:
        """The rows that are marked."""
        columns = {
            column.name: getattr(self, column.name)[rows]
            for column in fields(self)
            if isinstance(getattr(self, column.name), np.ndarray)
        }
        return replace(self, **columns)


def read_table(spool: Path, rows: Iterable[tuple[Row | None, T]], log: ReadLog) -> RowTable:
    """Reads all rows into a table and the spool file; each id is used once.

    Args:
        spool: the file to write; its folder exists.
        rows: each with the record that it was made of; None for rows of no file, whose ids are
            known to differ.
        log: decides what an id that is used twice means; where it goes on, the later row is left
            out.

    Raises:
        DataError: as reading `rows` and the log say.
        StorageError: the disk is full or not writable.
    """
    made = _Columns()
    with _Spool(spool) as file:
        for row, item in rows:
            file.write(made.add(row, item))
    table = made.table(spool)
    twice = made.used_twice(table)
    if not twice:
        return table
    kept = np.ones(len(table), dtype=np.bool_)
    for later, first in twice:
        raw = next(table.lines(np.array([later])))
        place = Row({}, *made.place(later), "", log)
        path, line = made.place(first)
        log.fault(id_used_twice(table.id_of(later), place, f"{path}:{line}"), raw)
        log.rows -= 1
        kept[later] = False
    return table.keep(kept)


class _Columns:
    """The columns while they grow, and what finds ids that are used twice."""

    def __init__(self) -> None:
        self._hashes = array("Q")  # of group, prompt, prompt as it stands, content: four a row
        self._marks = array("b")  # choice, and whether the candidates are equal, two a row
        self._words, self._lengths = array("i"), array("I")
        self._ids, self._id_lengths = bytearray(), array("I")
        self._files: dict[str | Path, int] = {}
        self._places = array("q")  # hash of the id, file, line, three a row that was read

    def add(self, row: Row | None, item: Prompt | Demonstration | Preference) -> bytes:
        """Takes in a row; returns its native line."""
        values, prompt, choice, content = _native(item)
        asked = rank_bits(_turns(prompt))
        self._hashes.append(rank_bits(prompt.group))
        self._hashes.append(int(prompt_key(prompt), 16))
        self._hashes.append(asked)
        self._hashes.append(rank_bits(content, asked) if content else asked)
        self._marks.append(choice)
        self._marks.append(choice >= 0 and values["candidate_0"] == values["candidate_1"])
        self._words.append(len(prompt.text.split()))
        for text in (values.get(name) for name in TEXTS[1:]):
            self._words.append(len(text.split()) if isinstance(text, str) else -1)
        name = prompt.id.encode()
        self._ids += name
        self._id_lengths.append(len(name))
        if row is not None:
            file = self._files.setdefault(row.path, len(self._files))
            self._places.extend((hash(prompt.id), file, row.line))
        line = row_line(values)
        self._lengths.append(len(line))
        return line

    def table(self, spool: Path) -> RowTable:
        """The columns as they are now."""
        hashes = np.frombuffer(self._hashes, np.uint64).reshape(-1, 4)
        marks = np.frombuffer(self._marks, np.int8).reshape(-1, 2)
        length = np.frombuffer(self._lengths, np.uint32)
        id_length = np.frombuffer(self._id_lengths, np.uint32)
        return RowTable(
            spool=spool,
            group=hashes[:, 0],
            key=hashes[:, 1],
            asked=hashes[:, 2],
            content=hashes[:, 3],
            choice=marks[:, 0],
            equal=marks[:, 1].astype(np.bool_),
            words=np.frombuffer(self._words, np.int32).reshape(-1, len(TEXTS)),
            start=_starts(length),
            length=length,
            id_start=_starts(id_length),
            id_length=id_length,
            ids=bytes(self._ids),
        )

    def used_twice(self, table: RowTable) -> list[tuple[int, int]]:
        """(later row, first row) of every id that an earlier row has, in the order of the rows."""
        hashes = np.frombuffer(self._places, np.int64).reshape(-1, 3)[:, 0]
        order = np.argsort(hashes, kind="stable")
        again = hashes[order][1:] == hashes[order][:-1]
        suspects = np.union1d(order[1:][again], order[:-1][again])
        first: dict[str, int] = {}
        found = []
        for row in suspects.tolist():
            earlier = first.setdefault(table.id_of(row), row)
            if earlier != row:
                found.append((row, earlier))
        return found

    def place(self, row: int) -> tuple[str | Path, int]:
        """File and line that the row was read from."""
        _, file, line = self._places[3 * row : 3 * row + 3]
        return list(self._files)[file], line


class _Spool:
    """A file that is written in large parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._bytes = 0

    def __enter__(self) -> _Spool:
        with storage_errors(self._path):
            self._file = self._path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        with storage_errors(self._path), self._file:
            self._flush()

    def write(self, line: bytes) -> None:
        """Takes the line in."""
        self._waiting.append(line)
        self._bytes += len(line)
        if self._bytes >= BLOCK_BYTES:
            with storage_errors(self._path):
                self._flush()

    def _flush(self) -> None:
        self._file.write(b"".join(self._waiting))
        self._waiting, self._bytes = [], 0


def _native(item: Prompt | Demonstration | Preference) -> tuple[Json, Prompt, int, str]:
    """The native row, its prompt, its choice (-1: none), what two equal rows have in common."""
    if isinstance(item, Prompt):
        return prompt_to_row(item), item, -1, ""
    if isinstance(item, Demonstration):
        return demonstration_to_row(item), item.prompt, -1, item.output_text
    first, second = item.candidate_0, item.candidate_1
    content = f"{item.choice}\0{item.annotator!r}\0{len(first)}\0{first}\0{second}"
    return preference_to_row(item), item.prompt, CHOICES.index(item.choice), content


def _turns(prompt: Prompt) -> str:
    """One text for each conversation: lengths tell where a turn ends."""
    return "".join(
        f"{turn.speaker} {len(turn.content)}\n{turn.content}" for turn in prompt.messages
    )


def _prompt_line(line: bytes) -> bytes:
    row = _decode(line)
    return row_line({key: row[key] for key in row if key not in _ONLY_IN_PREFERENCES})


def _starts(lengths: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """[n] where each piece begins if they stand one behind the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts: npt.NDArray[np.int64] = ends - lengths
    return starts
