from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import sys
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amenable.data.reading import containers, json_records, table_records
from amenable.data.reading.read_log import MAX_EXAMPLES, clipped, reason_of, shown
from amenable.data.reading.records import DroppingLog, ReadLog, Row, iter_records
from amenable.data.reading.sources import Source, find_sources
from amenable.errors import DataError

Write = Callable[..., Source]
GOOD = b'{"a": 1}\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(data: bytes, name: str = "r.jsonl") -> Source:
        path = tmp_path / name
        path.write_bytes(data)
        return Source(str(path), "r")

    return write_file


def values(source: Source) -> list[Any]:
    return [row.values for row in iter_records(source, ReadLog())]


def lines(source: Source, log: ReadLog | None = None) -> list[tuple[int, Any]]:
    return [(row.line, row.values) for row in iter_records(source, log or ReadLog())]


def faults(source: Source) -> tuple[list[tuple[int, Any]], list[str]]:
    """What a dropping log keeps, and the messages without the file; the strict log agrees."""
    log = DroppingLog()
    kept = lines(source, log)
    with pytest.raises(DataError) as caught:
        lines(source)
    assert str(caught.value) == log.examples[0]
    return kept, [said.removeprefix(f"{source.name}:") for said in log.examples]


def broken_off(source: Source) -> tuple[list[tuple[int, Any]], str]:
    """What comes before a break, which no log drops, and the message; the check's log is told."""
    going_on = Collecting()
    kept = lines(source, going_on)
    for log in (ReadLog(), DroppingLog()):
        before, error = until_error(source, log)
        assert before == kept
        assert going_on.said == [error.reason]
    return kept, str(error).removeprefix(f"{source.name}:")


def until_error(source: Source, log: ReadLog) -> tuple[list[tuple[int, Any]], DataError]:
    """The records before the error that ends the reading, and the error."""
    kept: list[tuple[int, Any]] = []
    try:
        kept.extend((row.line, row.values) for row in iter_records(source, log))
    except DataError as error:
        return kept, error
    pytest.fail("the reading was not ended")


def refusal(source: Source) -> str:
    """What is said of a whole file, which no log drops."""
    for log in (ReadLog(), DroppingLog()):
        with pytest.raises(DataError) as caught:
            lines(source, log)
        assert caught.value.line is None
    return str(caught.value).removeprefix(f"{source.name}: ")


# JSON Lines


def test_a_row_knows_where_it_stands(write: Write) -> None:
    source = write(GOOD + b"\n" + b'{"b": [1.5, null]}')
    log = ReadLog()
    first, second = iter_records(source, log)
    assert (first.values, first.path, first.line) == ({"a": 1}, source.name, 1)
    assert (second.line, second.label, second.textual) == (3, "r", False)
    assert second.log is log
    assert log.records == 2
    assert log.coerced == {"blank line skipped": 1}


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_counted(write: Write) -> None:
    log = ReadLog()
    data = b"\xef\xbb\xbf" + GOOD + b"\n \t\r\n" + GOOD.replace(b"\n", b"\r\n") + b"\n"
    assert lines(write(data), log) == [(1, {"a": 1}), (4, {"a": 1})]
    assert log.coerced == {"byte order mark skipped": 1, "blank line skipped": 3}


def test_a_key_that_stands_twice_has_its_last_value(write: Write) -> None:
    assert values(write(b'{"a": 1, "a": 2}')) == [{"a": 2}]


NESTED = b'{"a":' * 101 + b"1" + b"}" * 101
BROKEN = [
    (b'{"a": \xe9}', "byte 7 is not UTF-8 (0xe9); save it as UTF-8"),
    (b'{"a": NaN}', "is not valid JSON (JSON has no NaN; leave the key out or write null): "),
    (b'{"a": [-Infinity]}', "is not valid JSON (JSON has no -Infinity; leave the key out or "),
    (b'{"a": 1e999}', 'is not valid JSON (Number out of range): {"a": 1e999}; write one whole'),
    (rb'{"a": "\ud800"}', r"is not valid JSON (half a surrogate pair such as \ud800 is no char"),
    (rb'{"a": "\udc00 x"}', r"is not valid JSON (half a surrogate pair such as \ud800 is no ch"),
    (rb'{"\ud800": 1}', r"is not valid JSON (half a surrogate pair such as \ud800 is no charac"),
    (b"{" * 100_000, "is not valid JSON ("),
    (b'{"a":' * 100_000, "is not valid JSON (it is nested more than 100 deep): "),
    (b'{"a":' + b"[" * 100_000, "is not valid JSON (it is nested more than 100 deep): "),
    (NESTED, "is not valid JSON (it is nested more than 100 deep): "),
    (b'{"a": "b', 'is not valid JSON (it ends too early): {"a": "b; write one whole JSON object '),
    (b'{"a": 1,}', 'is not valid JSON (trailing comma in object at byte 9): {"a": 1,}; write on'),
    (b'{"a": 1} {}', "is not valid JSON (trailing characters at byte 11): "),
    (b'{"a": "\x00"}', "is not valid JSON (it has NUL bytes, as UTF-16 has; save it as UTF-8): "),
    (b"{'a': 1}", "is not valid JSON (object keys must be strings at byte 2): {'a': 1}; write "),
    (b"\x1b[31mred", r"is not valid JSON (invalid character at byte 1): \x1b[31mred; write one"),
    (b"[1, 2]", "found [1,2] (a list); expected a JSON object in braces"),
    (b"3", "found 3 (a number); expected a JSON object in braces"),
    (b'"x"', 'found "x" (a text); expected a JSON object in braces'),
    (b"null", "found null (nothing); expected a JSON object in braces"),
    (b"true", "found true (a truth value); expected a JSON object in braces"),
]


