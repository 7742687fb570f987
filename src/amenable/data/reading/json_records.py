"""JSON Lines and JSON arrays to objects, in bounded memory and with one decoder for both."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec

from amenable.data.reading.read_log import clipped, shown

Json = dict[str, Any]
Numbered = Iterator[tuple[int, Json]]
Coerce = Callable[[str], None]
"""Counts what was read as something else."""


class Unreadable(Exception):
    """The file cannot be read any further; says why.

    Attributes:
        line: the 1-based line that the reading came to, given or set by who counts them.
    """

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


class Fault(Protocol):
    """Passes a fault on; reading goes on if it returns."""

    def __call__(
        self, message: str, line: int | None = None, raw: object = None, field: str | None = None
    ) -> None:
        """`message` says what is wrong with `raw`, which stands at `line`, and the remedy."""


MAX_RECORD_BYTES = 8 * 2**20
"""Longer lines and elements are faults: a row of that size is a mistake."""

MAX_NESTING = 100
"""How many brackets deep a record may be: well within what decoders and encoders can follow."""

ONE_A_LINE = "write one whole JSON object a line"
IN_ARRAY = "write whole JSON objects with commas between them"

TOO_LONG = (
    f"has more than {MAX_RECORD_BYTES // 2**20} MiB and was not read; "
    "a row that long is a mistake: are "
)
TOO_LONG_LINE = f"the line {TOO_LONG}line ends missing?"

_decode = msgspec.json.decode
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BRACES = re.compile(rb'["{}]')
_BRACKETS = re.compile(rb'["\[\]]')
_SCALAR_END = re.compile(rb'[,\]\s"{}\[]')
_AT_BYTE = re.compile(r" \(byte (\d+)\)")
_SPACE = re.compile(rb"[ \t\r\n]*")
_NESTS = frozenset({dict, list})


def _object_pattern(levels: int) -> bytes:
    """A regular expression for an object with at most so many objects within one another."""
    string = rb'"' + _STRING_REST.pattern + rb'"'
    inner = rb"|" + _object_pattern(levels - 1) if levels else b""
    return rb'\{(?:[^"{}]++|' + string + inner + rb")*+\}"


_WHOLE_OBJECT = re.compile(_object_pattern(3), re.DOTALL)
"""For speed only: what it does not match is scanned bracket by bracket, to the same end."""


def json_lines(blocks: Iterator[bytes], fault: Fault, coerce: Coerce) -> Numbered:
    """(line, object) for each line; what is no object goes to `fault`.

    Args:
        blocks: the file, in pieces of any size.
        fault: takes message, line and raw line; reading goes on if it returns.
        coerce: told of blank lines.
    """
    for first, lines, is_cut_off in bounded_lines(blocks, fault):
        for line, raw in enumerate(lines, first):
            try:
                values = _decode(raw)
            except _UNDECODABLE:
                values = None
            if type(values) is dict and not is_too_deep(values):
                yield line, values
            elif raw and not raw.isspace():
                fault(why_no_object(raw, ONE_A_LINE, is_cut_off), line, raw)
            else:
                coerce("blank line skipped")


def bounded_lines(blocks: Iterator[bytes], fault: Fault) -> Iterator[tuple[int, list[bytes], bool]]:
    """(number of the first, lines without line feeds, whether the file ends in the middle).

    The lines of one block at a time, for speed; no more than that and `MAX_RECORD_BYTES` are held.
    """
    first = 1
    begun: list[bytes] = []  # pieces of the line that is not whole yet
    held = 0
    while block := _next_block(blocks, first):
        lines = block.split(b"\n")
        last = lines.pop()
        if lines:
            if begun:
                lines[0] = b"".join((*begun, lines[0]))
                begun, held = [], 0
            if max(map(len, lines)) > MAX_RECORD_BYTES:
                yield from _without_too_long(first, lines, fault)
            else:
                yield first, lines, False
            first += len(lines)
        if held <= MAX_RECORD_BYTES:  # beyond, what is held is enough to know that it is too long
            begun.append(last)
            held += len(last)
    if held > MAX_RECORD_BYTES:
        fault(TOO_LONG_LINE, first, begun[0][:1000])
    elif held:
        yield first, [b"".join(begun)], True


def _without_too_long(
    first: int, lines: list[bytes], fault: Fault
) -> Iterator[tuple[int, list[bytes], bool]]:
    for line, raw in enumerate(lines, first):
        if len(raw) > MAX_RECORD_BYTES:
            fault(TOO_LONG_LINE, line, raw[:1000])
        else:
            yield line, [raw], False


def _next_block(blocks: Iterator[bytes], line: int) -> bytes:
    try:
        return next(blocks, b"")
    except Unreadable as error:
        error.line = line
        raise


def json_array(blocks: Iterator[bytes], fault: Fault) -> Numbered:
    """(line, object) for each element of one JSON array; what is no object goes to `fault`."""
    for line, raw in _elements(_Buffer(blocks), fault):
        try:
            values = _decode(raw)
        except _UNDECODABLE:
            values = None
        if type(values) is dict and not is_too_deep(values):
            yield line, values
        else:
            fault(why_no_object(raw, IN_ARRAY, False), line, raw)


class _Buffer:
    """A window on the file that grows for one element only, and its line number.

    `data[at:]` is still to be read; what stands before `start` is forgotten by `more`.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self.data = b""
        self.at = 0
        self.start = 0
        self._line = 1
        self._counted = 0
        self.is_too_long = False

    def more(self) -> bool:
        """Appends a block; False at the end of the file."""
        block = _next_block(self._blocks, self._line)
        if not block:
            return False
        if self.at - self.start > MAX_RECORD_BYTES:
            self.is_too_long = True
        if self.is_too_long:
            self.start = min(self.at, len(self.data))
        self.line(self.start)
        self.data = self.data[self.start :] + block
        self.at -= self.start
        self._counted = self.start = 0
        return True

    def line(self, position: int) -> int:
        """The 1-based line of a position that is not before any asked for earlier."""
        self._line += self.data.count(b"\n", self._counted, position)
        self._counted = position
        return self._line

    def next_byte(self) -> bytes:
        """The first byte that is no white space, not taken; empty at the end of the file."""
        while True:
            space = _SPACE.match(self.data, self.at)
            self.start = self.at = space.end() if space else self.at
            if self.at < len(self.data):
                return self.data[self.at : self.at + 1]
            if not self.more():
                return b""

    def search(self, pattern: re.Pattern[bytes]) -> bytes:
        """Moves behind the next match and returns it; empty at the end of the file."""
        while True:
            found = pattern.search(self.data, self.at)
            if found:
                self.at = found.end()
                return found[0]
            self.at = len(self.data)
            if not self.more():
                return b""

    def skip_string(self) -> bool:
        """Moves behind a string whose opening quote is taken; False if the file ends first."""
        while True:
            rest = _STRING_REST.match(self.data, self.at)
            self.at = rest.end() if rest else self.at
            if self.data[self.at : self.at + 1] == b'"':
                self.at += 1
                return True
            if not self.more():  # stands at the end, or before a backslash that is the last byte
                return False


