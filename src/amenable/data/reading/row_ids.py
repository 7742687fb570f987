"""Which ids of many rows are used twice, in 8 bytes a row."""

from __future__ import annotations

from array import array
from bisect import bisect_right


class RowIds:
    """A 64-bit hash of each row's id, in the order of the rows, and where the rows stand.

    Lines are kept as the rows at which they do not follow each other: 16 bytes each, so that a
    file whose every line is one row takes 8 bytes a row, and one whose records make several rows,
    or stand on several lines, 24 at most. Hashes can agree where ids do not (in a million rows with
    a chance of 1 in 40 million): who asks for `repeated` compares the names.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self._starts = array("q")  # rows at which a run of lines starts
        self._lines = array("q")  # the line of that row
        self._files: list[tuple[int, int]] = []  # (first row, number of the file)
        self._expected = 0

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def nbytes(self) -> int:
        """Bytes held for the rows."""
        arrays = (self._hashes, self._starts, self._lines)
        return sum(len(held) * held.itemsize for held in arrays)

    def begin_file(self, number: int) -> None:
        """The rows that follow are those of the file of this number; numbers ascend."""
        self._files.append((len(self._hashes), number))
        self._expected = 0

    def add(self, name: str, line: int) -> None:
        """The next row's id and 1-based line."""
        if line != self._expected:
            self._starts.append(len(self._hashes))
            self._lines.append(line)
        self._expected = line + 1
        self._hashes.append(hash(name))

    def is_hash_of(self, row: int, name: str) -> bool:
        """Whether the row may have this id."""
        return self._hashes[row] == hash(name)

    def repeated(self) -> list[int]:
        """The rows whose hash another row has, ascending. Takes 16 bytes a row meanwhile."""
        if len(self._hashes) < 2:
            return []
        import numpy as np

        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        ordered = np.sort(hashes)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        if not len(twice):
            return []
        nearest = np.minimum(np.searchsorted(twice, hashes), len(twice) - 1)
        rows: list[int] = np.flatnonzero(twice[nearest] == hashes).tolist()
        return rows

    def place(self, row: int) -> tuple[int, int]:
        """The number of the row's file, and its line."""
        file = self._files[bisect_right(self._files, row, key=lambda entry: entry[0]) - 1][1]
        run = bisect_right(self._starts, row) - 1
        return file, self._lines[run] + row - self._starts[run]