@pytest.mark.parametrize(("raw", "message"), BROKEN)
def test_a_faulty_line_is_told_and_reading_goes_on(write: Write, raw: bytes, message: str) -> None:
    kept, (said,) = faults(write(GOOD + raw + b"\n" + GOOD))
    assert kept == [(1, {"a": 1}), (3, {"a": 1})]
    assert said.startswith(f"2: {message}")
    assert len(said) < 250


def test_a_hundred_levels_are_read(write: Write) -> None:
    (row,) = values(write(NESTED[5:-1]))
    assert json.dumps(row) == NESTED[5:-1].decode().replace(":", ": ")


def test_a_last_line_that_is_cut_off_is_told_as_such(write: Write) -> None:
    for end in (b'{"a": "x', b'{"a": "\xe2\x82', b'{"a'):
        kept, (said,) = faults(write(GOOD + end))
        assert kept == [(1, {"a": 1})]
        assert said.startswith(
            "2: is not valid JSON (the file ends in the middle of it, as a copy that was broken "
            'off does): {"a'
        )
    assert lines(write(GOOD + GOOD.strip())) == [(1, {"a": 1}), (2, {"a": 1})]


def test_the_log_is_given_the_raw_line(write: Write) -> None:
    class Keeping(DroppingLog):
        def fault(self, error: DataError, raw: object = None) -> None:
            super().fault(error, raw)
            kept.append((error.line, raw))

    kept: list[Any] = []
    list(iter_records(write(b'{"a"\n{"a": 1}\n[1]'), Keeping()))
    assert kept == [(1, b'{"a"'), (3, b"[1]")]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of more than 50 bytes are too long, and blocks have 8."""
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 50)
    monkeypatch.setattr(containers, "BLOCK_BYTES", 8)
    monkeypatch.setattr(containers, "HEAD_BYTES", 8)


TOO_LONG = "has more than 8 MiB and was not read; a row that long is a mistake: are "


@pytest.mark.usefixtures("short")
def test_a_line_that_is_too_long_is_told_and_reading_goes_on(write: Write) -> None:
    long = b'{"a": "' + b"x" * 100 + b'"}\n'
    edge = b'{"a": "' + b"x" * 41 + b'"}\n'
    assert len(edge) == 51
    kept, said = faults(write(GOOD + long + edge + long + GOOD + long.strip()))
    assert [line for line, _ in kept] == [1, 3, 5]
    assert said == [f"{n}: the line {TOO_LONG}line ends missing?" for n in (2, 4, 6)]
    kept, said = faults(write(b"[" + long.strip() + b",\n" + edge + b"," + long + b"]", "r.json"))
    assert [line for line, _ in kept] == [2]
    assert said == [f"{n}: the element {TOO_LONG}quotes or brackets missing?" for n in (1, 3)]


def test_long_lines_of_one_block_are_told_too(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 10)
    kept, said = faults(write(GOOD + b'{"a": "xxxx"}\n' + GOOD))
    assert kept == [(1, {"a": 1}), (3, {"a": 1})]
    assert said == [f"2: the line {TOO_LONG}line ends missing?"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_a_line_without_end_is_never_held_whole(write: Write, name: str) -> None:
    begin = {"r.jsonl": b'{"a": "', "r.json": b'[{"a": "', "r.csv": b'a\n"'}[name]
    source = write(begin + b"x" * 60_000_000, name)
    log = Collecting()
    tracemalloc.start()
    try:
        assert lines(source, log) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert log.said
    assert peak < 45 * 2**20


# JSON arrays


def test_an_array_gives_the_records_and_lines_of_its_elements(write: Write) -> None:
    data = b' \n[{"a": [1, "]}"]},\n\n {"b": {"c": {"d": {"e": {"f": "\\"}"}}}}}, {}\n]\n\n'
    expected = [
        (2, {"a": [1, "]}"]}),
        (4, {"b": {"c": {"d": {"e": {"f": '"}'}}}}}),
        (4, {}),
    ]
    assert lines(write(data, "r.json")) == expected
    assert lines(write(data, "r.jsonl")) == expected  # by content, not by name
    assert lines(write(b"\xef\xbb\xbf" + data, "r.txt")) == expected
    assert lines(write(json.dumps([{"a": "x\n"}] * 3, indent=2).encode())) == [
        (line, {"a": "x\n"}) for line in (2, 5, 8)
    ]


ARRAYS = [
    (b"[1, {}]", [{}], "1: found 1 (a number); expected a JSON object in braces"),
    (b'["]", {}]', [{}], '1: found "]" (a text); expected a JSON object in braces'),
    (b"[[{}], {}]", [{}], "1: found [{}] (a list); expected a JSON object in braces"),
    (b"[{},\n]", [{}], "2: is not valid JSON (there is a comma too many); remove it"),
    (b"[{},,{}]", [{}, {}], "1: is not valid JSON (there is a comma too many); remove it"),
    (b"[,{}]", [{}], "1: is not valid JSON (there is a comma too many); remove it"),
    (
        b"[{}\n{}]",
        [{}, {}],
        "2: is not valid JSON (a comma is missing here); write whole JSON objects with commas "
        "between them",
    ),
    (b'[{"a": NaN}, {}]', [{}], "1: is not valid JSON (JSON has no NaN; leave the key out or wri"),
    (b'[{"a": \xe9}, {}]', [{}], "1: byte 7 is not UTF-8 (0xe9); save it as UTF-8"),
    (b'[{"a": [}, {}]', [{}], "1: is not valid JSON (invalid character at byte 8): {"),
    (b"[}]", [], "1: is not valid JSON (invalid character at byte 1): }; write whole JSON object"),
    (b"[" + NESTED + b",{}]", [{}], "1: is not valid JSON (it is nested more than 100 deep): "),
]


@pytest.mark.parametrize(("data", "kept", "message"), ARRAYS)
def test_a_fault_of_an_array_is_told_and_reading_goes_on(
    write: Write, data: bytes, kept: list[Any], message: str
) -> None:
    rows, (said,) = faults(write(data, "r.json"))
    assert [row for _, row in rows] == kept
    assert said.startswith(message)


BROKEN_OFF = [
    (
        b"[{},\n{}\n",
        [{}, {}],
        "3: is not valid JSON (the array is not closed: the file ends behind element 2); copy the "
        "file again, or look for a missing quote or bracket",
    ),
    (
        b'[{},\n{"a": "x',
        [{}],
        '2: is not valid JSON (the array is not closed: the file ends within element 2: {"a": "x); '
        "copy the file again, or look for a missing quote or bracket",
    ),
    (b"[", [], "1: is not valid JSON (the array is not closed: the file ends at once); copy the "),
    (b"[1", [], "1: is not valid JSON (the array is not closed: the file ends within element 1: 1"),
    (b"[" * 100_000, [], "1: is not valid JSON (the array is not closed: the file ends within el"),
    (
        b'[{}]\n x {"a": 1}',
        [{}],
        '2: there is text behind the end of the array (x {"a": 1}), which is not read; give each '
        "file one array, or write one JSON object a line without brackets",
    ),
]


@pytest.mark.parametrize(("data", "kept", "message"), BROKEN_OFF)
def test_an_array_without_its_end_ends_the_reading(
    write: Write, data: bytes, kept: list[Any], message: str
) -> None:
    rows, said = broken_off(write(data, "r.json"))
    assert [row for _, row in rows] == kept
    assert said.startswith(message)


def test_a_missing_quote_does_not_drop_the_rest_of_an_array(write: Write) -> None:
    data = json.dumps([{"a": "x", "b": n} for n in range(100)], indent=0).replace('"x"', '"x', 1)
    rows, said = broken_off(write(data.encode(), "r.json"))
    assert rows == []
    assert "the array is not closed" in said


def test_a_list_in_the_first_line_does_not_make_an_array(write: Write) -> None:
    kept, said = faults(write(b'[{"a": 1}]\n{"a": 2}\n'))
    assert kept == [(2, {"a": 2})]
    assert said == ['1: found [{"a":1}] (a list); expected a JSON object in braces']


# Whole files


def test_an_object_over_several_lines_is_no_rows(write: Write) -> None:
    message = (
        "is one JSON object over several lines; expected rows: write one whole JSON object a line, "
        "or all of them with commas between in one pair of [ ]"
    )
    assert refusal(write(json.dumps({"a": 1, "b": [2]}, indent=2).encode())) == message
    assert refusal(write(b'{"rows": [\n{"a": 1},\n{"a": 2}\n]}', "r.json")) == message
    kept, _ = faults(write(b'{"a": [\n{"a": 1}\n'))  # a first line that is cut off is but a line
    assert kept == [(2, {"a": 1})]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b" [\n]\n"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.txt", "r.csv"])
def test_a_file_without_rows_is_told(write: Write, data: bytes, name: str) -> None:
    message = "the file has no rows; write one JSON object a line or leave it out"
    log = DroppingLog()
    source = write(data, name)
    assert lines(source, log) == []
    assert log.examples == [f"{source.name}: {message}"]
    with pytest.raises(DataError, match=message):
        lines(source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "is UTF-16, by its byte order mark; save it as UTF-8"),
        (b"\xfe\xff\0{", "is UTF-16, by its byte order mark; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-32"), "is UTF-32, by its byte order mark; save it as UTF-8"),
        (bz2.compress(GOOD), "is compressed with bzip2, which is not read; decompress it, or use"),
        (lzma.compress(GOOD), "is compressed with xz, which is not read; decompress it, or use g"),
        (b"\x28\xb5\x2f\xfdxx", "is compressed with zstd, which is not read; decompress it, or u"),
        (b"PK\x03\x04xx", "is a zip archive, which is not read; decompress it, or use gzip"),
        (gzip.compress(gzip.compress(GOOD)), "is compressed with gzip twice, which is not read"),
    ],
)
def test_what_is_no_utf8_text_is_told_by_its_name(write: Write, data: bytes, message: str) -> None:
    assert refusal(write(data)).startswith(message)


def test_an_unknown_kind_of_file_is_told(write: Write) -> None:
    assert refusal(write(b"name: x\n", "r.yaml")) == (
        "cannot read this kind of file (it begins with 'name: x\\n'); expected JSON Lines, a JSON "
        "array, Parquet, or a name ending in .csv or .tsv"
    )
    assert values(write(GOOD, "r.txt")) == [{"a": 1}]


def test_a_damaged_gzip_ends_the_file_behind_the_rows_that_came(write: Write) -> None:
    data = b"".join(b'{"a": "%d %s"}\n' % (n, b"x" * (n % 7)) for n in range(30_000))
    packed = gzip.compress(data)
    torn = write(packed[:-8], "r.jsonl.gz")
    kept, said = broken_off(torn)
    assert len(kept) == 30_000
    assert said == (
        "30001: is not a whole gzip file (Compressed file ended before the end-of-stream marker "
        "was reached); copy it again, or take .gz off its name"
    )
    half = len(packed) // 2
    broken = write(packed[:half] + b"\xff" * 99 + packed[half + 99 :], "r.jsonl.gz")
    kept, error = until_error(broken, DroppingLog())
    assert 1000 < len(kept) < 30_000
    assert error.reason.startswith("is not a whole gzip file")
    kept, said = broken_off(write(GOOD, "r.jsonl.gz"))
    assert said == (
        "1: is not a whole gzip file (Not a gzipped file (b'{\"')); copy it again, or take .gz off "
        "its name"
    )
    kept, said = broken_off(write(gzip.compress(b"[{},{}," * 9)[:-9], "r.json.gz"))
    assert "is not a whole gzip file" in said
    assert values(write(gzip.compress(GOOD), "r.dat")) == [{"a": 1}]


def test_a_failing_disk_is_told_with_its_line(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(GOOD)
    monkeypatch.setattr(Path, "open", lambda path, mode: _Peeking(GOOD * 2))
    kept, said = broken_off(source)
    assert kept == [(1, {"a": 1}), (2, {"a": 1})]
    assert said == "3: cannot be read (Input/output error); check the disk"


def test_a_disk_that_fails_at_once_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def peek(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

        read1 = peek  # type: ignore[assignment]

    source = write(GOOD)
    monkeypatch.setattr(Path, "open", lambda path, mode: Failing())
    kept, said = broken_off(source)
    assert kept == []
    assert said == "1: cannot be read (Input/output error); check the disk"


class _Peeking(io.BytesIO):
    """A file whose second read fails."""

    def peek(self, size: int) -> bytes:
        return self.getvalue()[:size]

    def read1(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError(5, "Input/output error")
        return super().read1(size)


class Collecting(ReadLog):
    """A log that goes on whatever happens, as that of the check does."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def fault(self, error: DataError, raw: object = None) -> None:
        self.said.append(error.reason)


