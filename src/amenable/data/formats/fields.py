"""Checks of values inside nested records; each fault names the whole way to the value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from amenable.data.reading.json_records import Json, is_unicode
from amenable.data.reading.read_log import listed, shown
from amenable.data.reading.records import Row

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def has(values: Mapping[str, Any], *keys: str) -> bool:
    """Whether the record has all keys with a value: columns of tables may be there and empty."""
    return all(values.get(key) is not None for key in keys)


def has_any(values: Mapping[str, Any], *keys: str) -> bool:
    """Whether the record has any of the keys with a value."""
    return any(values.get(key) is not None for key in keys)


def is_text(*values: object) -> bool:
    """Whether all values are texts."""
    return all(isinstance(value, str) for value in values)


def text_in(row: Row, field: str, holder: Mapping[str, Any]) -> str:
    """The needed text of the last key of `field` in its object `holder`."""
    key = field.rpartition(".")[2]
    if key not in holder:
        raise row.fault(field, f"is missing; the object has {listed(holder)}; add it")
    return checked_text(row, field, holder[key])


def checked_text(row: Row, field: str, value: object) -> str:
    """A text that is not blank and whole Unicode.

    Args:
        row: for the place of a fault.
        field: where the value stands, as `info.post`.
        value: as it was decoded.
    """
    if not isinstance(value, str) or not value.strip():
        raise row.fault(field, f"found {shown(value)}; expected a text that is not empty")
    if not value.isascii() and not is_unicode(value):
        raise row.fault(
            field, "has half a surrogate pair, which is no character; remove it from the text"
        )
    return value


def checked_object(row: Row, field: str, value: object) -> Json:
    """An object."""
    if not isinstance(value, dict):
        raise row.fault(field, f"found {shown(value)}; expected an object in braces")
    return value


def checked_list(row: Row, field: str, value: object, *, length: int | None = None) -> list[Any]:
    """A list of `length` elements, or of at least one."""
    wanted = "a list that is not empty" if length is None else f"a list of {length}"
    if not isinstance(value, list) or not value or (length is not None and len(value) != length):
        count = f" of {len(value)} elements" if isinstance(value, list) else ""
        raise row.fault(field, f"found {shown(value)}{count}; expected {wanted}")
    return value


def checked_number(row: Row, field: str, value: object) -> float:
    """A finite number, or the text of one, which is counted."""
    if isinstance(value, str) and len(value) < 100 and _NUMBER.fullmatch(value.strip()):
        row.log.coerce("text of a number read as the number")
        value = float(value)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not fits or abs(value) > 1e300:  # type: ignore[arg-type]  # checked in `fits`
        raise row.fault(field, f"found {shown(value)}; expected a number")
    return float(value)  # type: ignore[arg-type]


def whole(row: Row, value: Any) -> Any:
    """The value, but a whole number for one like 1.0, as tables with gaps have it; counted."""
    if isinstance(value, float) and value.is_integer():
        row.log.coerce("number such as 1.0 read as a whole number")
        return int(value)
    return value
