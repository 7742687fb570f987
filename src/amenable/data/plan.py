"""Which row goes into which split, decided on columns: no text is in memory, whatever the number.

The rules are those of `splits`: whole groups are held out, by the hash of their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amenable.config.data import DataConfig
from amenable.config.recipe import Recipe
from amenable.data.annotator import reference_of
from amenable.data.row_file import parse_prompt
from amenable.data.row_table import RowTable
from amenable.data.splits import (
    TEST_SHARE,
    VALIDATION_SHARE,
    Codes,
    Marks,
    Places,
    draw_order,
    held_out,
    linked_codes,
    rank_bits,
)
from amenable.errors import DataError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything that was read or harvested, before it is split."""

    demonstrations: RowTable
    preferences: RowTable
    prompts: RowTable
    prompts_from: str
    """Which rows the prompts are: `prompts`, `demonstrations` or `preferences`."""

    evaluation_prompts: RowTable
    origin: Json
    """Files, or packages and versions."""

    reading: Json
    """By kind of row: what its reading met."""

    dropped: Counter[str]
    """Records that made no row, by kind and reason."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a table, in an order."""

    table: RowTable
    rows: Places

    def __len__(self) -> int:
        return len(self.rows)

    def lines(self) -> Iterator[bytes]:
        """The native line of each row."""
        return self.table.lines(self.rows)

    def only(self, marks: Marks) -> Part:
        """The rows whose marks, [rows of this part], are True."""
        return Part(self.table, self.rows[marks])

    def drawn(self, count: int, salt: str) -> Part:
        """A draw of `count` rows, 0 for all, in drawn order."""
        return Part(self.table, draw_order(self.table.ids_of(self.rows), self.rows, count, salt))

    def distinct(self, column: Codes) -> Part:
        """The first row of each value of a column of the table."""
        _, first = np.unique(column[self.rows], return_index=True)
        return Part(self.table, self.rows[np.sort(first)])

    def __add__(self, other: Part) -> Part:
        return Part(self.table, np.concatenate([self.rows, other.rows]))


@dataclass(slots=True)
class Plan:
    """The splits as they are decided, and what there is to tell about them."""

    joint: JointGroups

    held: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Joint groups that no training split may hold, sorted."""

    demonstrations: dict[str, Part] = field(default_factory=dict)
    preferences: dict[str, Part] = field(default_factory=dict)
    prompts: dict[str, Part] = field(default_factory=dict)

    dropped: Counter[str] = field(default_factory=Counter)
    """Rows in no split because they add nothing (exact duplicates) or are faulty."""

    set_aside: Counter[str] = field(default_factory=Counter)
    """Good rows in no split: their prompt is held out, or a limit of the recipe is reached."""

    notes: list[str] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, Part]:
        """Every split under the name of its file."""
        kinds = ("demonstrations", "preferences", "prompts")
        return {
            f"{kind}.{name}": part for kind in kinds for name, part in getattr(self, kind).items()
        }

    def sides(self, part: Part) -> Codes:
        """[rows] what decides each row's split."""
        return self.joint.of(part.table.group[part.rows])

    def is_held(self, part: Part) -> Marks:
        """[rows] whether each may not be trained on."""
        return np.isin(self.sides(part), self.held)

    def hold(self, part: Part) -> None:
        """Keeps these rows, and all of their groups, out of every training split."""
        self.held = np.union1d(self.held, self.sides(part))

    def note_short(self, split: str, rows: int, key: str, wanted: int) -> None:
        """Tells of a split that has fewer rows than the recipe asks."""
        if rows < wanted:
            self.notes.append(
                f"{split} has {rows} rows, not the {wanted} of data.{key}: there are too few "
                "different prompts to hold out more"
            )


