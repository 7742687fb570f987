"""Rows to a file: JSON Lines, gzip, CSV or Parquet; the whole file under its name, or none."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from amenable.artifacts import storage_errors
from amenable.data.reading.json_records import Json
from amenable.errors import DataError, StorageError, UsageError

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
"""What the name of a written file may end with."""

_JSON = (".jsonl", ".jsonl.gz")

_BATCH = 1000

Again = Callable[[], Iterator[Json]]
"""Gives all rows from the start, as often as it is called."""

Verify = Callable[[Path, Again], None]
"""Looks at the whole file before it has its name, beside the rows that were written into it."""


def check_ending(out: Path) -> str:
    """The ending that tells the container.

    Raises:
        UsageError: it is none of ENDINGS.
    """
    ending = next((ending for ending in ENDINGS if out.name.endswith(ending)), None)
    if ending is None:
        raise UsageError(f"{out}: expected a name that ends with {', '.join(ENDINGS)}")
    return ending


def write_rows(
    out: Path,
    rows: Iterable[Json],
    fill: Mapping[str, Any],
    *,
    force: bool = False,
    verify: Verify | None = None,
) -> tuple[int, list[str]]:
    """Writes the rows aside, one in memory at a time, and renames the file when it is whole.

    Args:
        out: where; its ending tells the container.
        rows: JSON objects; texts may not hold half surrogate pairs.
        fill: values of keys that either all or none of the rows should have.
        force: whether a file that stands at `out` in the end is replaced.
        verify: called for tables, which do not hold all that JSON does; raises DataError if the
            file is not to appear.

    Returns:
        How many rows were written, and which keys of `fill` were added to some of them.

    Raises:
        UsageError: the ending is unknown.
        DataError: there are no rows, or they do not fit into a table.
        StorageError: the file cannot be written; what stood at `out` is intact.
    """
    ending = check_ending(out)
    # the ending tells a reader that it is CSV
    names = (f".{out.name}.{os.getpid()}.{name}" for name in ("spool", f"partial{ending}"))
    spool, aside = map(out.with_name, names)
    try:
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            count, keys = _spool(spool, rows, zipped=ending == ".jsonl.gz")
            if not count:
                raise DataError("no row is left to write", path=out)
            added = {key: value for key, value in fill.items() if 0 < keys[key] < count}
            if ending.startswith(".jsonl") and not added:
                os.replace(spool, aside)
            else:
                again = _filled(spool, added, zipped=ending == ".jsonl.gz")
                _write(out, aside, again, [*keys], None if ending in _JSON else verify)
            _flush(aside)
            if out.exists() and not force:
                raise StorageError(f"{out} has appeared since the rows were read; name another")
            os.replace(aside, out)
    finally:
        for path in (spool, aside):
            with suppress(OSError):
                path.unlink()
    return count, sorted(added)


def _write(
    out: Path, aside: Path, again: Again, keys: Sequence[str], verify: Verify | None
) -> None:
    try:
        _WRITERS[check_ending(out)](aside, again, keys)
        if verify is not None:
            verify(aside, again)
    except DataError as error:  # knows no file, or the hidden one
        raise DataError(error.reason, path=out) from error


def _spool(path: Path, rows: Iterable[Json], *, zipped: bool) -> tuple[int, Counter[str]]:
    keys: Counter[str] = Counter()
    count = 0
    with _open(path, "wb", zipped=zipped) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007 - the count is wanted below
            keys.update(row.keys())
            file.write(_encoded(row))
    return count, keys


def _filled(path: Path, added: Json, *, zipped: bool) -> Again:
    def rows() -> Iterator[Json]:
        with _open(path, "rb", zipped=zipped) as file:
            for line in file:
                yield {**added, **json.loads(line)}

    return rows


def _open(path: Path, mode: str, *, zipped: bool) -> IO[bytes]:
    if not zipped:
        return cast("IO[bytes]", path.open(mode))
    # Without a time stamp, so that the same rows give the same bytes.
    return cast("IO[bytes]", gzip.GzipFile(path, mode, mtime=0))


def _encoded(row: Json) -> bytes:
    try:
        return msgspec.json.encode(row) + b"\n"
    except OverflowError:  # whole numbers of more than 64 bits, which Python's own writer can
        return json.dumps(row).encode() + b"\n"


def _write_jsonl(path: Path, again: Again, keys: Sequence[str]) -> None:
    with _open(path, "wb", zipped=False) as file:
        file.writelines(map(_encoded, again()))


def _write_gzip(path: Path, again: Again, keys: Sequence[str]) -> None:
    with _open(path, "wb", zipped=True) as file:
        file.writelines(map(_encoded, again()))


def _write_csv(path: Path, again: Again, keys: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(keys)
        for row in again():
            table.writerow([_cell(key, row.get(key)) for key in keys])


def _cell(key: str, value: object) -> object:
    if isinstance(value, list | dict):
        raise DataError(
            f"column {key!r} has lists or objects, which CSV has no place for; write "
            ".jsonl or .parquet"
        )
    return str(value).lower() if isinstance(value, bool) else value


def _write_parquet(path: Path, again: Again, keys: Sequence[str]) -> None:
    try:
        pa: Any = importlib.import_module("pyarrow")
        pq: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError(
            "Parquet needs the package pyarrow, which is not installed; `pip install pyarrow`, "
            "or write .jsonl"
        ) from error

    def batches() -> Iterator[list[Json]]:
        rows = again()
        while batch := [{key: row.get(key) for key in keys} for row in islice(rows, _BATCH)]:
            yield batch

    try:
        schemas = [pa.Table.from_pylist(batch).schema for batch in batches()]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            for batch in batches():
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        why = _mixed(again(), keys) or str(error)
        raise DataError(f"the rows do not fit into one table ({why}); write .jsonl") from error


def _mixed(rows: Iterable[Json], keys: Sequence[str]) -> str:
    """Which column has values of several kinds; empty if none has."""
    found: dict[str, list[str]] = {key: [] for key in keys}
    for row in rows:
        for key, value in row.items():
            kind = next((name for types, name in _KINDS if isinstance(value, types)), None)
            if kind and kind not in found[key]:
                found[key].append(kind)
                if len(found[key]) > 1:
                    return f"column {key!r} has {' and '.join(found[key])}"
    return ""


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "truth values"),
    ((int, float), "numbers"),
    (str, "texts"),
    (list, "lists"),
    (dict, "objects"),
)


_WRITERS: dict[str, Callable[[Path, Again, Sequence[str]], None]] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_gzip,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
