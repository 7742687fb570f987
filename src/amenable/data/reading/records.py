"""Any container to records: JSON Lines, a JSON array, CSV, Parquet, a hub data set.

The container is recognised by its first bytes, then by its name. Every fault goes to the log, which
decides whether reading goes on. Coercions are counted in `ReadLog.coerced`: blank lines and a byte
order mark are skipped; an optional key that is null counts as absent; a whole number as a name
becomes its text; in CSV an empty cell counts as absent and a text may be read as a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amenable.data.reading.containers import Container
from amenable.data.reading.json_records import Json, is_unicode
from amenable.data.reading.read_log import DroppingLog, ReadLog, listed, shown
from amenable.data.reading.sources import Source, open_source
from amenable.data.reading.table_records import hub_records
from amenable.errors import DataError

__all__ = ["DroppingLog", "Json", "ReadLog", "Row", "iter_records"]

_NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_WHOLE = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)


@dataclass(slots=True)  # one is made of every record: frozen costs a fifth of a check's time
class Row:
    """One decoded record and where it stands; its methods check one key each. Not to be changed."""

    values: Json
    path: str | Path
    """As the user named the file, without secrets: shown in errors."""
    line: int
    """1-based line; of Parquet and hub data the row, of CSV the record's first line."""
    label: str
    """What default ids of this file begin with."""
    log: ReadLog
    textual: bool = False
    """Whether the container holds texts only (CSV), so that a number is written as a text."""

    def fault(self, field: str | None, message: str) -> DataError:
        """An error that names file, line and field."""
        return DataError(message, path=self.path, line=self.line, field=field)

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """A needed text; refuses a missing, mistyped or (unless allowed) blank one."""
        if key not in self.values:
            raise self.fault(
                key,
                f"is missing; the row has {listed(self.values)}; add {key!r} or rename its column",
            )
        value = self.values[key]
        if value is None and self.textual:
            value = ""
        if not isinstance(value, str):
            raise self.fault(key, f"found {shown(value)}; expected a text in quotes")
        if not (may_be_empty or value.strip()):
            raise self.fault(key, "is empty; write its text or remove the row")
        return self._unicode(key, value)

    def name(self, key: str) -> str | None:
        """An optional name: a text, or a whole number read as its text."""
        value = self._optional(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.fault(
                key,
                f"found {shown(value)}; expected a text or a whole number; correct or remove it",
            )
        if isinstance(value, str):
            return self._unicode(key, value)
        self.log.coerce("whole number read as a name (id, group, annotator)")
        return str(value)

    def number(self, key: str, *, above_zero: bool) -> float | None:
        """An optional finite number, at least 0 or above it."""
        value = self.value(key)
        if value is None:
            self._optional(key)
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        if not fits or value < 0 or (above_zero and value == 0):
            wanted = "above 0" if above_zero else "of 0 or more"
            raise self.fault(
                key, f"found {shown(value)}; expected a number {wanted}; correct or remove it"
            )
        return float(value)

    def value(self, key: str) -> Any:
        """The value as it stands, None if absent; in CSV a number for the text of a number.

        For keys that may hold a number or something else, such as `choice`.
        """
        value = self.values.get(key)
        if self.textual and isinstance(value, str) and _NUMBER.fullmatch(value):
            self.log.coerce("text read as a number (CSV)")
            return _number(value)
        return value

    def _optional(self, key: str) -> Any:
        value = self.values.get(key)
        if value is None and not self.textual and key in self.values:
            self.log.coerce("null read as absent")
        return value

    def _unicode(self, key: str, value: str) -> str:
        if not value.isascii() and not is_unicode(value):
            raise self.fault(
                key, "has half a surrogate pair, which is no character; remove it from the text"
            )
        return value


def iter_records(source: Source, log: ReadLog) -> Generator[Row]:
    """The records of one source, one at a time, in bounded memory.

    Faults go to `log.fault`; where it returns, reading goes on with the next record. If what is
    behind a fault cannot be read, the log is given no raw content, and this source ends.
    """
    path, label = source.shown, source.label
    faults = _Faults(path, log)
    line, textual = 0, False
    records: Iterable[tuple[int, Json]]
    if source.is_hub:
        records = hub_records(source.name, faults, log.coerce)
    else:
        try:
            file = open_source(source)
        except DataError as error:
            log.fault(error)
            return
        records = container = Container(file, source.name, faults, log.coerce)
        textual = container.is_textual
    last = repeated = 0
    for line, values in records:
        log.records += 1
        if line != last:
            last, repeated = line, 0
            yield Row(values, path, line, label, log, textual)
        else:  # several elements of an array stand on one line
            repeated += 1
            yield Row(values, path, line, f"{label}/{repeated + 1}", log, textual)
    if not (line or faults.count):
        faults("the file has no rows; write one JSON object a line or leave it out", None, b"")


class _Faults:
    """Gives faults their file, passes them on to the log, counts them."""

    def __init__(self, path: str, log: ReadLog) -> None:
        self._path, self._log = path, log
        self.count = 0

    def __call__(
        self, message: str, line: int | None = None, raw: object = None, field: str | None = None
    ) -> None:
        self.count += 1
        self._log.fault(DataError(message, path=self._path, line=line, field=field), raw)


def _number(text: str) -> float:
    if _WHOLE.fullmatch(text) and len(text) < 300:  # beyond, int() has a limit and floats end
        return int(text)
    return float(text)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False