@dataclass(frozen=True, slots=True)
class JointGroups:
    """Rows of one prompt belong together under whatever name: their groups become one.

    Its name is the first, in alphabetical order, of the groups that are linked.
    """

    members: Codes
    """[m] groups that are linked with others, sorted."""

    joint: Codes
    """[m] the joint group of each."""

    @classmethod
    def of_tables(cls, tables: Iterable[RowTable]) -> JointGroups:
        """The joint groups of all rows of a run."""
        filled = [table for table in tables if len(table)]
        members, links = linked_codes(
            np.concatenate([table.group for table in filled]),
            np.concatenate([table.key for table in filled]),
        )
        first: dict[int, str] = {}
        for table in filled if len(members) else ():
            groups, rows = np.unique(table.group, return_index=True)
            rows = np.sort(rows[np.isin(groups, members)])
            found = links[np.searchsorted(members, table.group[rows])].tolist()
            for link, name in zip(found, table.group_names(rows), strict=True):
                first[link] = min(first.get(link, name), name)
        joint = {link: rank_bits(name) for link, name in first.items()}
        return cls(members, np.array([joint[link] for link in links.tolist()], dtype=np.uint64))

    def of(self, groups: Codes) -> Codes:
        """[n] the joint group of each group: itself where none is linked with it."""
        if not len(self.members):
            return groups
        place = np.searchsorted(self.members, groups).clip(max=len(self.members) - 1)
        return np.where(self.members[place] == groups, self.joint[place], groups)


def make_plan(sources: Sources, recipe: Recipe) -> Plan:
    """Decides each row's split.

    1. Held-out evaluation prompts: `evaluation_prompts`, or whole groups of the prompts.
    2. Preferences: those of held-out prompts are the test, filled up with whole groups; then
       validation, then train.
    3. What is held out leaves demonstrations and prompts. Demonstrations: validation, then train.
    4. Prompts for training and, if that is asked, for collecting preferences.

    The held-out rows depend on the data alone, so that runs with other seeds are judged on the
    same ones; the seed decides which training rows a limit draws, and their order.

    Raises:
        DataError: too few different prompts, or a prompt without the author's line that the
            simulated annotator needs.
    """
    tables = (
        sources.prompts,
        sources.evaluation_prompts,
        sources.demonstrations,
        sources.preferences,
    )
    plan = Plan(JointGroups.of_tables(tables), dropped=Counter(sources.dropped))
    _plan_test_prompts(plan, sources, recipe.data)
    _plan_preferences(plan, sources.preferences, recipe)
    _plan_demonstrations(plan, sources.demonstrations, recipe)
    _plan_prompts(plan, sources, recipe)
    return plan


def collects(recipe: Recipe) -> bool:
    """Whether preferences are to be collected: a reward to train, an annotator, no file."""
    trains = recipe.reward.enabled and not recipe.policy.reward
    return trains and recipe.collect.annotator != "none" and not recipe.data.preferences


def _plan_test_prompts(plan: Plan, sources: Sources, config: DataConfig) -> None:
    given = sources.evaluation_prompts
    if len(given):
        candidates = whole(given).distinct(given.key)
        _count(plan.dropped, "duplicate evaluation prompts", len(given) - len(candidates))
    else:
        distinct = whole(sources.prompts).distinct(sources.prompts.key)
        _, candidates = _hold_out(plan, distinct, config.evaluation_rows, TEST_SHARE)
    if not len(candidates):
        raise DataError(
            "all prompts are one group, so that none can be held out for evaluation; add "
            "different prompts, or name data.evaluation_prompts"
        )
    test = candidates.drawn(config.evaluation_rows, "test")
    plan.prompts["test"] = test
    plan.hold(candidates)
    surplus = len(candidates) - len(test)
    _count(plan.set_aside, "held-out prompts beyond evaluation_rows", surplus)
    plan.note_short("prompts.test", len(test), "evaluation_rows", config.evaluation_rows)


def _plan_preferences(plan: Plan, table: RowTable, recipe: Recipe) -> None:
    if not len(table):
        return
    config = recipe.data
    test, rest = _partition(whole(table), plan.is_held(whole(table)))
    wanted = min(config.evaluation_rows, int(TEST_SHARE * len(table)) or 1)
    rest, more = _hold_out(plan, rest, wanted - len(test), TEST_SHARE)
    plan.hold(more)
    free, validation = _hold_out(plan, rest, config.validation_rows, VALIDATION_SHARE)
    train = free.drawn(config.max_preferences, f"{recipe.seed} preferences")
    plan.preferences = {
        "train": train,
        "validation": validation.drawn(0, "validation"),
        "test": (test + more).drawn(0, "test"),
    }
    _count(plan.set_aside, "preferences beyond max_preferences", len(free) - len(train))
    _check_filled(plan, "preferences", plan.preferences, config)


