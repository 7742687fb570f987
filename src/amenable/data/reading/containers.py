"""Recognises what a file holds and gives its records: (line, object) pairs, and faults."""

from __future__ import annotations

import gzip
import io
import re
import tempfile
import zlib
from collections.abc import Iterator

from amenable.data.reading.json_records import (
    Coerce,
    Fault,
    Numbered,
    Unreadable,
    is_object,
    json_array,
    json_lines,
)
from amenable.data.reading.read_log import clipped
from amenable.data.reading.sources import GZIP_MAGIC, is_url
from amenable.data.reading.table_records import csv_records, parquet_records

BLOCK_BYTES = 2**18
"""How much of a file is read at a time."""

HEAD_BYTES = 2**16
"""How much of a file is looked at, at least, to recognise what it holds."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_UTF_32_AND_16 = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_COMPRESSED = {
    GZIP_MAGIC: "compressed with gzip twice",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"PK\x03\x04": "a zip archive",
}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


class Container:
    """The records of one file; iterate once.

    Attributes:
        is_textual: whether all values are texts (CSV).
    """

    def __init__(self, file: io.BufferedIOBase, name: str, fault: Fault, coerce: Coerce) -> None:
        """Recognises what the file holds; closes it when the iteration ends."""
        self.is_textual = False
        self._fault, self._coerce = fault, coerce
        self._name = re.split("[?#]", name)[0] if is_url(name) else name
        self._name = self._name.lower().removesuffix(".gz")
        self._blocks = _Blocks(file, "the network" if is_url(name) else "the disk")
        self._records: Numbered = iter(())
        try:
            try:
                self._records = self._recognise(self._blocks.head())
            except Unreadable as error:
                fault(str(error), error.line)
        except BaseException:
            self._blocks.close()
            raise

    def __iter__(self) -> Numbered:
        try:
            yield from self._records
        except Unreadable as error:
            self._fault(str(error), error.line)
        finally:
            self._blocks.close()

    def _recognise(self, head: bytes) -> Numbered:
        """By the first bytes, then by the name; nothing and a fault if neither tells."""
        if head.startswith(b"PAR1") or self._name.endswith(".parquet"):
            return self._parquet()
        for magic, encoding in _UTF_32_AND_16.items():
            if head.startswith(magic):
                return self._none(f"is {encoding}, by its byte order mark; save it as UTF-8")
        for magic, how in _COMPRESSED.items():
            if head.startswith(magic):
                return self._none(f"is {how}, which is not read; decompress it, or use gzip")
        if head.startswith(BYTE_ORDER_MARK):
            self._blocks.skip(len(BYTE_ORDER_MARK))
            self._coerce("byte order mark skipped")
            head = head.removeprefix(BYTE_ORDER_MARK)
        return self._text(head)

    def _text(self, head: bytes) -> Numbered:
        begin = head.lstrip(b" \t\r\n")
        delimiter = _DELIMITERS.get("." + self._name.rpartition(".")[2])
        if begin.startswith(b"[") and not _is_lines(begin):
            return json_array(iter(self._blocks), self._fault)
        if begin.startswith(b"{") and _is_one_object(begin):
            return self._none(
                "is one JSON object over several lines; expected rows: write one whole JSON object "
                "a line, or all of them with commas between in one pair of [ ]"
            )
        if not begin.startswith((b"{", b"[")) and delimiter:
            self.is_textual = True
            return csv_records(iter(self._blocks), delimiter, self._fault, self._coerce)
        if not begin or begin.startswith((b"{", b"[")) or self._name.endswith(_JSON_ENDINGS):
            return json_lines(iter(self._blocks), self._fault, self._coerce)
        return self._none(
            f"cannot read this kind of file (it begins with {clipped(ascii(begin[:20])[1:])}); "
            "expected JSON Lines, a JSON array, Parquet, or a name ending in .csv or .tsv"
        )

    def _parquet(self) -> Numbered:
        if self._blocks.is_gzip:
            return self._none("is Parquet within gzip; decompress it, Parquet is compressed itself")
        return parquet_records(self._blocks.seekable(), self._fault, self._coerce)

    def _none(self, message: str) -> Numbered:
        self._fault(message)
        return iter(())


class _Blocks:
    """The bytes of one file in blocks; what stops the reading becomes `Unreadable`."""

    def __init__(self, file: io.BufferedIOBase, to_check: str) -> None:
        self._file, self._to_check = file, to_check
        self._head = b""
        self._broken: Unreadable | None = None
        self.is_gzip = isinstance(file, gzip.GzipFile)

    def head(self) -> bytes:
        """The first `HEAD_BYTES` or more; iteration gives them again."""
        try:
            while len(self._head) < HEAD_BYTES and (block := self._read()):
                self._head += block
        except Unreadable as error:
            self._broken = error  # what came before is read first
        return self._head

    def skip(self, count: int) -> None:
        """Takes bytes off the head."""
        self._head = self._head[count:]

    def __iter__(self) -> Iterator[bytes]:
        head, self._head = self._head, b""
        for start in range(0, len(head), BLOCK_BYTES):
            yield head[start : start + BLOCK_BYTES]
        if self._broken:
            raise self._broken
        while block := self._read():
            yield block

    def seekable(self) -> io.BufferedIOBase:
        """The whole file from its beginning, as a stream that can seek."""
        if not self._file.seekable():
            whole = self._spooled()
            self._file.close()
            self._file = whole
        self._file.seek(0)
        return self._file

    def _spooled(self) -> io.BufferedIOBase:
        """A temporary copy on the disk, for a place that can only be read from its beginning."""
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            for block in self:
                copy.write(block)
        except OSError as error:
            copy.close()
            raise Unreadable(
                f"cannot be copied to the disk ({error.strerror}); make room in "
                f"{tempfile.gettempdir()}, or set TMPDIR to another folder"
            ) from error
        except BaseException:
            copy.close()
            raise
        return copy

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self) -> bytes:
        # read1, for what was read before a damage
        try:
            return self._file.read1(BLOCK_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Unreadable(
                f"is not a whole gzip file ({error}); copy it again, or take .gz off its name"
            ) from error
        except OSError as error:
            raise Unreadable(
                f"cannot be read ({error.strerror}); check {self._to_check}"
            ) from error


def _is_lines(begin: bytes) -> bool:
    """Whether what begins with a bracket is JSON Lines with a list, wrongly, in the first."""
    first, _, rest = begin.partition(b"\n")
    return first.rstrip().endswith(b"]") and rest.lstrip().startswith(b"{")


def _is_one_object(begin: bytes) -> bool:
    """Whether neither of the first two lines is whole, as of an object written with indents."""
    first, _, rest = begin.partition(b"\n")
    second, ends, _ = rest.lstrip().partition(b"\n")
    return bool(
        first.rstrip().endswith((b"{", b"[", b","))
        and ends
        and not is_object(first)
        and not is_object(second)
    )
