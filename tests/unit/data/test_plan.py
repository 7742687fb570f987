from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from amenable.config.data import DataConfig, PreferenceSource
from amenable.config.recipe import Recipe
from amenable.data.plan import Plan, Sources, make_plan
from amenable.data.reading.records import ReadLog
from amenable.data.row_table import read_table
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.data.splits import rank
from amenable.errors import DataError

NAMES = sorted((f"g{n}" for n in range(1000)), key=rank)
TEST = [name for name in NAMES if rank(name) < 0.1]
VALIDATION = [name for name in NAMES if 0.1 <= rank(name) < 0.15]
TRAIN = [name for name in NAMES if rank(name) >= 0.15]
NAMED = PreferenceSource(files=("named.jsonl",))


def prompt(group: str, text: str = "") -> Prompt:
    text = text or f"text of {group}"
    message = (Message(Speaker.USER, text),)
    return Prompt(messages=message, id=f"{group}: {text}", group=group)


def demonstration(group: str, text: str = "") -> Demonstration:
    return Demonstration(prompt=prompt(group, text), output_text="answer")


def preference(group: str, text: str = "") -> Preference:
    return Preference(
        prompt=prompt(group, text), candidate_0="a", candidate_1="b", choice=Choice.TIE
    )


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    def plan_of(
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Demonstration] = (),
        preferences: Sequence[Preference] = (),
        evaluation_prompts: Sequence[Prompt] = (),
        **data: Any,
    ) -> Plan:
        kinds: Any = {
            "prompts": prompts,
            "demonstrations": demonstrations,
            "preferences": preferences,
            "evaluation_prompts": evaluation_prompts,
        }
        tables = {
            kind: read_table(tmp_path / kind, ((None, row) for row in rows), ReadLog())
            for kind, rows in kinds.items()
        }
        sources = Sources(
            **tables, prompts_from="prompts", origin={}, reading={}, dropped=Counter()
        )
        files = NAMED if preferences else PreferenceSource()
        return make_plan(sources, Recipe(data=DataConfig(preferences=files, **data)))

    return plan_of


def groups(plan: Plan, split: str) -> set[str]:
    part = plan.splits[split]
    return {row["group"] for row in part.table.rows(part.rows)}


def test_a_side_is_that_of_the_rank_for_every_kind(plan_of: Any) -> None:
    own = [*TEST[:9], *VALIDATION[:8], *TRAIN[:40]]
    plan = plan_of(
        [prompt(name) for name in own],
        [demonstration(name, f"another of {name}") for name in own],
        [preference(name, f"a third of {name}") for name in own],
    )
    assert groups(plan, "prompts.test") == groups(plan, "preferences.test") == set(TEST[:9])
    assert groups(plan, "prompts.train") == {*VALIDATION[:8], *TRAIN[:40]}
    for kind in ("demonstrations", "preferences"):
        assert groups(plan, f"{kind}.validation") == set(VALIDATION[:8])
        assert groups(plan, f"{kind}.train") == set(TRAIN[:40])
    assert plan.set_aside == {"demonstrations of held-out prompts": 9}


def test_a_large_group_stays_where_its_rank_puts_it(plan_of: Any) -> None:
    large = [prompt(TRAIN[0], f"text {n}") for n in range(200)]
    few = [prompt(name) for name in (*TEST[:3], *TRAIN[1:9])]
    more = [prompt(name) for name in (*TEST[3:80], *TRAIN[9:])]
    for rows in ([*large, *few], [*large, *few, *more]):
        assert TRAIN[0] in groups(plan_of(rows, evaluation_rows=400), "prompts.train")


def test_limits_cut_the_held_out_rows_and_the_rest_is_not_trained_on(plan_of: Any) -> None:
    own = [*TEST[:30], *VALIDATION[:20], *TRAIN[:60]]
    rows = {
        "prompts": [prompt(name) for name in own],
        "demonstrations": [demonstration(name) for name in own],
        "preferences": [preference(name) for name in own],
    }
    whole = plan_of(**rows)
    cut = plan_of(**rows, evaluation_rows=7, validation_rows=4)
    for name, part in whole.splits.items():
        kept = {"test": 7, "validation": 4}.get(name.split(".")[1], len(part))
        assert cut.splits[name].rows.tolist() == part.rows[:kept].tolist()
    assert cut.set_aside - whole.set_aside == {
        "held-out prompts beyond evaluation_rows": 23,
        "held-out preferences beyond evaluation_rows": 23,
        "validation preferences beyond validation_rows": 16,
        "validation demonstrations beyond validation_rows": 16,
    }
    assert cut.notes == []
    assert (
        "prompts.test has 30 rows, not the 400 of data.evaluation_rows: a higher data.test_share "
        "holds out more"
    ) in whole.notes


