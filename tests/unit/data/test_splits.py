from __future__ import annotations

import hashlib

import numpy as np
import pytest

from amenable.data.splits import (
    draw,
    draw_order,
    held_out,
    hold_out,
    linked_codes,
    linked_groups,
    rank,
    rank_bits,
    split_by_group,
)


def first_letter(row: str) -> str:
    return row[0]


def same(row: str) -> str:
    return row


def test_rank_is_the_sha256_of_salt_and_name() -> None:
    digest = hashlib.sha256(b"s\0name").hexdigest()
    assert rank("name", "s") == pytest.approx(int(digest, 16) / 16**64, abs=1e-15)
    assert rank("name", "s") != rank("name", "t")


def test_ranks_are_uniform() -> None:
    below = sum(rank(str(number)) < 0.2 for number in range(10_000))
    assert abs(below - 2000) < 4 * 40  # four standard deviations, sqrt(10,000 * 0.2 * 0.8) = 40


def test_split_by_group_keeps_groups_whole_and_shares_about_right() -> None:
    rows = [f"{group}/{number}" for group in range(1000) for number in range(2)]
    splits = split_by_group(rows, lambda row: row.split("/")[0], {"test": 0.2, "validation": 0.1})
    assert list(splits) == ["test", "validation", "train"]
    assert sum(map(len, splits.values())) == 2000
    groups = {name: {row.split("/")[0] for row in split} for name, split in splits.items()}
    assert not groups["test"] & groups["validation"]
    assert not groups["test"] & groups["train"]
    assert 340 < len(splits["test"]) < 460
    assert 140 < len(splits["validation"]) < 260


@pytest.mark.parametrize("shares", [{"test": -0.1}, {"test": 0.8, "validation": 0.3}])
def test_impossible_shares_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shares must be 0 or more and at most 1 together"):
        split_by_group(["a"], first_letter, shares)


def test_hold_out_takes_whole_groups_until_there_are_enough() -> None:
    rows = [f"{letter}{number}" for letter in "abcdefghij" for number in range(10)]
    rest, held = hold_out(rows, 15, first_letter, 0.5)
    assert len(held) == 20
    assert {row[0] for row in held}.isdisjoint(row[0] for row in rest)
    by_rank = sorted("abcdefghij", key=rank)
    assert {row[0] for row in held} == set(by_rank[:2])
    assert [row for row in rows if row in set(held)] == held  # order kept


def test_hold_out_takes_no_more_than_its_share() -> None:
    rows = [f"{letter}{number}" for letter in "abcdefghi" for number in range(10)]
    rest, held = hold_out(rows, 1000, first_letter, 1 / 3)
    assert (len(rest), len(held)) == (60, 30)


def test_hold_out_passes_over_a_group_that_is_too_large() -> None:
    largest = min("abcd", key=rank)
    rows = [f"{letter}{n}" for letter in "abcd" for n in range(100 if letter == largest else 2)]
    _, held = hold_out(rows, 4, first_letter, 0.5)
    assert len(held) == 4
    assert largest not in {row[0] for row in held}


def test_hold_out_of_two_groups_takes_one_and_of_one_none() -> None:
    assert [len(part) for part in hold_out(["a1", "b1"], 5, first_letter, 0.1)] == [1, 1]
    assert hold_out(["a1", "a2"], 1, first_letter, 0.5) == (["a1", "a2"], [])
    assert hold_out([], 1, first_letter, 0.5) == ([], [])


@pytest.mark.parametrize("count", [0, -3])
def test_hold_out_of_nothing_is_nothing(count: int) -> None:
    assert hold_out(["a", "b"], count, first_letter, 0.5) == (["a", "b"], [])


def test_a_larger_draw_begins_with_the_smaller() -> None:
    rows = [str(number) for number in range(50)]
    whole = draw(rows, 0, same, "seed 1")
    assert sorted(whole) == sorted(rows)
    assert whole != rows
    assert draw(reversed(rows), 10, same, "seed 1") == whole[:10]
    assert draw(rows, 10, same, "seed 2") != whole[:10]


def test_groups_that_share_a_prompt_are_joined_under_the_first_name() -> None:
    pairs = [("c", "1"), ("b", "1"), ("b", "2"), ("a", "2"), ("d", "3"), ("d", "4"), ("a", "5")]
    assert linked_groups(pairs) == {"a": "a", "b": "a", "c": "a", "d": "d"}
    assert linked_groups([]) == {}


def test_columns_are_held_out_as_rows_are() -> None:
    rows = [f"{number % 40}/{number}" for number in range(300)]
    codes = np.array([rank_bits(row.split("/")[0]) for row in rows], dtype=np.uint64)
    for count, most in ((0, 0.5), (17, 1 / 3), (1000, 0.25)):
        _, held = hold_out(rows, count, lambda row: row.split("/")[0], most)
        marks = held_out(codes, count, most)
        assert [row for row, mark in zip(rows, marks.tolist(), strict=True) if mark] == held
    assert held_out(codes[:0], 3, 0.5).tolist() == []


def test_numbers_are_drawn_as_rows_are() -> None:
    rows = [str(number) for number in range(50)]
    places = np.arange(50)[::-1]
    names = [rows[place] for place in places]
    for count in (0, 7, 99):
        drawn = draw_order(names, places, count, "seed 1")
        assert [rows[place] for place in drawn] == draw(rows, count, same, "seed 1")


def test_linked_codes_are_sets_of_groups() -> None:
    groups = np.array([9, 8, 8, 7, 5, 5, 7], dtype=np.uint64)
    keys = np.array([1, 1, 2, 2, 3, 4, 6], dtype=np.uint64)
    members, links = linked_codes(groups, keys)
    assert members.tolist() == [7, 8, 9]
    assert len(set(links.tolist())) == 1
    members, links = linked_codes(groups[4:], keys[4:])
    assert (len(members), len(links)) == (0, 0)
