"""What a reading met: counts of records, rows, drops and coercions, and what a fault means."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

import msgspec

from amenable.errors import DataError

MAX_EXAMPLES = 20
"""How many whole messages a `DroppingLog` keeps."""

_KINDS = r"nothing|an? (?:number|text|list|object|truth value)"
_FOUND = re.compile(rf"^found .* \(({_KINDS})\)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_PLACES = re.compile(r"\[\d+\]")
_NUMBER = re.compile(r"(?<![\w-])\d[\d,.]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class ReadLog:
    """Counts of one reading; its first fault ends the reading.

    Attributes:
        records: records decoded, in all files.
        rows: typed rows made of them.
        dropped: reason -> records that made no row.
        coerced: what was read as something else -> how often.
        formats: file -> name of the format it was read as.
    """

    def __init__(self) -> None:
        self.records = 0
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.coerced: Counter[str] = Counter()
        self.formats: dict[str, str] = {}

    def fault(self, error: DataError, raw: object = None) -> None:
        """Decides what a fault means: here, the end of the reading.

        Args:
            error: what was wrong, where, and what to do.
            raw: the bytes or the record at fault; None if a whole file is, or all of it from
                `error.line` on.

        Raises:
            DataError: always, `error`.
        """
        raise error

    def coerce(self, what: str) -> None:
        """Counts something that was read as something else."""
        self.coerced[what] += 1

    def drop(self, reason: str) -> None:
        """Counts a record that is left out by a documented rule, not for a fault."""
        self.dropped[reason] += 1


class DroppingLog(ReadLog):
    """Leaves faulty records out, counts them by reason and goes on.

    A fault without raw content still ends the reading: a file that cannot be opened, or not be
    read to its end, is no record to drop. What is behind a break would be missing unseen, and how
    much that is could differ from one reading to the next.

    Attributes:
        examples: the first `MAX_EXAMPLES` messages, whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.examples: list[str] = []

    def fault(self, error: DataError, raw: object = None) -> None:
        """Counts the fault by its reason; the caller goes on with the next record.

        Raises:
            DataError: `error`, if a whole file or the rest of one is at fault.
        """
        if raw is None:
            raise error
        self.dropped[reason_of(error)] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(str(error))


def reason_of(error: DataError) -> str:
    """What many faults have in common: the field and how the message begins.

    File, line, quoted values, numbers, details in brackets and the remedy are left out, so that
    `rows.jsonl:7: field 'choice': found 2 (a number); expected …` and the same fault of line 9
    give one reason, `field 'choice': found a number`.
    """
    message = error.reason
    found = _FOUND.match(message)
    if found:
        message = f"found {found[1]}"
    else:
        begin = re.split(r"[;:]| \(", _QUOTED.sub("'…'", message), maxsplit=1)[0]
        message = _NUMBER.sub("N", begin)
    if not error.field:
        return message.strip()
    named = f"field {_PLACES.sub('[]', error.field)!r}"
    return f"{named}{' ' if message.startswith('is ') else ': '}{message.strip()}"


def shown(value: object) -> str:
    """The value as JSON, cut short, and its kind in JSON's words."""
    kinds = {
        bool: "a truth value",
        str: "a text",
        list: "a list",
        dict: "an object",
        type(None): "nothing",
    }
    return f"{clipped(_as_json(value))} ({kinds.get(type(value), 'a number')})"


def listed(names: Iterable[str]) -> str:
    """Names in quotes, cut short; "no keys" if there are none."""
    return clipped(", ".join(map(repr, names))) or "no keys"


def clipped(text: str, length: int = 60) -> str:
    """At most `length` characters, the last an ellipsis if some are missing; fit for a terminal."""
    short = text if len(text) <= length else f"{text[: length - 1]}…"
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], short)


def _as_json(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    try:
        return msgspec.json.encode(value).decode()
    except (UnicodeEncodeError, RecursionError, TypeError):  # lone surrogates; no JSON type
        return ascii(value)