def test_a_log_that_goes_on_is_told_once_of_a_whole_file(
    write: Write, parquet: Callable[[pa.Table], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(source: Source) -> str:
        log = Collecting()
        assert lines(source, log) == []
        (only,) = log.said
        return only

    assert "there is no such file" in said(Source("none.jsonl", "r"))
    assert "is UTF-16" in said(write(b"\xff\xfe"))
    assert "cannot read this kind of file" in said(write(b"x", "r.txt"))
    assert "is Parquet within gzip" in said(write(gzip.compress(b"PAR1")))
    assert "is not a whole Parquet file" in said(write(b"PAR1"))
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert "two columns are named 'a'" in said(parquet(table))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "needs the package pyarrow" in said(write(b"PAR1"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "amenable[hub]"' in said(Source("hub:nobody/nothing", "n"))


def test_the_file_is_closed_when_reading_is_given_up(write: Write) -> None:
    rows = iter_records(write(GOOD * 3), ReadLog())
    next(rows)
    rows.close()  # type: ignore[attr-defined]  # an open file would be a warning, and so an error


# CSV


def test_csv_has_texts_and_line_numbers(write: Write) -> None:
    log = ReadLog()
    data = b'\xef\xbb\xbfa,b\r\n1,"x\r\n""y"""\r\n\r\n,z\n"p, q",\xc3\xa9'
    rows = list(iter_records(write(data, "r.csv"), log))
    assert [(row.line, row.values) for row in rows] == [
        (2, {"a": "1", "b": 'x\r\n"y"'}),
        (5, {"a": None, "b": "z"}),
        (6, {"a": "p, q", "b": "é"}),
    ]
    assert all(row.textual for row in rows)
    assert log.coerced == {
        "byte order mark skipped": 1,
        "blank line skipped": 1,
        "empty cell read as absent (CSV)": 1,
    }
    assert values(write(b"a\tb\n1\tx, y\n", "r.tsv")) == [{"a": "1", "b": "x, y"}]


def test_csv_cells_may_be_long(write: Write) -> None:
    assert values(write(b"a\n" + b"x" * 500_000 + b"\n", "r.csv")) == [{"a": "x" * 500_000}]


CSV_FAULTS = [
    (
        b"1\n2,x\n",
        "2: has too few cells (1; the first line names 2 columns); correct it, or put quotes round "
        "a text with commas",
    ),
    (b"1,2,3\n2,x\n", "2: has too many cells (3; the first line names 2 columns); correct it, or"),
    (b"\xe9,1\n2,x\n", "2: byte 1 is not UTF-8 (0xe9); save it as UTF-8"),
    (
        b"2\r3,x\n2,x\n",
        "2: is not valid CSV (a carriage return without a line feed); save the file with line feeds"
        " at the ends of lines",
    ),
]


@pytest.mark.parametrize(("data", "message"), CSV_FAULTS)
def test_a_fault_of_csv_is_told_and_reading_goes_on(
    write: Write, data: bytes, message: str
) -> None:
    kept, (said,) = faults(write(b"a,b\n" + data, "r.csv"))
    assert [row for _, row in kept] == [{"a": "2", "b": "x"}]
    assert said.startswith(message)


def test_a_faulty_quote_ends_a_csv_file_and_makes_no_rows(write: Write) -> None:
    kept, said = broken_off(write(b'a,b\n2,x\n"x"y,1\n2,3\n', "r.csv"))
    assert kept == [(2, {"a": "2", "b": "x"})]
    assert said == (
        "3: is not valid CSV (',' expected after '\"'); where this record ends is doubtful, and "
        "nothing behind it is read: put quotes round the text and double those within it"
    )
    data = b'a,b,c,d\n"He said "hi" to me\nWhich is best?,A,B,0\nreally",x,y,1\n'
    assert broken_off(write(data, "r.csv"))[0] == []
    kept, said = broken_off(write(b'a,b\n2,x\n"y,1\n2,3\n', "r.csv"))
    assert kept == [(2, {"a": "2", "b": "x"})]
    assert said == (
        "3: is not valid CSV (a quote that is opened here is never closed); close it, or write two "
        "quotes for one within a text"
    )


@pytest.mark.usefixtures("short")
def test_a_csv_record_that_is_too_long_ends_the_file(write: Write) -> None:
    kept, said = broken_off(write(b'a,b\n2,x\n"' + b"xxxxxxxxx\n" * 9 + b"2,x\n", "r.csv"))
    assert kept == [(2, {"a": "2", "b": "x"})]
    assert said == f"3: the record {TOO_LONG}quotes missing?"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,b,a", "1: two columns are named 'a'; rename one"),
        (b"a, b,b ", "1: two columns are named 'b'; rename one"),
        (b"a,\xe9", "1: byte 3 is not UTF-8 (0xe9); save it as UTF-8"),
        (b'"a"b,c', "1: is not valid CSV (',' expected after '\"'); where this record ends is"),
    ],
)
def test_a_faulty_header_ends_the_file(write: Write, header: bytes, message: str) -> None:
    kept, said = broken_off(write(header + b"\n1,2\n1,2,3\n", "r.csv"))
    assert kept == []
    assert said.startswith(message)


def test_blanks_round_the_names_of_columns_are_removed(write: Write) -> None:
    log = ReadLog()
    assert lines(write(b"a, b ,c d\n1, 2,3\n", "r.csv"), log) == [
        (2, {"a": "1", "b": " 2", "c d": "3"})
    ]
    assert log.coerced == {"blank round a column's name removed (CSV)": 1}


# Parquet


@pytest.fixture
def parquet(write: Write) -> Callable[[pa.Table], Source]:
    def write_table(table: pa.Table) -> Source:
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=2)
        return write(file.getvalue(), "r.parquet")

    return write_table


def test_parquet_gives_plain_json_types(parquet: Callable[[pa.Table], Source]) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9)
    table = pa.table(
        {
            "text": ["é", None, "x"],
            "list": [[{"role": "user", "n": 1}], [], None],
            "float": pa.array([1.5, float("nan"), None]),
            "when": [when, None, when],
            "nano": pa.array([1, 2, None], pa.timestamp("ns")),
            "day": [when.date(), None, None],
            "bytes": [b"x", None, b""],
            "decimal": [decimal.Decimal("1.50"), decimal.Decimal("2.00"), None],
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int8())),
            "word": pa.array(["a", "b", "a"]).dictionary_encode(),
            "span": [datetime.timedelta(minutes=1), None, None],
        }
    )
    log = ReadLog()
    rows = lines(parquet(table), log)
    assert [line for line, _ in rows] == [1, 2, 3]
    first = rows[0][1]
    nano = first.pop("nano")
    assert nano == "1970-01-01T00:00:00"  # microseconds are all that is kept
    assert first == {
        "text": "é",
        "list": [{"role": "user", "n": 1}],
        "float": 1.5,
        "when": "2024-05-06T07:08:09",
        "day": "2024-05-06",
        "bytes": "x",
        "decimal": 1.5,
        "map": [["k", 1]],
        "word": "a",
        "span": 60.0,
    }
    assert rows[1][1]["float"] is None
    assert log.coerced == {
        "NaN read as null (Parquet, hub)": 1,
        "bytes read as a text (Parquet, hub)": 2,
        "date or time read as a text (Parquet, hub)": 5,
        "decimal number read as a number (Parquet, hub)": 2,
        "duration read as its seconds (Parquet, hub)": 1,
    }
    for _, row in rows:
        json.dumps(row, allow_nan=False)


