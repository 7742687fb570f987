"""Splits by group: rows of one prompt (or document, or module) never stand on two sides.

A group's side depends on a hash of its name alone: not on a seed, the order of rows, or the other
kinds of rows in the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

TEST_SHARE = 1 / 3
"""Most of the rows, and of the groups, that are held out for testing where data is small."""

VALIDATION_SHARE = 1 / 4
"""The same of what is left, for validation: together at most half is held out."""


def rank(name: str, salt: object = "") -> float:
    """A number in [0, 1), uniform over names (SHA-256), that depends on `salt` and `name` only."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def split_by_group(
    rows: Iterable[T],
    group_of: Callable[[T], str],
    shares: Mapping[str, float],
    rest: str = "train",
) -> dict[str, list[T]]:
    """Rows by split, each about its share of the groups; a new row never moves an old one.

    Args:
        rows: any rows; their order is kept.
        group_of: name of a row's group.
        shares: split to share of the groups, each in [0, 1], at most 1 together; a group of rank r
            goes to the first split whose cumulated share exceeds r.
        rest: name of the split that takes the remaining groups.

    Raises:
        ValueError: the shares are negative or exceed 1 together.
    """
    if any(share < 0 for share in shares.values()) or sum(shares.values()) > 1:
        raise ValueError(f"shares must be 0 or more and at most 1 together, not {dict(shares)}")
    split: dict[str, list[T]] = {name: [] for name in (*shares, rest)}
    for row in rows:
        left = rank(group_of(row))
        for name, share in shares.items():
            if left < share:
                split[name].append(row)
                break
            left -= share
        else:
            split[rest].append(row)
    return split


def hold_out(
    rows: Sequence[T], count: int, group_of: Callable[[T], str], most: float
) -> tuple[list[T], list[T]]:
    """At least `count` rows in whole groups, but at most a share of all, and the rest.

    Groups are taken in the order of their ranks until `count` rows are held. One that would bring
    the held-out rows or groups above their share is passed over, so that one large group does not
    spoil the split; the first may take up to half.

    Growth: the order of the groups never changes. A new group may enter and push the last one out,
    so, once there are `count` rows to hold, an old row can move from held-out to the rest but never
    from the rest to held-out. For shares that nothing moves, use `split_by_group`.

    Args:
        rows: any rows; their order is kept.
        count: rows wanted; 0 holds out none.
        group_of: name of a row's group.
        most: largest share of the rows and of the groups, in (0, 0.5].

    Returns:
        (rest, held out); nothing is held out where all rows are one group.
    """
    sizes = Counter(group_of(row) for row in rows)
    held: set[str] = set()
    taken = 0
    for group in sorted(sizes, key=lambda name: (rank(name), name)):
        share = most if held else 0.5
        if taken >= count or (held and len(held) + 1 > most * len(sizes)):
            break
        if taken + sizes[group] <= share * len(rows):
            held.add(group)
            taken += sizes[group]
    rest = [row for row in rows if group_of(row) not in held]
    return rest, [row for row in rows if group_of(row) in held]


def draw(rows: Iterable[T], count: int, name_of: Callable[[T], str], salt: object) -> list[T]:
    """A draw of `count` rows without replacement, in drawn order; 0 draws all, shuffled.

    A row's place depends on the salt (a seed and a purpose) and its own name alone: a larger draw
    begins with the smaller one, and a new row changes at most one place of it.
    """
    ordered = sorted(rows, key=lambda row: (rank(name_of(row), salt), name_of(row)))
    return ordered[:count] if count else ordered


def linked_groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """One joint group for the groups that share a prompt: it may not stand on two sides.

    Args:
        pairs: (group, key of the prompt) of each row.

    Returns:
        Each group's joint group: the first in alphabetical order of those that are linked, itself
        if none is.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first_group: dict[str, str] = {}
    for group, key in pairs:
        parent.setdefault(group, group)
        one, other = root(group), root(first_group.setdefault(key, group))
        parent[max(one, other)] = min(one, other)
    return {group: root(group) for group in parent}
