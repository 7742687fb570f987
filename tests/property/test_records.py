"""Any bytes end in records or in a DataError; neither containers nor blocks matter."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from amenable.data.reading import containers, json_records
from amenable.data.reading.read_log import reason_of
from amenable.data.reading.records import DroppingLog, ReadLog, Row, iter_records
from amenable.data.reading.sources import Source
from amenable.errors import DataError

EXAMPLES = int(os.environ.get("AMENABLE_READING_EXAMPLES", "1000"))
"""How many files each property tries; a long run sets the variable."""

often = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(-1e9, 1e9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=4)

TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"\r\n", b" ", b"\t", b"'", b";"),
    *(b'{"a": 1}', b'{"a": "x"}', b'[{"a": 1}', b'{"a": {"b": [1, {"c": "}"}]}}', b"null", b"1"),
    *(b"NaN", b"-Infinity", b"1e999", b"true", b"\\u00e9", b"\\ud800", b"\\udc00", b"\\n", b"-"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xe9", b"\xe2\x82", b"\x00", b"\x0c", b"\x80"),
    *(b"PAR1", b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"a,b\n", b"1,2\n", b'"x\ny",z\n', b"a\tb"),
    *(b"[" * 200, b"{" * 50, b'{"a":' * 150, b'"' * 3, b"9" * 30),
]
near_json = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=3), max_size=25).map(b"".join)


def _parquet(rows: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


WHOLE = [
    b"".join(b'{"a": "%d", "b": [%d]}\n' % (n, n) for n in range(40)),
    json.dumps([{"a": n, "b": {"c": None}} for n in range(9)], indent=1).encode(),
    b'a,b\r\n1,x\r\n2,"y\r\nz"\r\n',
    _parquet([{"a": n, "b": "x" * n, "c": [1.5, None], "d": {"e": n % 2 == 0}} for n in range(7)]),
]
WHOLE += [gzip.compress(data, mtime=0) for data in WHOLE]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with some bytes changed, inserted, removed, or its end cut off."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


any_bytes = st.binary(max_size=200) | near_json | damaged()


def _file(name: str, data: bytes) -> Source:
    path = Path(_folder.name) / name
    path.write_bytes(data)
    return Source(str(path), "r")


_folder = tempfile.TemporaryDirectory()


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    _folder.cleanup()


def _outcome(source: Source, log: ReadLog) -> tuple[list[tuple[int, object]], DataError | None]:
    """The records, or those before the error that ended the reading, and the error."""
    rows: list[tuple[int, object]] = []
    try:
        for row in iter_records(source, log):
            assert isinstance(row, Row)
            assert isinstance(row.values, dict)
            json.dumps(row.values, allow_nan=False).encode()
            rows.append((row.line, row.values))
    except DataError as error:
        return rows, error
    assert log.records == len(rows)
    return rows, None


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.jsonl.gz", "r.txt"])
@often
@given(data=any_bytes)
def test_any_bytes_end_in_records_or_in_a_data_error(name: str, data: bytes) -> None:
    source = _file(name, data)
    rows, error = _outcome(source, ReadLog())
    log = DroppingLog()
    kept, whole = _outcome(source, log)
    assert kept[: len(rows)] == rows
    if error is None:
        assert whole is None
        assert kept == rows
        assert not log.dropped
    elif whole is not None:
        assert str(whole).startswith(source.shown)
        assert log.dropped or (kept, str(whole)) == (rows, str(error))
    else:
        assert log.examples[0] == str(error)
        assert str(error).startswith(source.shown)


@often
@given(
    rows=st.lists(objects, max_size=6), indent=st.sampled_from([None, 0, 2]), escape=st.booleans()
)
def test_an_array_and_lines_of_the_same_objects_give_the_same_records(
    rows: list[dict[str, object]], indent: int | None, escape: bool
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows)
    array = json.dumps(rows, ensure_ascii=escape, indent=indent)
    of_lines, _ = _outcome(_file("r.jsonl", lines.encode()), ReadLog())
    of_array, _ = _outcome(_file("r.json", array.encode()), ReadLog())
    assert [row for _, row in of_lines] == [row for _, row in of_array] == rows
    assert [line for line, _ in of_lines] == list(range(1, len(rows) + 1))
    if indent is not None:
        line = 2
        for row, (found, _) in zip(rows, of_array, strict=True):
            assert found == line
            line += json.dumps(row, indent=indent).count("\n") + 1


def _told(error: DataError | None) -> tuple[int | None, str] | None:
    """The line and the kind of fault; how much of the text is shown depends on the block."""
    return error and (error.line, reason_of(error))


def _is_damaged_gzip(data: bytes) -> bool:
    try:
        gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return data.startswith(b"\x1f\x8b")
    return False


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.jsonl.gz"])
@often
@given(data=any_bytes, size=st.integers(1, 9), limit=st.sampled_from([20, 10**7]))
def test_where_a_block_ends_does_not_matter(name: str, data: bytes, size: int, limit: int) -> None:
    assume(not _is_damaged_gzip(data))  # of a block that is damaged nothing is given
    source = _file(name, data)
    outcomes = []
    with mock.patch.object(json_records, "MAX_RECORD_BYTES", limit):
        for block in (size, 2**20):
            with mock.patch.object(containers, "BLOCK_BYTES", block):
                log = DroppingLog()
                outcomes.append((_outcome(source, log), log.dropped, log.coerced))
    (small, *counts), (large, *other) = outcomes
    assert small[0] == large[0]
    assert _told(small[1]) == _told(large[1])
    assert counts == other


@often
@given(
    header=st.lists(texts.map(str.strip).filter(bool), min_size=2, max_size=4, unique=True),
    data=st.data(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_csv_is_written_is_read(header: list[str], data: st.DataObject, end: str) -> None:
    cells = st.lists(texts, min_size=len(header), max_size=len(header))
    rows = data.draw(st.lists(cells, max_size=5))
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *rows])
    read, error = _outcome(_file("r.csv", file.getvalue().encode()), ReadLog())
    assert (error is None) == bool(rows)
    assert [row for _, row in read] == [
        {key: cell or None for key, cell in zip(header, row, strict=True)} for row in rows
    ]
