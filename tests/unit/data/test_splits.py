from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest

from amenable.data.splits import (
    Codes,
    JointGroups,
    Side,
    Sides,
    draw,
    rank,
    rank_bits,
    sides_by_share,
)


def codes(names: Iterable[str]) -> Codes:
    return np.array([rank_bits(name) for name in names], dtype=np.uint64)


def drawn(names: list[str], count: int, salt: str) -> list[str]:
    return [names[place] for place in draw(names, np.arange(len(names)), count, salt)]


def test_rank_is_the_sha256_of_salt_and_name() -> None:
    digest = hashlib.sha256(b"s\0name").hexdigest()
    assert rank("name", "s") == pytest.approx(int(digest, 16) / 16**64, abs=1e-15)
    assert rank("name", "s") != rank("name", "t")


def test_ranks_are_uniform() -> None:
    below = sum(rank(str(number)) < 0.2 for number in range(10_000))
    assert abs(below - 2000) < 4 * 40  # four standard deviations, sqrt(10,000 * 0.2 * 0.8) = 40


def test_shares_about_right() -> None:
    sides = sides_by_share(codes(map(str, range(10_000))), 0.2, 0.1)
    counts = [int((sides == side).sum()) for side in Side]
    assert sum(counts) == 10_000
    for count, share in zip(counts, (0.2, 0.1, 0.7), strict=True):
        assert abs(count - 10_000 * share) < 4 * (10_000 * share * (1 - share)) ** 0.5


def test_a_side_is_that_of_the_rank() -> None:
    groups = np.array([0, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    sides = sides_by_share(groups, 0.25, 0.25)
    expected = [Side.TEST, Side.TEST, Side.VALIDATION, Side.VALIDATION, Side.TRAIN, Side.TRAIN]
    assert sides.tolist() == expected
    assert sides_by_share(groups, 0.0, 1.0).tolist() == [Side.VALIDATION] * 6


def test_a_larger_draw_begins_with_the_smaller() -> None:
    rows = [str(number) for number in range(50)]
    whole = drawn(rows, 0, "seed 1")
    assert sorted(whole) == sorted(rows)
    assert whole == sorted(rows, key=lambda name: rank_bits(name, "seed 1"))
    assert drawn(rows[::-1], 10, "seed 1") == whole[:10]
    assert drawn(rows, 10, "seed 2") != whole[:10]
    assert drawn(rows, 99, "seed 1") == whole


def test_linked_groups_are_the_lowest_of_them() -> None:
    groups = np.array([9, 8, 8, 7, 5, 5, 7, 3], dtype=np.uint64)
    keys = np.array([1, 1, 2, 2, 3, 4, 6, 9], dtype=np.uint64)
    joint = JointGroups.linked(groups, keys)
    assert joint.members.tolist() == [7, 8, 9]
    assert joint.of(groups).tolist() == [7, 7, 7, 7, 5, 5, 7, 3]
    alone = JointGroups.linked(groups[4:], keys[4:])
    assert len(alone.members) == 0
    assert alone.of(groups).tolist() == groups.tolist()


def test_many_links_meet_in_the_lowest_group() -> None:
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.arange(1, 1001, dtype=np.uint64))
    chain = np.repeat(groups, 2)[1:-1]
    joint = JointGroups.linked(chain, np.repeat(np.arange(999, dtype=np.uint64), 2))
    assert set(joint.of(groups).tolist()) == {1}


def test_a_side_holds_for_all_linked_groups() -> None:
    joint = JointGroups.linked(
        np.array([4, 6, 8], dtype=np.uint64), np.array([1, 1, 2], dtype=np.uint64)
    )
    groups = np.array([4, 8], dtype=np.uint64)
    sides = Sides(joint, groups, np.array([Side.TRAIN, Side.TRAIN], dtype=np.int8))
    sides.put(np.array([6], dtype=np.uint64), Side.TEST)
    assert sides.of(np.array([8, 6, 4], dtype=np.uint64)).tolist() == [2, 0, 0]
