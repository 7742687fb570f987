"""CSV, Parquet and hub data sets to objects of plain JSON types."""

from __future__ import annotations

import csv
import datetime
import decimal
import importlib
import io
import math
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from amenable.data.reading import json_records
from amenable.data.reading.json_records import (
    MAX_NESTING,
    TOO_LONG,
    Coerce,
    Fault,
    Json,
    Numbered,
    Unreadable,
    bounded_lines,
    is_unicode,
)
from amenable.data.reading.read_log import clipped
from amenable.data.reading.sources import hub_name
from amenable.errors import DataError
from amenable.masking import without_secrets

MAX_BATCH_ROWS = 64
"""Rows of a Parquet file that are decoded at a time, and no more of them at once to Python's types
than `MAX_RECORD_BYTES` hold. What a row takes is not known before: many rows can share one text,
which is stored once."""


class _TooLong(Exception):
    """A CSV record is longer than `MAX_RECORD_BYTES`."""


class _NotJson(Exception):
    """A value that has no plain JSON form; says why."""


def csv_records(blocks: Iterator[bytes], delimiter: str, fault: Fault, coerce: Coerce) -> Numbered:
    """(line of its beginning, object) for each record; the first record names the columns.

    An empty cell is None: CSV cannot tell an empty text from none. Blanks round a column's name are
    removed.

    Raises:
        Unreadable: the header is faulty, or a quote is, so that where records end is not known.
    """
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, 2 * json_records.MAX_RECORD_BYTES))
    lines = _CsvLines(blocks, fault)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
        except (csv.Error, _TooLong) as error:
            if header is not None and "new-line" in str(error):  # of this line alone
                fault(_STRAY_RETURN, lines.first, lines.taken())
                continue
            raise Unreadable(_why_no_csv(error, lines.is_at_end), lines.first) from None
        if cells is None:
            return
        if not cells:
            coerce("blank line skipped")
        elif lines.faulty:
            message, line = lines.faulty
            if header is None:
                raise Unreadable(message, line)
            fault(message, line, lines.taken())
        elif header is None:
            header = _column_names(cells, coerce)
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise Unreadable(f"two columns are named {twice[0]!r}; rename one", lines.first)
        elif len(cells) != len(header):
            fault(
                f"has too {'few' if len(cells) < len(header) else 'many'} cells ({len(cells)}; the "
                f"first line names {len(header)} columns); correct it, or put quotes round a text "
                "with commas",
                lines.first,
                lines.taken(),
            )
        else:
            if "" in cells:
                coerce("empty cell read as absent (CSV)")
            yield lines.first, {key: cell or None for key, cell in zip(header, cells, strict=True)}


def _column_names(cells: list[str], coerce: Coerce) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name, cell in zip(names, cells, strict=True):
        if name != cell:
            coerce("blank round a column's name removed (CSV)")
    return names


class _CsvLines:
    """Lines of text for the csv module, which asks for as many as a record has."""

    def __init__(self, blocks: Iterator[bytes], fault: Fault) -> None:
        self._lines = (
            (line, raw, is_cut_off)
            for first, lines, is_cut_off in bounded_lines(blocks, fault)
            for line, raw in enumerate(lines, first)
        )
        self._record: list[bytes] = []
        self._held = 0
        self.first = 0
        self.faulty: tuple[str, int] | None = None
        """What is wrong with the record's bytes, and on which line."""
        self.is_at_end = False

    def begin(self) -> None:
        """Forgets the last record."""
        self._record, self._held, self.first, self.faulty = [], 0, 0, None

    def taken(self) -> bytes:
        """The record's lines so far."""
        return b"\n".join(self._record)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        for line, raw, is_last in self._lines:
            self.first = self.first or line
            self._record.append(raw)
            self._held += len(raw) + 1
            if self._held > json_records.MAX_RECORD_BYTES:
                raise _TooLong
            try:
                return raw.decode("utf-8") + ("" if is_last else "\n")
            except UnicodeDecodeError as error:
                told = f"byte {error.start + 1} is not UTF-8 (0x{raw[error.start]:02x})"
                self.faulty = self.faulty or (f"{told}; save it as UTF-8", line)
                return raw.decode("utf-8", "replace") + ("" if is_last else "\n")
        self.is_at_end = True
        raise StopIteration


def _why_no_csv(error: Exception, is_at_end: bool) -> str:
    if isinstance(error, _TooLong):
        return f"the record {TOO_LONG}quotes missing?"
    if is_at_end:
        return (
            "is not valid CSV (a quote that is opened here is never closed); close it, or write "
            "two quotes for one within a text"
        )
    if "new-line" in str(error):
        return _STRAY_RETURN
    return (
        f"is not valid CSV ({error}); where this record ends is doubtful, and nothing behind it is "
        "read: put quotes round the text and double those within it"
    )


_STRAY_RETURN = (
    "is not valid CSV (a carriage return without a line feed); save the file with line feeds at "
    "the ends of lines"
)


