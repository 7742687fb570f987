"""Splits by group: rows of one prompt (or document, or module) never stand on two sides.

A group's side depends on a hash of its name alone: not on a seed, the order or number of rows, or
the other kinds of rows in the run. All is decided on columns of hashes, where a million rows take
a few megabytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint64]
"""[n] hashes of 64 bits, one a row: of its group (`rank_bits`) or of its prompt."""

Places = npt.NDArray[np.int64]
"""[k] numbers of rows, from 0."""

Marks = npt.NDArray[np.bool_]
"""[n] one truth value a row."""

SideCodes = npt.NDArray[np.int8]
"""[n] the `Side` of each."""


class Side(IntEnum):
    """What the rows of a group may be used for; ranks rise from test to train."""

    TEST = 0
    VALIDATION = 1
    TRAIN = 2


def rank_bits(name: str, salt: object = "") -> int:
    """The first 64 bits of the SHA-256 of `salt` and `name`: what every order and draw goes by."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def rank(name: str, salt: object = "") -> float:
    """A number in [0, 1), uniform over names, that depends on `salt` and `name` only."""
    return (rank_bits(name, salt) >> 11) / 2**53


def sides_by_share(groups: Codes, test: float, validation: float) -> SideCodes:
    """[n] the side of each group, of whose `rank_bits` the `rank` decides.

    Args:
        groups: [n] `rank_bits` of the groups' names.
        test: groups of a rank below it are for testing, in [0, 1].
        validation: the next share of the ranks, for validation; the rest trains.
    """
    ranks = (groups >> np.uint64(11)) / 2**53
    sides: SideCodes = (ranks >= test).astype(np.int8) + (ranks >= test + validation)
    return sides


def draw(names: Iterable[str], rows: Places, count: int, salt: object) -> Places:
    """A draw of `count` rows without replacement, in drawn order; 0 draws all, shuffled.

    A row's place depends on the salt (a seed and a purpose) and its own name alone: a larger draw
    begins with the smaller one, and a new row changes at most one place of it. Two names of one
    hash of 64 bits (once in 37 million draws of a million rows) keep the order in which they are
    given.

    Args:
        names: of each of `rows`, in the same order; used once.
        rows: numbers of the rows to draw from.
        count: rows wanted.
        salt: a seed and a purpose.
    """
    ranks = np.fromiter((rank_bits(name, salt) for name in names), np.uint64, len(rows))
    order = np.argsort(ranks, kind="stable")
    drawn: Places = rows[order[:count] if count else order]
    return drawn


@dataclass(frozen=True, slots=True)
class JointGroups:
    """Rows of one prompt belong together under whatever name: their groups become one.

    Its code is the lowest of the groups that are linked, so that a link can bring what trained to
    the held-out rows, but never the other way.
    """

    members: Codes
    """[m] groups that are linked with others, sorted."""

    joint: Codes
    """[m] the joint group of each."""

    @classmethod
    def linked(cls, groups: Codes, keys: Codes) -> JointGroups:
        """Links the groups that share a prompt, directly or through others.

        Args:
            groups: [n] code of each row's group.
            keys: [n] code of each row's prompt.
        """
        order = np.lexsort((groups, keys))
        groups, keys = groups[order], keys[order]
        neighbours = (keys[1:] == keys[:-1]) & (groups[1:] != groups[:-1])
        ends = np.stack([groups[:-1][neighbours], groups[1:][neighbours]])
        members = np.unique(ends)
        parent = array("q", range(len(members)))

        def root(place: int) -> int:
            while parent[place] != place:
                parent[place] = place = parent[parent[place]]
            return place

        for one, other in np.searchsorted(members, ends).T.tolist():
            first, second = sorted((root(one), root(other)))
            parent[second] = first
        roots = np.array([root(place) for place in range(len(members))], dtype=np.int64)
        return cls(members, members[roots])

    def of(self, groups: Codes) -> Codes:
        """[n] the joint group of each group: itself where none is linked with it."""
        if not len(self.members):
            return groups
        place = np.searchsorted(self.members, groups).clip(max=len(self.members) - 1)
        return np.where(self.members[place] == groups, self.joint[place], groups)


@dataclass(frozen=True, slots=True)
class Sides:
    """The side of every group of a run."""

    joint: JointGroups

    groups: Codes
    """[g] all joint groups, sorted, which is the order of their ranks."""

    side: SideCodes
    """[g] the side of each."""

    def of(self, groups: Codes) -> SideCodes:
        """[n] the side of each of these groups."""
        sides: SideCodes = self.side[self._places(groups)]
        return sides

    def put(self, groups: Codes, side: Side) -> None:
        """Brings these groups, and all that are linked with them, to one side."""
        self.side[self._places(groups)] = side

    def _places(self, groups: Codes) -> Places:
        places: Places = np.searchsorted(self.groups, self.joint.of(groups))
        return places
