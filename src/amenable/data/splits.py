"""Splits by group: rows of one prompt (or document, or module) never stand on two sides.

A group's side depends on a hash of its name alone: not on a seed, the order of rows, or the other
kinds of rows in the run. Each decision comes twice: over a list of rows, and over columns of hashes
(`held_out`, `draw_order`, `linked_codes`), where a million rows take a few megabytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

Codes = npt.NDArray[np.uint64]
"""[n] hashes of 64 bits, one a row: of its group (`rank_bits`) or of its prompt."""

Places = npt.NDArray[np.int64]
"""[k] numbers of rows, from 0."""

Marks = npt.NDArray[np.bool_]
"""[n] one truth value a row."""

TEST_SHARE = 1 / 3
"""Most of the rows, and of the groups, that are held out for testing where data is small."""

VALIDATION_SHARE = 1 / 4
"""The same of what is left, for validation: together at most half is held out."""


def rank_bits(name: str, salt: object = "") -> int:
    """The first 64 bits of the SHA-256 of `salt` and `name`: what every order and draw goes by."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def rank(name: str, salt: object = "") -> float:
    """A number in [0, 1), uniform over names, that depends on `salt` and `name` only."""
    return (rank_bits(name, salt) >> 11) / 2**53


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
    groups = sorted(sizes, key=lambda name: (rank_bits(name), name))
    held = {groups[i] for i in _whole_groups([sizes[name] for name in groups], count, most)}
    rest = [row for row in rows if group_of(row) not in held]
    return rest, [row for row in rows if group_of(row) in held]


def held_out(groups: Codes, count: int, most: float) -> Marks:
    """`hold_out` over the column of the groups' `rank_bits`: True where a row is held out."""
    codes, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    held = np.zeros(len(codes), dtype=np.bool_)
    held[_whole_groups(sizes.tolist(), count, most)] = True
    marks: Marks = held[group_of]
    return marks


def _whole_groups(sizes: Sequence[int], count: int, most: float) -> list[int]:
    """Which groups, of these sizes in the order of their ranks, `hold_out` takes."""
    rows = sum(sizes)
    held: list[int] = []
    taken = 0
    for group, size in enumerate(sizes):
        share = most if held else 0.5
        if taken >= count or (held and len(held) + 1 > most * len(sizes)):
            break
        if taken + size <= share * rows:
            held.append(group)
            taken += size
    return held


def draw(rows: Iterable[T], count: int, name_of: Callable[[T], str], salt: object) -> list[T]:
    """A draw of `count` rows without replacement, in drawn order; 0 draws all, shuffled.

    A row's place depends on the salt (a seed and a purpose) and its own name alone: a larger draw
    begins with the smaller one, and a new row changes at most one place of it.
    """
    ordered = sorted(rows, key=lambda row: (rank_bits(name_of(row), salt), name_of(row)))
    return ordered[:count] if count else ordered


def draw_order(names: Iterable[str], rows: Places, count: int, salt: object) -> Places:
    """`draw` over numbers of rows.

    Two names of one hash of 64 bits (once in 37 million draws of a million rows) keep the order in
    which they are given.

    Args:
        names: of each of `rows`, in the same order; used once.
        rows: numbers of the rows to draw from.
        count: rows wanted; 0 draws all.
        salt: a seed and a purpose.
    """
    ranks = np.fromiter((rank_bits(name, salt) for name in names), np.uint64, len(rows))
    order = np.argsort(ranks, kind="stable")
    drawn: Places = rows[order[:count] if count else order]
    return drawn


def linked_groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """One joint group for the groups that share a prompt: it may not stand on two sides.

    Args:
        pairs: (group, key of the prompt) of each row.

    Returns:
        Each group's joint group: the first in alphabetical order of those that are linked, itself
        if none is.
    """
    groups: dict[str, int] = {}
    keys: dict[str, int] = {}
    codes = [
        (groups.setdefault(group, len(groups)), keys.setdefault(key, len(keys)))
        for group, key in pairs
    ]
    columns = np.array(codes, dtype=np.uint64).reshape(-1, 2)
    members, links = linked_codes(columns[:, 0], columns[:, 1])
    names = list(groups)
    first: dict[int, str] = {}
    for code, link in zip(members.tolist(), links.tolist(), strict=True):
        first[link] = min(first.get(link, names[code]), names[code])
    joint = {name: name for name in names}
    joint |= {
        names[code]: first[link]
        for code, link in zip(members.tolist(), links.tolist(), strict=True)
    }
    return joint


def linked_codes(groups: Codes, keys: Codes) -> tuple[Codes, Places]:
    """The groups that share a prompt with another group, directly or through others.

    Args:
        groups: [n] code of each row's group.
        keys: [n] code of each row's prompt.

    Returns:
        (members, links): [m] codes of such groups, sorted, and [m] the place in `members` of one
        that stands for all that each is linked with.
    """
    order = np.lexsort((groups, keys))
    groups, keys = groups[order], keys[order]
    neighbours = (keys[1:] == keys[:-1]) & (groups[1:] != groups[:-1])
    ends = np.stack([groups[:-1][neighbours], groups[1:][neighbours]])
    members = np.unique(ends)
    if not len(members):
        return members, np.zeros(0, dtype=np.int64)
    parent = array("q", range(len(members)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for one, other in np.searchsorted(members, ends).T:
        parent[root(int(other))] = root(int(one))
    return members, np.array([root(place) for place in range(len(members))], dtype=np.int64)