def parquet_records(file: io.BufferedIOBase, fault: Fault, coerce: Coerce) -> Numbered:
    """(row number, object) for each row; at most `MAX_BATCH_ROWS` are held at a time.

    Args:
        file: a seekable stream.
        fault: takes message, row, raw record and field.
        coerce: told of what became another type.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        fault("needs the package pyarrow, which is not installed; pip install pyarrow")
        return
    row: int | None = None  # None: not one row could be read
    try:
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        names = table.schema_arrow.names
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            fault(f"two columns are named {twice[0]!r}; rename one")
            return
        row = 0
        for whole in table.iter_batches(batch_size=MAX_BATCH_ROWS, use_threads=False):
            for batch in _small(whole):
                if batch.nbytes > json_records.MAX_RECORD_BYTES:
                    row += 1
                    fault(f"the row {TOO_LONG}several rows joined in it?", row, b"")
                    continue
                columns = [_cells(column) for column in batch.columns]
                for number in range(batch.num_rows):
                    row += 1
                    cells = [column[number] for column in columns]
                    values = _record(zip(names, cells, strict=True), row, fault, coerce)
                    if values is not None:
                        yield row, values
    except DataError:
        raise  # of `fault`
    except Exception as error:  # a damaged file makes pyarrow raise almost anything
        why = f"is not a whole Parquet file ({_one_line(error)}); copy or write it again"
        if row is None:
            fault(why)
        else:
            fault(why, row + 1)


def _small(batch: Any) -> Iterator[Any]:
    """The batch itself, or its rows one by one where it takes more than one row may."""
    if batch.nbytes <= json_records.MAX_RECORD_BYTES:
        yield batch
        return
    for number in range(batch.num_rows):
        yield batch.slice(number, 1)


def _cells(column: Any) -> list[Any]:
    """The column's values; a `_NotJson` in the place of one that has no Python form.

    Times lose what is below a microsecond: Python has no such times without pandas.
    """
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    try:
        return list(column.to_pylist())
    except Exception:  # times beyond Python's, broken UTF-8: find the cells at fault
        return [_cell(value) for value in column]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except Exception as error:  # pyarrow raises what it likes
        return _NotJson(f"cannot be read ({_one_line(error)})")


def hub_records(name: str, fault: Fault, coerce: Coerce) -> Numbered:
    """(row number, object) for each row of `hub:OWNER/NAME[/CONFIG][:SPLIT]`, streamed."""
    hub = hub_name(name)
    row: int | None = None  # None: not one row could be read
    try:
        datasets = importlib.import_module("datasets")
        splits = datasets.load_dataset(hub.dataset, hub.config, streaming=True)
        if hub.split not in splits:
            fault(
                f"the data set has no split {hub.split!r}; it has "
                f"{', '.join(map(repr, splits))}; name one behind a colon"
            )
            return
        row = 0
        for record in splits[hub.split]:
            row += 1
            if (values := _record(record.items(), row, fault, coerce)) is not None:
                yield row, values
    except DataError:
        raise  # of `fault`
    except ImportError as error:
        fault(
            f"a hub data set needs a package that is not installed ({_one_line(error)}); "
            'pip install "amenable[hub]"'
        )
    except Exception as error:  # of any library beneath
        if row is None:
            fault(
                f"the data set cannot be loaded ({_one_line(error)}); check its name and the "
                "network; of a gated one accept its terms and set HF_TOKEN"
            )
        else:
            fault(
                f"reading broke off ({_one_line(error)}); check the data set and the network",
                row + 1,
            )


def _record(
    items: Iterable[tuple[str, Any]], row: int, fault: Fault, coerce: Coerce
) -> Json | None:
    """The row in plain JSON types; None if a value has none, which goes to `fault`."""
    values: Json = {}
    faulty: tuple[str, str] | None = None
    for key, value in items:
        try:
            values[key] = plain(value, coerce)
        except _NotJson as error:
            faulty = faulty or (key, f"{error}; correct it or leave the column out")
            values[key] = repr(value)[:1000]
    if faulty:
        fault(faulty[1], row, values, faulty[0])
        return None
    return values


def plain(value: Any, coerce: Coerce, depth: int = 1) -> Any:
    """The value in JSON's types: None, bool, int, float, str, list, dict with texts as keys.

    Raises:
        _NotJson: it has no such form.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not value.isascii() and not is_unicode(value):
            raise _NotJson("has half a surrogate pair, which is no character")
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _plain_float(float(value), coerce)
    if isinstance(value, dict | list | tuple):
        if depth >= MAX_NESTING:
            raise _NotJson(f"is nested more than {MAX_NESTING} deep")
        if isinstance(value, dict):
            return {
                plain(str(key), coerce): plain(item, coerce, depth + 1)
                for key, item in value.items()
            }
        return [plain(item, coerce, depth + 1) for item in value]
    return _from_other_type(value, coerce, depth)


def _plain_float(value: float, coerce: Coerce) -> float | None:
    if math.isnan(value):  # how pandas writes a missing number
        coerce("NaN read as null (Parquet, hub)")
        return None
    if math.isinf(value):
        raise _NotJson(f"found {value}; JSON has no such number")
    return value


def _from_other_type(value: Any, coerce: Coerce, depth: int) -> Any:
    if isinstance(value, _NotJson):
        raise value
    if isinstance(value, datetime.date | datetime.time):
        coerce("date or time read as a text (Parquet, hub)")
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        coerce("duration read as its seconds (Parquet, hub)")
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        coerce("decimal number read as a number (Parquet, hub)")
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            raise _NotJson("found bytes that are no UTF-8 text") from None
        coerce("bytes read as a text (Parquet, hub)")
        return text
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return plain(value.tolist(), coerce, depth)
    raise _NotJson(f"found a {type(value).__name__}, which JSON cannot hold")


def _one_line(error: Exception) -> str:
    text = without_secrets(str(error)).strip() or type(error).__name__
    return clipped(text.splitlines()[0], 160)