def _elements(buffer: _Buffer, fault: Fault) -> Iterator[tuple[int, bytes]]:
    """(line, raw bytes) of each element between the outer brackets."""
    buffer.next_byte()
    buffer.at += 1  # the opening bracket, which the caller has seen
    count = 0
    while True:
        byte = buffer.next_byte()
        line = buffer.line(buffer.at)
        if byte == b"]" and not count:
            break
        if byte in (b"]", b","):
            fault("is not valid JSON (there is a comma too many); remove it", line, byte)
            if byte == b"]":
                break
            buffer.at += 1
            continue
        if not byte or not _skip_element(buffer, byte):
            raw = buffer.data[buffer.start :][:1000]
            raise Unreadable(_unclosed(count, raw), line)
        count += 1
        if buffer.is_too_long or buffer.at - buffer.start > MAX_RECORD_BYTES:
            buffer.is_too_long = False
            fault(f"the element {TOO_LONG}quotes or brackets missing?", line, b"")
        else:
            yield line, buffer.data[buffer.start : buffer.at]
        byte = buffer.next_byte()
        if byte == b"]":
            break
        if byte == b",":
            buffer.at += 1
        elif byte:
            line = buffer.line(buffer.at)
            fault(f"is not valid JSON (a comma is missing here); {IN_ARRAY}", line, byte)
    buffer.at += 1
    if buffer.next_byte():
        line = buffer.line(buffer.at)
        raw = buffer.data[buffer.at : buffer.at + 1000]
        raise Unreadable(
            f"there is text behind the end of the array ({_glimpse(raw)}), which is not read; "
            "give each file one array, or write one JSON object a line without brackets",
            line,
        )