def _plan_demonstrations(plan: Plan, table: RowTable, recipe: Recipe) -> None:
    if not len(table):
        return
    config = recipe.data
    distinct = whole(table).distinct(table.content)
    held, rest = _partition(distinct, plan.is_held(distinct))
    free, validation = _hold_out(plan, rest, config.validation_rows, VALIDATION_SHARE)
    train = free.drawn(config.max_demonstrations, f"{recipe.seed} demonstrations")
    plan.demonstrations = {"train": train, "validation": validation.drawn(0, "validation")}
    _count(plan.dropped, "duplicate demonstrations", len(table) - len(distinct))
    _count(plan.set_aside, "demonstrations of held-out prompts", len(held))
    _count(plan.set_aside, "demonstrations beyond max_demonstrations", len(free) - len(train))
    _check_filled(plan, "demonstrations", plan.demonstrations, config)


def _plan_prompts(plan: Plan, sources: Sources, recipe: Recipe) -> None:
    distinct = whole(sources.prompts).distinct(sources.prompts.key)
    held, free = _partition(distinct, plan.is_held(distinct))
    if not len(free):
        raise DataError(
            "every prompt is held out for evaluation, so that none is left to train on; add "
            "prompts whose text is not among the evaluation prompts"
        )
    train = free.drawn(recipe.data.max_prompts, f"{recipe.seed} prompts")
    plan.prompts["train"] = train
    if sources.prompts_from == "prompts":
        _count(plan.dropped, "duplicate prompts", len(sources.prompts) - len(distinct))
        if len(sources.evaluation_prompts):
            _count(plan.set_aside, "prompts among the held-out ones", len(held))
    _count(plan.set_aside, "prompts beyond max_prompts", len(free) - len(train))
    if collects(recipe):
        plan.prompts["collect"] = _collect_prompts(plan, free, recipe)
        for part in (plan.prompts["test"], free):
            for row in part.table.rows(part.rows):
                reference_of(parse_prompt(row))  # raises now, not after the SFT stage


def _collect_prompts(plan: Plan, free: Part, recipe: Recipe) -> Part:
    """`collect.pairs + validation_rows` prompts, those that no training demonstration has first."""
    wanted = recipe.collect.pairs + recipe.data.validation_rows
    drawn = free.drawn(0, f"{recipe.seed} collect")
    shown = plan.demonstrations.get("train")
    keys = np.zeros(0, dtype=np.uint64) if shown is None else shown.table.key[shown.rows]
    again, fresh = _partition(drawn, np.isin(drawn.table.key[drawn.rows], keys))
    taken = Part(drawn.table, (fresh + again).rows[:wanted])
    if len(taken) > len(fresh):
        plan.notes.append(
            f"{len(taken) - len(fresh)} of the {len(taken)} prompts for collecting preferences are "
            "also training demonstrations; lower data.max_demonstrations or collect.pairs to keep "
            "them apart"
        )
    if len(taken) < wanted:
        plan.notes.append(
            f"there are {len(taken)} prompts for collecting preferences, not the {wanted} of "
            "collect.pairs + data.validation_rows"
        )
    return taken


def _check_filled(plan: Plan, kind: str, splits: dict[str, Part], config: DataConfig) -> None:
    """Refuses a split that is empty although rows are asked for; notes one that is short."""
    keys = {"train": "", "validation": "validation_rows", "test": "evaluation_rows"}
    for name, part in splits.items():
        wanted = getattr(config, keys[name]) if keys[name] else 1
        if wanted and not len(part):
            remedy = " or set data.validation_rows = 0" if name == "validation" else ""
            raise DataError(
                f"no {kind} are left for the {name} split: too few different prompts, or the "
                f"evaluation prompts cover them; give rows of at least {len(splits)} other "
                f"prompts{remedy}"
            )
        plan.note_short(f"{kind}.{name}", len(part), keys[name], wanted)


def _hold_out(plan: Plan, part: Part, count: int, most: float) -> tuple[Part, Part]:
    """(rest, held out), as `splits.hold_out` says."""
    held, rest = _partition(part, held_out(plan.sides(part), count, most))
    return rest, held


def _partition(part: Part, marks: Marks) -> tuple[Part, Part]:
    """Rows that are marked, and the others."""
    return part.only(marks), part.only(~marks)


def whole(table: RowTable) -> Part:
    """All rows of a table, in order."""
    return Part(table, np.arange(len(table), dtype=np.int64))


def _count(counter: Counter[str], reason: str, rows: int) -> None:
    if rows:
        counter[reason] += rows
