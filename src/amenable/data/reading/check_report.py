"""What a check of data files found: every fault with its place, and counts."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from amenable.data.formats.format import Kind
from amenable.data.reading.read_log import reason_of
from amenable.errors import DataError


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; `reason` says what was found, what was expected and the remedy."""

    file: str
    line: int | None
    """1-based; None if a whole file is at fault."""
    field: str | None
    reason: str

    def __str__(self) -> str:
        """The line that a reading which ends here would print."""
        return str(DataError(self.reason, path=self.file, line=self.line, field=self.field))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What one file was read as, and counts."""

    file: str
    kind: Kind | None
    """None if no record could be read."""
    format: str | None
    records: int
    """Objects decoded."""
    rows: int
    """Typed rows without a fault; an id that is used again is one."""
    faults: int
    dropped: dict[str, int]
    """Left out by a documented rule, which is no fault: reason -> records or pairs."""
    coerced: dict[str, int]
    """What was read as something else -> how often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The files that were written."""

    out: str
    rows: int
    rejects: str | None
    """None if nothing was rejected, so that there is no such file."""
    rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """All faults of all files, by place."""

    files: list[FileReport]
    faults: list[Fault]
    """The first `max_errors`, by file (in the order given) and line."""
    fault_count: int
    reasons: dict[str, int]
    """Field and beginning of the message -> faults, the most frequent first."""
    fixed: Fixed | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.fault_count

    @property
    def records(self) -> int:
        """Objects decoded in all files."""
        return sum(file.records for file in self.files)

    @property
    def rows(self) -> int:
        """Typed rows without a fault in all files."""
        return sum(file.rows for file in self.files)

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "ok": self.ok,
            "records": self.records,
            "rows": self.rows,
            "fault_count": self.fault_count,
            "faults": [_as_dict(fault) for fault in self.faults],
            "faults_by_reason": self.reasons,
            "files": [_as_dict(file) for file in self.files],
            "fixed": None if self.fixed is None else _as_dict(self.fixed),
        }

    def lines(self) -> Iterator[str]:
        """The report as lines of plain text."""
        for file in self.files:
            yield from _file_lines(file)
        yield from map(str, self.faults)
        yield self._verdict()
        if self.fault_count > 1:
            yield from (f"    {count:>9,} × {reason}" for reason, count in self.reasons.items())
        if self.fixed is not None:
            yield f"{self.fixed.out}: {_count(self.fixed.rows, 'row')} written"
            if self.fixed.rejects is not None:
                yield f"{self.fixed.rejects}: {_count(self.fixed.rejected, 'reject')} written"

    def _verdict(self) -> str:
        if self.ok:
            return f"no faults in {_count(self.records, 'record')}"
        told = _count(self.fault_count, "fault")
        if len(self.faults) < self.fault_count:
            return f"{told}, the first {len(self.faults):,} shown"
        return told


@dataclass
class FoundFaults:
    """Faults as they are found: all are counted, those that stand first are kept.

    Args:
        most: how many to keep; 0 keeps all.
    """

    most: int
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _kept: list[tuple[tuple[int, int, int], Fault]] = field(default_factory=list)

    def add(self, error: DataError, file: int) -> None:
        """Counts one more; `file` is the number of its file in the order given."""
        self.count += 1
        self.reasons[reason_of(error)] += 1
        # without a line it is of the whole file or its end: behind the lines; equal places by age
        place = (file, error.line or 2**62, self.count)
        if self.most and len(self._kept) >= self.most:
            if place > self._kept[-1][0]:
                return
            self._kept.pop()
        fault = Fault(str(error.path), error.line, error.field, error.reason)
        insort(self._kept, (place, fault), key=lambda entry: entry[0])

    def count_more(self, reason: str, times: int) -> None:
        """Counts faults of a reason that are not told one by one."""
        if times:
            self.count += times
            self.reasons[reason] += times

    def kept(self) -> list[Fault]:
        """What is kept, by place."""
        return [fault for _, fault in self._kept]


def _as_dict(entry: Fault | FileReport | Fixed) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in type(entry).__slots__}


def _file_lines(file: FileReport) -> Iterator[str]:
    what = f"{file.kind}, {file.format}" if file.kind else "not read"
    counts = [_count(file.records, "record"), _count(file.rows, "row")]
    if file.faults:
        counts.append(_count(file.faults, "fault"))
    yield f"{file.file}: {what}; {', '.join(counts)}"
    for reason, count in file.coerced.items():
        yield f"    {count:>9,} × {reason}"
    for reason, count in file.dropped.items():
        yield f"    {count:>9,} left out: {reason}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
