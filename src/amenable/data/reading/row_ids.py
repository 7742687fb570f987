"""Which ids of many rows are used twice, in 8 bytes a row."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]
    """Row numbers, in the order in which the rows were added."""


class RowIds:
    """A 64-bit hash of each row's id, in the order of the rows, and where the rows stand.

    Lines are kept as the rows at which they do not follow each other: 16 bytes each, so that a
    file whose every line is one row takes 8 bytes a row, and one whose records make several rows,
    or stand on several lines, 24 at most. Hashes can agree where ids do not (in a million rows with
    a chance of 1 in 40 million): who shows a row of `repeated` compares the names.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self._starts = array("q")  # rows at which a run of lines starts
        self._lines = array("q")  # the line of that row
        self._files: list[tuple[int, int]] = []  # (first row, number of the file)
        self._expected = 0

    def __len__(self) -> int:
        return len(self._hashes)

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

    def repeated(self) -> tuple[Numbers, Numbers]:
        """The rows whose hash an earlier row has, ascending, and the first row of each one's hash.

        Takes 8 bytes a row meanwhile; where hashes are equal, 33 a row and 24 a repeated one.
        """
        import numpy as np

        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        none = np.empty(0, dtype=np.int64)
        if len(hashes) < 2:
            return none, none
        ordered = np.sort(hashes)
        if not (ordered[1:] == ordered[:-1]).any():
            return none, none
        rows = np.argsort(hashes, kind="stable")  # equal hashes in the order of their rows
        later = np.sort(rows[1:][ordered[1:] == ordered[:-1]])
        first = rows[np.searchsorted(ordered, hashes[later])]
        return later, first

    def by_file(self, rows: Numbers) -> dict[int, int]:
        """The number of a file -> how many of these rows are its own; ascending rows."""
        import numpy as np

        starts = [start for start, _ in self._files]
        ends = np.searchsorted(rows, [*starts[1:], len(self._hashes)])
        counts = np.diff(ends, prepend=0).tolist()
        return {file: n for (_, file), n in zip(self._files, counts, strict=True) if n}

    def place(self, row: int) -> tuple[int, int]:
        """The number of the row's file, and its line."""
        file = self._files[bisect_right(self._files, row, key=lambda entry: entry[0]) - 1][1]
        run = bisect_right(self._starts, row) - 1
        return file, self._lines[run] + row - self._starts[run]