def test_parquet_is_recognised_by_its_content(
    parquet: Callable[[pa.Table], Source], tmp_path: Path
) -> None:
    parquet(pa.table({"a": [1]}))
    named = (tmp_path / "r.parquet").rename(tmp_path / "r.jsonl")
    assert values(find_sources([named])[0]) == [{"a": 1}]
    packed = tmp_path / "r.parquet.gz"
    packed.write_bytes(gzip.compress(named.read_bytes()))
    assert refusal(find_sources([packed])[0]) == (
        "is Parquet within gzip; decompress it, Parquet is compressed itself"
    )


def test_a_parquet_cell_without_json_form_is_told_and_reading_goes_on(
    parquet: Callable[[pa.Table], Source],
) -> None:
    broken = pa.array([b"x", b"\xff", b"y"]).cast(pa.binary()).view(pa.string())
    kept, said = faults(parquet(pa.table({"a": broken})))
    assert kept == [(1, {"a": "x"}), (3, {"a": "y"})]
    assert said[0].startswith("2: field 'a': cannot be read ('utf-8' codec can't decode byte 0xff")
    table = pa.table({"n": [1, 2, 3], "b": [b"x", b"\xff", None], "f": [1.0, None, float("inf")]})
    kept, said = faults(parquet(table))
    assert [line for line, _ in kept] == [1]
    assert said == [
        "2: field 'b': found bytes that are no UTF-8 text; correct it or leave the column out",
        "3: field 'f': found inf; JSON has no such number; correct it or leave the column out",
    ]


