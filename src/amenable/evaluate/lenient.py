"""Values of a JSON file that may be old, torn or of another hand: what fits, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def table(value: object, *keys: str) -> Json:
    """The object that lies under these keys; an empty one where there is none."""
    found = value
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def tables(value: object) -> list[Json]:
    """The objects of a list; none where it is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: object) -> int:
    """A count: a whole number of 0 or more; 0 for anything else."""
    found = number(value)
    return int(found) if found is not None and found > 0 else 0


def counts(value: object) -> list[tuple[str, int]]:
    """Name and count of each entry of an object, the largest first; zeros are left out."""
    found = [(str(name), whole(count)) for name, count in table(value).items()]
    return sorted([one for one in found if one[1]], key=lambda pair: (-pair[1], pair[0]))


def text(value: object, length: int = 400) -> str:
    """A text of at most `length` characters; empty for anything else."""
    found = value if isinstance(value, str) else ""
    return found if len(found) <= length else f"{found[: length - 1]}…"


def texts(value: object, length: int = 400) -> list[str]:
    """The texts of a list, each of at most `length` characters."""
    return [text(one, length) for one in value if text(one)] if isinstance(value, list) else []
