"""What holds of the splits, whatever the rows: sides are stable, groups whole, caps only cut."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from amenable.config.data import DataConfig, PreferenceSource
from amenable.config.recipe import Recipe
from amenable.data.plan import Sources, make_plan
from amenable.data.reading.records import ReadLog
from amenable.data.row_table import RowTable, read_table
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.data.splits import Side, draw, rank, rank_bits, sides_by_share

from .data_strategies import names


@dataclass(frozen=True)
class Spec:
    """A row: kind, group, text of its prompt, and a number that tells it from others."""

    kind: str
    group: str
    text: str
    number: int = 0


KINDS = ("prompts", "demonstrations", "preferences", "evaluation_prompts")
DATA = DataConfig(
    test_share=0.3,
    validation_share=0.3,
    evaluation_rows=10**6,
    validation_rows=10**6,
    preferences=PreferenceSource(files=("named.jsonl",)),
)
HELD = ("prompts.test", "preferences.test")
VALIDATION = ("preferences.validation", "demonstrations.validation")
TRAINED = ("preferences.train", "demonstrations.train")

kinds = st.sampled_from(KINDS[:3])


def rows_of(name: str, groups: int) -> st.SearchStrategy[list[Spec]]:
    """Rows of groups of several prompts and rows; each kind has some of the groups."""
    return st.lists(
        st.builds(
            lambda kind, group, text, number: Spec(
                kind, f"{name} {group}", f"{name} {group}/{text}", number
            ),
            kinds,
            st.integers(0, groups),
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        max_size=60,
        unique=True,
    )


# every kind has rows of enough groups to fill its splits, whatever is drawn beside them
BASE = [Spec(kind, f"base {n}", f"base {n}/{n % 2}") for kind in KINDS[:3] for n in range(20)]
old_rows = rows_of("old", 12).map(lambda rows: [*BASE, *rows])
new_rows = rows_of("new", 20)
evaluation = st.lists(st.integers(0, 19), max_size=3).map(
    lambda numbers: [
        Spec("evaluation_prompts", f"asked {n}", f"base {n}/{n % 2}") for n in set(numbers)
    ]
)
links = st.lists(
    st.builds(
        lambda kind, one, other: Spec(kind, f"base {one}", f"base {other}/{other % 2}", 7),
        kinds,
        st.integers(0, 19),
        st.integers(0, 19),
    ),
    min_size=1,
    max_size=4,
)
"""Rows that share a prompt with one named group and stand in another."""


Splits = dict[str, list[tuple[str, str]]]


def planned(rows: Sequence[Spec], seed: int = 0, **data: Any) -> Splits:
    """(group, text) of the rows of each split, in its order; rows are read in the order given."""
    recipe = Recipe(seed=seed, data=replace(DATA, **data))
    with tempfile.TemporaryDirectory() as folder:
        tables: Any = {kind: table(Path(folder) / kind, kind, rows) for kind in KINDS}
        plan = make_plan(
            Sources(**tables, prompts_from="prompts", origin={}, reading={}, dropped=Counter()),
            recipe,
        )
        assert not [note for note in plan.notes if "stable shares" in note]
        return {
            name: [(row["group"], row["input_text"]) for row in part.table.rows(part.rows)]
            for name, part in plan.splits.items()
        }


def table(spool: Path, kind: str, rows: Sequence[Spec]) -> RowTable:
    own: Any = ((None, made(row)) for row in rows if row.kind == kind)
    return read_table(spool, own, ReadLog())


def made(row: Spec) -> Prompt | Demonstration | Preference:
    prompt = Prompt(messages=(Message(Speaker.USER, row.text),), id=repr(row), group=row.group)
    if row.kind == "demonstrations":
        return Demonstration(prompt=prompt, output_text=f"answer {row.number}")
    if row.kind == "preferences":
        sides = {"candidate_0": f"one {row.number}", "candidate_1": "other"}
        return Preference(prompt=prompt, choice=Choice.FIRST, **sides)
    return prompt


def moved(before: Splits, after: Splits) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """Prompts that stood in one split and now stand in another of the same kind."""
    found = {
        (old, new): set(before[old]) & set(after[new])
        for old in before
        for new in after
        if old != new and old.split(".")[0] == new.split(".")[0]
    }
    return {move: rows for move, rows in found.items() if rows}


def groups(splits: Splits, *named: str) -> set[str]:
    return {group for name in named for group, _ in splits[name]}


@given(old_rows, new_rows, evaluation)
def test_rows_of_new_groups_move_no_old_row(
    old: list[Spec], new: list[Spec], asked: list[Spec]
) -> None:
    before, after = planned([*old, *asked]), planned([*old, *asked, *new])
    for name, rows in before.items():
        assert set(rows) <= set(after[name]), name
    assert not moved(before, after)


@given(old_rows, evaluation, st.randoms(), st.integers(1, 9))
def test_neither_the_order_of_rows_nor_the_seed_changes_a_side(
    rows: list[Spec], asked: list[Spec], random: Any, seed: int
) -> None:
    every = [*rows, *asked]
    before = planned(every)
    after = planned(random.sample(every, len(every)), seed=seed)
    assert {name: sorted(rows) for name, rows in before.items()} == {
        name: sorted(rows) for name, rows in after.items()
    }
    for name in (*HELD, *VALIDATION):
        assert set(after[name]) == set(before[name])


@given(old_rows, evaluation, st.sampled_from(["demonstrations", "preferences"]))
def test_rows_of_another_kind_change_no_side(
    rows: list[Spec], asked: list[Spec], without: str
) -> None:
    before = planned([row for row in [*rows, *asked] if row.kind != without])
    after = planned([*rows, *asked])
    for name, part in before.items():
        assert after[name] == part, name


@given(old_rows, links)
def test_a_row_that_links_groups_brings_nothing_held_out_to_training(
    rows: list[Spec], linking: list[Spec]
) -> None:
    before, after = planned(rows), planned([*rows, *linking])
    ways = {(old.split(".")[1], new.split(".")[1]) for old, new in moved(before, after)}
    assert ways <= {("train", "validation"), ("train", "test"), ("validation", "test")}
    assert groups(before, *HELD).isdisjoint(groups(after, *TRAINED, *VALIDATION, "prompts.train"))


@given(old_rows, new_rows, evaluation, links)
def test_no_group_and_no_prompt_is_on_two_sides(
    old: list[Spec], new: list[Spec], asked: list[Spec], linking: list[Spec]
) -> None:
    found = planned([*old, *new, *asked, *linking])
    for place in (0, 1):  # the group, the text
        held, validation, trained = (
            {row[place] for name in side for row in found[name]}
            for side in (HELD, VALIDATION, TRAINED)
        )
        assert held.isdisjoint(
            validation | trained | {row[place] for row in found["prompts.train"]}
        )
        assert validation.isdisjoint(trained)


@given(old_rows, new_rows, st.integers(1, 12), st.integers(1, 12))
def test_caps_cut_the_draw_and_change_no_side(
    old: list[Spec], new: list[Spec], tests: int, validations: int
) -> None:
    whole = planned([*old, *new])
    cut = planned([*old, *new], evaluation_rows=tests, validation_rows=validations)
    for name, rows in whole.items():
        count = {"test": tests, "validation": validations}.get(name.split(".")[1])
        assert cut[name] == rows[:count], name


@given(st.lists(names), st.floats(0, 0.5), st.floats(0, 0.5))
def test_sides_are_those_of_the_ranks(groups: list[str], test: float, validation: float) -> None:
    codes = np.array([rank_bits(name) for name in groups], dtype=np.uint64)
    expected = [
        Side.TEST
        if rank(name) < test
        else Side.VALIDATION
        if rank(name) < test + validation
        else Side.TRAIN
        for name in groups
    ]
    assert sides_by_share(codes, test, validation).tolist() == expected


@given(st.lists(names, unique=True), st.integers(1, 20), st.integers(1, 20))
def test_a_larger_draw_begins_with_the_smaller(rows: list[str], one: int, more: int) -> None:
    places = np.arange(len(rows))
    larger = draw(rows, places, one + more, "salt")
    assert larger[:one].tolist() == draw(rows, places, one, "salt").tolist()


@given(st.lists(names, unique=True), st.integers(0, 20), st.randoms())
def test_a_draw_does_not_depend_on_the_order(rows: list[str], count: int, random: Any) -> None:
    places = np.array(random.sample(range(len(rows)), len(rows)), dtype=np.int64)
    drawn = draw((rows[place] for place in places), places, count, "salt")
    assert drawn.tolist() == draw(rows, np.arange(len(rows)), count, "salt").tolist()


@given(names, names)
def test_ranks_lie_in_the_unit_interval(name: str, salt: str) -> None:
    assert 0 <= rank(name, salt) < 1
