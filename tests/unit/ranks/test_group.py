"""How work is dealt out, and that one process pays nothing for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amenable.data.collate import alike_for, evenly
from amenable.ranks import group

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(group, "rank", lambda: rank)
    monkeypatch.setattr(group, "size", lambda: size)


def test_alone_every_item_is_a_turn_and_nothing_is_exchanged() -> None:
    group.traffic.clear()
    assert list(group.turns("abc")) == [("a", True), ("b", True), ("c", True)]
    assert group.gathered(7) == [7]
    assert group.told(7) == group.led(lambda: 7) == 7
    assert group.summed(1.5, 2.0) == (1.5, 2.0)
    rows = torch.ones(2)
    group.add_up([rows])
    assert rows.tolist() == [1, 1]
    assert group.own_slice(5) == slice(0, 5)
    assert not group.traffic


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_take_turns_and_keep_in_step(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    items = list(range(5))
    seen, passes = [], set()
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        seen += [item for item, _ in group.turns(items)]
        own = list(group.turns(items, in_step=True))
        passes.add(len(own))
        assert [item for item, counts in own if counts] == items[rank::size]
        assert {item for item, counts in own if not counts} <= {items[-1]}
    assert sorted(seen) == items, "each once"
    assert passes == {-(-5 // size)}, "all make as many passes"


def test_a_rank_without_an_item_keeps_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 2, 3)
    assert list(group.turns(["a"], in_step=True)) == [("a", False)]
    assert list(group.turns([], in_step=True)) == []


def test_items_go_to_their_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1, 2)
    found = list(group.turns("abc", [1, 1, 0]))
    assert found == [("a", True), ("b", True)]


def test_slices_cover_all_and_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(9):
        found: list[int] = []
        sizes = []
        for rank in range(4):
            as_rank(monkeypatch, rank, 4)
            own = list(range(count))[group.own_slice(count)]
            found += own
            sizes.append(len(own))
        assert found == list(range(count))
        assert max(sizes) - min(sizes) <= 1


@given(LENGTHS, st.integers(2, 5), st.integers(20, 80))
def test_groups_are_even_and_within_the_budget(lengths: list[int], ranks: int, most: int) -> None:
    found = evenly(lengths, most, ranks)
    assert sorted(i for own in found for i in own) == list(range(len(lengths)))
    assert all(len(own) == 1 or sum(lengths[i] for i in own) <= most for own in found)
    assert len(found) % ranks == 0 or len(found) == len(lengths), "no rank waits for another"
    sums = [sum(lengths[i] for i in own) for own in found]
    assert max(sums) - min(sums) <= max(lengths)


@given(LENGTHS, st.integers(2, 5), st.integers(20, 200))
def test_padded_batches_are_as_many_as_ranks(lengths: list[int], ranks: int, most: int) -> None:
    found = alike_for(lengths, most, ranks)
    assert sorted(i for own in found for i in own) == list(range(len(lengths)))
    assert len(found) >= min(ranks, len(lengths))
    padded = [len(own) * max(lengths[i] for i in own) for own in found]
    assert all(len(own) == 1 or cost <= most for own, cost in zip(found, padded, strict=True))


def test_even_groups_by_hand() -> None:
    """9 and 1 against 5 and 4; a budget of 6 asks for two groups more a rank."""
    assert evenly([1, 4, 5, 9], 10, 2) == [[3, 0], [2, 1]]
    assert evenly([1, 4, 5, 9], 6, 2) == [[3], [2], [1], [0]]