def test_a_damaged_parquet_file_is_told(parquet: Callable[[pa.Table], Source]) -> None:
    source = parquet(pa.table({"a": ["x" * 99] * 9}))
    path = Path(source.name)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert refusal(source).startswith("is not a whole Parquet file (")
    assert refusal(source).endswith("); copy or write it again")
    path.write_bytes(b"")
    assert "is not a whole Parquet file (" in refusal(source)
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    _, said = broken_off(source)
    assert said.startswith("1: is not a whole Parquet file (")


def test_a_parquet_file_without_rows_or_with_a_name_twice_is_told(
    parquet: Callable[[pa.Table], Source],
) -> None:
    log = DroppingLog()
    assert lines(parquet(pa.table({"a": pa.array([], pa.string())})), log) == []
    assert log.dropped == {"the file has no rows": 1}
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert refusal(parquet(table)) == "two columns are named 'a'; rename one"


def test_a_missing_pyarrow_is_told(
    parquet: Callable[[pa.Table], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(pa.table({"a": [1]}))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refusal(source) == (
        "needs the package pyarrow, which is not installed; pip install pyarrow"
    )


def test_rows_that_share_a_long_text_are_read_in_bounded_memory(
    parquet: Callable[[pa.Table], Source], tmp_path: Path
) -> None:
    path = tmp_path / "shared.parquet"
    pq.write_table(pa.table({"a": ["x" * 500_000] * 2000, "n": range(2000)}), path)
    assert path.stat().st_size < 100_000
    before, count = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for row in iter_records(Source(str(path), "r"), ReadLog()):
            count += len(row.values["a"])
            assert pa.total_allocated_bytes() - before < 100 * 2**20
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 2000 * 500_000
    assert peak < 30 * 2**20


def test_a_parquet_row_that_is_too_long_is_told_and_reading_goes_on(
    parquet: Callable[[pa.Table], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 100)
    texts = [[{"content": text}] for text in ("x", "y" * 101, "z", "z" * 40, "z" * 40)]
    kept, said = faults(parquet(pa.table({"a": texts})))
    assert [line for line, _ in kept] == [1, 3, 4, 5]
    assert said == [f"2: the row {TOO_LONG}several rows joined in it?"]


def test_foreign_values_become_plain_json() -> None:
    log = ReadLog()

    def plain(value: object) -> Any:
        made = table_records.plain(value, log.coerce)
        json.dumps(made, allow_nan=False)
        return made

    given = {"a": np.array([[1, 2], [3, 4]]), "b": np.float32(0.5), 3: (np.True_, np.int64(7))}
    made = plain(given)
    assert made == {"a": [[1, 2], [3, 4]], "b": 0.5, "3": [True, 7]}
    assert [type(item) for item in made["3"]] == [bool, int]
    assert type(plain(np.float64(1))) is float
    assert type(plain(np.str_("x"))) is str
    assert plain(np.datetime64("2024-05-06")) == "2024-05-06"
    assert plain(uuid.UUID(int=1)) == "00000000-0000-0000-0000-000000000001"
    assert plain(np.float64("nan")) is None
    for value, message in [
        ("\ud800", "has half a surrogate pair, which is no character"),
        ({"\ud800": 1}, "has half a surrogate pair, which is no character"),
        (object(), "found a object, which JSON cannot hold"),
        (float("inf"), "found inf; JSON has no such number"),
    ]:
        with pytest.raises(table_records._NotJson, match=message):
            plain(value)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(table_records._NotJson, match="is nested more than 100 deep"):
        plain(deep)


# Rows


def row(values: dict[str, Any], *, textual: bool = False) -> Row:
    return Row(values, "r.jsonl", 7, "r", ReadLog(), textual)


def said_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value).removeprefix("r.jsonl:7: ")


def test_text_is_a_text_or_a_clear_refusal() -> None:
    assert row({"a": " x "}).text("a") == " x "
    assert row({"a": ""}).text("a", may_be_empty=True) == ""
    assert said_of(lambda: row({"b": 1}).text("a")) == (
        "field 'a': is missing; the row has 'b'; add 'a' or rename its column"
    )
    assert said_of(lambda: row({}).text("a")).startswith(
        "field 'a': is missing; the row has no keys; add"
    )
    assert said_of(lambda: row({"a": 3}).text("a")) == (
        "field 'a': found 3 (a number); expected a text in quotes"
    )
    assert said_of(lambda: row({"a": None}).text("a")) == (
        "field 'a': found null (nothing); expected a text in quotes"
    )
    empty = "field 'a': is empty; write its text or remove the row"
    assert said_of(lambda: row({"a": " \n"}).text("a")) == empty
    assert said_of(lambda: row({"a": None}, textual=True).text("a")) == empty
    assert row({"a": None}, textual=True).text("a", may_be_empty=True) == ""
    half = "field 'a': has half a surrogate pair, which is no character; remove it from the text"
    assert said_of(lambda: row({"a": "x\ud800"}).text("a")) == half
    assert said_of(lambda: row({"a": "x\ud800"}).name("a")) == half


def test_a_name_is_a_text_or_a_whole_number() -> None:
    seven = row({"a": 7, "b": "x", "c": None})
    assert (seven.name("a"), seven.name("b"), seven.name("c"), seven.name("d")) == (
        *("7", "x", None, None),
    )
    assert seven.log.coerced == {
        "whole number read as a name (id, group, annotator)": 1,
        "null read as absent": 1,
    }
    for value, found in [(True, "true (a truth value)"), ("", '"" (a text)'), (1.0, "1.0 (a num")]:
        said = said_of(lambda value=value: row({"a": value}).name("a"))  # type: ignore[misc]
        assert said.startswith(f"field 'a': found {found}")
    assert row({"a": "007"}, textual=True).name("a") == "007"
    assert row({"a": None}, textual=True).name("a") is None


def test_a_number_is_finite_and_in_range() -> None:
    numbers = row({"a": 0, "b": 2, "c": None})
    assert numbers.number("a", above_zero=False) == 0.0
    assert numbers.number("b", above_zero=True) == 2.0
    assert numbers.number("c", above_zero=True) is None
    assert numbers.number("d", above_zero=True) is None
    assert numbers.log.coerced == {"null read as absent": 1}
    assert said_of(lambda: numbers.number("a", above_zero=True)) == (
        "field 'a': found 0 (a number); expected a number above 0; correct or remove it"
    )
    for value, found in [
        (-1, "-1 (a number)"),
        (True, "true (a truth value)"),
        ("1", '"1" (a text)'),
        (float("nan"), "nan (a number)"),
        (10**400, "1000000"),
    ]:
        said = said_of(lambda v=value: row({"a": v}).number("a", above_zero=False))  # type: ignore[misc]
        assert said.startswith(f"field 'a': found {found}")
        assert "expected a number of 0 or more; correct or remove it" in said


def test_a_text_of_csv_may_be_read_as_a_number() -> None:
    cells = row({"a": "0.5", "b": " 1", "c": "tie", "d": None, "e": "1e3"}, textual=True)
    assert cells.number("a", above_zero=True) == 0.5
    assert cells.value("b") == 1
    assert type(cells.value("b")) is int
    assert cells.value("c") == "tie"
    assert cells.value("d") is None
    assert cells.number("d", above_zero=True) is None
    assert cells.number("e", above_zero=True) == 1000.0
    assert cells.log.coerced == {"text read as a number (CSV)": 4}
    for text in ("1_0", "nan", "inf", "٣", "0x1", "", "1 2", "--1"):
        strange = row({"a": text}, textual=True)
        assert strange.value("a") == text
        assert "found" in said_of(lambda: strange.number("a", above_zero=True))  # noqa: B023
    assert row({"a": "9" * 5000}, textual=True).value("a") == float("inf")
    assert row({"a": "1"}).value("a") == "1"


# Logs


def test_the_plain_log_raises_and_counts() -> None:
    log = ReadLog()
    error = DataError("bad", path="r", line=1)
    with pytest.raises(DataError) as caught:
        log.fault(error, b"raw")
    assert caught.value is error
    log.coerce("x")
    log.drop("no answer")
    assert (log.coerced, log.dropped, log.formats) == ({"x": 1}, {"no answer": 1}, {})


@pytest.mark.parametrize(
    ("field", "message", "reason"),
    [
        ("choice", "is missing; the row has 'a'; add", "field 'choice' is missing"),
        ("choice", 'found "0; (1)" (a text); expected 0', "field 'choice': found a text"),
        ("choice", "found 2 (a number); expected 0 or 1", "field 'choice': found a number"),
        ("messages[3].role", "found null (nothing); x", "field 'messages[].role': found nothing"),
        ("id", "'x; y' was used at f.jsonl:3; give", "field 'id': '…' was used at f.jsonl"),
        (
            "strength",
            "3 contradicts choice 1 (a number): 1 to",
            "field 'strength': N contradicts c",
        ),
        (None, "byte 17 is not UTF-8 (0xe9); save", "byte N is not UTF-8"),
        (None, "is not valid JSON (invalid (byte 3)): {'a; write", "is not valid JSON"),
        (None, "has too many cells (3; the first", "has too many cells"),
        (None, "found [1] (a list); expected", "found a list"),
    ],
)
def test_a_reason_is_what_faults_have_in_common(
    field: str | None, message: str, reason: str
) -> None:
    error = DataError(message, path="a; b.jsonl", line=3, field=field)
    assert reason_of(error).startswith(reason)
    assert len(reason_of(error)) < 60


def test_the_dropping_log_groups_and_keeps_some_examples() -> None:
    log = DroppingLog()
    for line in range(1, 31):
        log.fault(DataError(f"found {line} (a number); x", path="r", line=line, field="choice"), {})
    assert log.dropped == {"field 'choice': found a number": 30}
    assert len(log.examples) == MAX_EXAMPLES == 20
    assert log.examples[0] == "r:1: field 'choice': found 1 (a number); x"
    with pytest.raises(DataError, match="is a folder"):
        log.fault(DataError("is a folder; name", path="r"))
    log.fault(DataError("the file has no rows; x", path="r"), b"")
    assert log.dropped["the file has no rows"] == 1


def test_values_are_shown_short_and_fit_for_a_terminal() -> None:
    assert shown({"a": [1]}) == '{"a":[1]} (an object)'
    assert shown("x" * 99) == '"' + "x" * 58 + "… (a text)"
    assert shown("\ud800") == r"'\ud800' (a text)"
    assert shown(float("inf")) == "inf (a number)"
    assert clipped("a\x1b[31m\x00\u0085é") == r"a\x1b[31m\x00\x85é"