def _skip_element(buffer: _Buffer, first: bytes) -> bool:
    """Moves behind the element that begins here; False if the file ends within it."""
    if first == b"{" and (whole := _WHOLE_OBJECT.match(buffer.data, buffer.at)):
        buffer.at = whole.end()
        return True
    buffer.at += 1
    if first == b'"':
        return buffer.skip_string()
    if first not in (b"{", b"["):  # a number, a literal, or rubbish: up to what can follow one
        if buffer.search(_SCALAR_END):
            buffer.at -= 1
            return True
        return False
    pattern = _BRACES if first == b"{" else _BRACKETS
    depth = 1
    while depth:
        found = buffer.search(pattern)
        if found == b'"':
            if not buffer.skip_string():
                return False
        elif not found:
            return False
        else:
            depth += 1 if found == first else -1
    return True


def _unclosed(count: int, raw: bytes) -> str:
    if raw.strip():
        where = f"within element {count + 1}: {_glimpse(raw)}"
    else:
        where = f"behind element {count}" if count else "at once"
    return (
        f"is not valid JSON (the array is not closed: the file ends {where}); copy the file again, "
        "or look for a missing quote or bracket"
    )


def is_object(raw: bytes) -> bool:
    """Whether the bytes are one JSON object."""
    try:
        return isinstance(_decode(raw), dict)
    except _UNDECODABLE:
        return False


def is_too_deep(values: Json) -> bool:
    """Whether objects and lists are nested more than `MAX_NESTING` deep."""
    if _NESTS.isdisjoint(map(type, values.values())):  # most rows, in the fastest way there is
        return False
    return _nests_beyond(values, MAX_NESTING - 1)


def _nests_beyond(value: Any, levels: int) -> bool:
    for child in value.values() if type(value) is dict else value:
        if type(child) in _NESTS and (not levels or _nests_beyond(child, levels - 1)):
            return True
    return False


def why_no_object(raw: bytes, remedy: str, is_cut_off: bool) -> str:
    """What to say of bytes that did not decode to an object."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_cut_off and error.reason == "unexpected end of data":
            return _broken(_CUT_OFF, raw.decode("utf-8", "replace"), remedy)
        return f"byte {error.start + 1} is not UTF-8 (0x{raw[error.start]:02x}); save it as UTF-8"
    try:
        values = _decode(raw)
    except RecursionError:
        return _broken(_TOO_DEEP, text, remedy)
    except msgspec.DecodeError as error:
        return _broken(_why_malformed(text, str(error), is_cut_off), text, remedy)
    if isinstance(values, dict):
        return _broken(_TOO_DEEP, text, remedy)
    return f"found {shown(values)}; expected a JSON object in braces"


_CUT_OFF = "the file ends in the middle of it, as a copy that was broken off does"
_TOO_DEEP = f"it is nested more than {MAX_NESTING} deep"


def _broken(reason: str, text: str, remedy: str) -> str:
    return f"is not valid JSON ({reason}): {clipped(text.strip())}; {remedy}"


def _why_malformed(text: str, reason: str, is_cut_off: bool) -> str:
    """The decoder's reason in our words where there are better ones."""
    if "truncated" in reason and is_cut_off:
        return _CUT_OFF
    if "\0" in text:
        return "it has NUL bytes, as UTF-16 has; save it as UTF-8"
    constants: list[str] = []
    try:  # Python's own reader accepts some things that JSON does not have
        values = json.loads(text, parse_constant=constants.append)
    except (ValueError, RecursionError):
        values = None
    if constants:
        return f"JSON has no {constants[0]}; leave the key out or write null"
    if values is not None and not is_unicode(values):
        return "half a surrogate pair such as \\ud800 is no character; remove it"
    if "truncated" in reason:
        return "it ends too early"
    reason = reason.removeprefix("JSON is malformed: ").partition(" - at `$")[0]
    return _AT_BYTE.sub(lambda found: f" at byte {int(found[1]) + 1}", reason)


def is_unicode(value: object) -> bool:
    """Whether every text within a JSON value, keys included, can be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    elif isinstance(value, dict):
        return all(is_unicode(key) and is_unicode(item) for key, item in value.items())
    elif isinstance(value, list):
        return all(map(is_unicode, value))
    return True


def _glimpse(raw: bytes) -> str:
    return clipped(raw[:200].decode("utf-8", "replace").strip(), 40)