def test_groups_that_share_a_prompt_take_the_lowest_rank(plan_of: Any) -> None:
    own = [*TEST[:2], *VALIDATION[:2], *TRAIN[:9]]
    bridge = demonstration(TRAIN[0], f"text of  {TEST[0].upper()}")
    plan = plan_of(
        [prompt(name) for name in own], [*map(demonstration, own), bridge], evaluation_rows=1
    )
    assert TRAIN[0] not in groups(plan, "prompts.train") | groups(plan, "demonstrations.train")
    assert plan.set_aside["demonstrations of held-out prompts"] == 4


def test_named_evaluation_prompts_leave_the_share_to_the_preferences(plan_of: Any) -> None:
    own = [*TEST[:5], *VALIDATION[:3], *TRAIN[:20]]
    rows = [prompt(name) for name in own]
    shown = [demonstration(name) for name in own]
    asked = [prompt("new"), prompt("renamed", f"text of {TRAIN[0]}")]
    alone = plan_of(rows, shown, evaluation_prompts=asked)
    assert groups(alone, "prompts.test") == {"new", "renamed"}
    assert groups(alone, "prompts.train") == {*own} - {TRAIN[0]}
    assert groups(alone, "demonstrations.train") == {*TEST[:5], *TRAIN[1:20]}
    beside = plan_of(rows, shown, [preference(name) for name in own], asked)
    assert groups(beside, "prompts.test") == {"new", "renamed"}
    assert groups(beside, "preferences.test") == {*TEST[:5], TRAIN[0]}
    for split in ("prompts.train", "demonstrations.train", "preferences.train"):
        assert groups(beside, split) >= {*TRAIN[1:20]}
        assert groups(beside, split).isdisjoint({*TEST[:5], TRAIN[0]})
    assert beside.set_aside["prompts among the held-out ones"] == 6


@pytest.mark.parametrize(
    ("own", "test", "train"),
    [
        (TRAIN[:3], TRAIN[:1], TRAIN[1:3]),
        (VALIDATION[:2], VALIDATION[:1], VALIDATION[1:2]),
        (TEST[:3], TEST[:2], TEST[2:3]),
    ],
)
def test_too_few_prompts_for_the_shares_are_split_and_told(
    plan_of: Any, own: list[str], test: list[str], train: list[str]
) -> None:
    plan = plan_of([prompt(name) for name in own])
    assert groups(plan, "prompts.test") == set(test)
    assert groups(plan, "prompts.train") == set(train)
    (note,) = (note for note in plan.notes if "stable shares" in note)
    side = "train" if own == TEST[:3] else "test"
    assert note == (
        f"too few prompts for stable shares: none of the {len(own)} groups of prompts falls to the "
        f"{side} share, so the nearest one is taken; more rows may move it back"
    )


@pytest.mark.parametrize("own", [TEST[:3], VALIDATION[:3], TRAIN[:3], [TEST[0], *TRAIN[:2]]])
def test_three_groups_fill_all_splits_of_preferences(plan_of: Any, own: list[str]) -> None:
    plan = plan_of([prompt(name) for name in own], preferences=[preference(n) for n in own])
    found = [groups(plan, f"preferences.{name}") for name in ("test", "validation", "train")]
    assert [len(part) for part in found] == [1, 1, 1]
    assert set.union(*found) == set(own)
    assert groups(plan, "prompts.test") == found[0]


def test_one_group_cannot_be_held_out(plan_of: Any) -> None:
    with pytest.raises(DataError, match="all prompts are one group"):
        plan_of([prompt("g", str(n)) for n in range(5)])


def test_prompts_that_differ_in_space_alone_are_two_rows_of_one_side(plan_of: Any) -> None:
    own = [*TEST[:3], *VALIDATION[:3], *TRAIN[:5]]
    rows = [demonstration(name, text) for name in own for text in (f"if {name}:", f"if\t{name}:")]
    plan = plan_of([row.prompt for row in rows], rows, evaluation_rows=99)
    assert plan.dropped == {}
    assert len(plan.splits["demonstrations.train"]) == 10
    assert len(plan.splits["prompts.test"]) == 6
