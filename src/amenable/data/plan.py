"""Which row goes into which split, decided on columns: no text is in memory, whatever the number.

The rules are those of `splits`: a group's side is decided by the hash of its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amenable.config.data import DataConfig
from amenable.config.needs import collects, selects_by
from amenable.config.recipe import Recipe
from amenable.data.row_table import RowTable
from amenable.data.splits import (
    Codes,
    JointGroups,
    Marks,
    Places,
    Side,
    SideCodes,
    Sides,
    draw,
    sides_by_share,
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
        return Part(self.table, draw(self.table.ids_of(self.rows), self.rows, count, salt))

    def distinct(self, column: Codes) -> Part:
        """The first row of each value of a column of the table."""
        _, first = np.unique(column[self.rows], return_index=True)
        return Part(self.table, self.rows[np.sort(first)])

    def __add__(self, other: Part) -> Part:
        return Part(self.table, np.concatenate([self.rows, other.rows]))


@dataclass(slots=True)
class Plan:
    """The splits as they are decided, and what there is to tell about them."""

    sides: Sides

    given: Codes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Joint groups whose side is not to be changed, sorted: those of named evaluation prompts."""

    demonstrations: dict[str, Part] = field(default_factory=dict)
    preferences: dict[str, Part] = field(default_factory=dict)
    prompts: dict[str, Part] = field(default_factory=dict)

    dropped: Counter[str] = field(default_factory=Counter)
    """Rows in no split because they add nothing (exact duplicates) or are faulty."""

    set_aside: Counter[str] = field(default_factory=Counter)
    """Good rows in no split: they are held out, or a limit of the recipe is reached."""

    notes: list[str] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, Part]:
        """Every split under the name of its file."""
        kinds = ("demonstrations", "preferences", "prompts")
        return {
            f"{kind}.{name}": part for kind in kinds for name, part in getattr(self, kind).items()
        }

    def groups(self, part: Part) -> Codes:
        """The joint groups of these rows, in the order of their ranks."""
        return np.unique(self.sides.joint.of(part.table.group[part.rows]))

    def on(self, side: Side, part: Part) -> Part:
        """The rows that stand on a side."""
        return part.only(self.sides.of(part.table.group[part.rows]) == side)

    def free(self, part: Part) -> tuple[Part, Part]:
        """Rows that are held out for testing, and the others."""
        return _partition(part, self.sides.of(part.table.group[part.rows]) == Side.TEST)


def make_plan(sources: Sources, recipe: Recipe) -> Plan:
    """Decides each row's split.

    A group's side is that of its rank: the first `data.test_share` tests, the next
    `data.validation_share` validates, the rest trains; it holds for rows of every kind. Of the
    rows of a split at most as many are drawn as the recipe allows.

    Named evaluation prompts, and their groups, are held out in any case. Then the share is held
    out for `preferences.test` alone, so only where the recipe names preferences.

    The sides depend on the groups' names alone, so that runs with other seeds are judged on the
    same rows; the seed decides which training rows a limit draws, and their order.

    Raises:
        DataError: too few different prompts.
    """
    plan = _sides(sources, recipe.data)
    _fill(plan, sources)
    _plan_test_prompts(plan, sources, recipe.data)
    _plan_preferences(plan, sources.preferences, recipe)
    _plan_demonstrations(plan, sources.demonstrations, recipe)
    _plan_prompts(plan, sources, recipe)
    return plan


def _sides(sources: Sources, config: DataConfig) -> Plan:
    """The plan with the side of every group, as the shares and named evaluation prompts say."""
    named = (
        sources.prompts,
        sources.evaluation_prompts,
        sources.demonstrations,
        sources.preferences,
    )
    tables = list({table.spool: table for table in named if len(table)}.values())
    groups = np.concatenate([table.group for table in tables])
    joint = JointGroups.linked(groups, np.concatenate([table.key for table in tables]))
    groups = np.unique(joint.of(groups))
    side = sides_by_share(groups, config.test_share, config.validation_share)
    evaluation = sources.evaluation_prompts
    if len(evaluation) and not config.preferences:
        side[side == Side.TEST] = Side.TRAIN
    sides = Sides(joint, groups, side)
    sides.put(evaluation.group, Side.TEST)
    return Plan(
        sides, given=np.unique(joint.of(evaluation.group)), dropped=Counter(sources.dropped)
    )


def _fill(plan: Plan, sources: Sources) -> None:
    """Brings a group to each side that the shares leave empty, where rows are too few for them."""
    if not len(sources.evaluation_prompts):
        _fill_kind(plan, "prompts", sources.prompts, (Side.TEST, Side.TRAIN))
    _fill_kind(plan, "preferences", sources.preferences, tuple(Side))
    _fill_kind(plan, "demonstrations", sources.demonstrations, (Side.VALIDATION, Side.TRAIN))


def _fill_kind(plan: Plan, kind: str, table: RowTable, needed: tuple[Side, ...]) -> None:
    """The same of one kind of row: the nearest group of a side that has more than one is taken."""
    groups = plan.groups(whole(table))
    for side in needed:
        stands = plan.sides.of(groups)
        if Side.VALIDATION not in needed:  # of prompts, these are trained on
            stands[stands == Side.VALIDATION] = Side.TRAIN
        spare = [other for other in needed if (stands == other).sum() > 1]
        if side in stands or not spare:
            continue
        free = np.isin(stands, spare) & ~np.isin(groups, plan.given)
        taken = _nearest(groups[free], stands[free], side)
        plan.sides.put(taken, side)
        plan.given = np.union1d(plan.given, taken)
        if len(taken):
            plan.notes.append(
                f"too few prompts for stable shares: none of the {len(groups)} groups of {kind} "
                f"falls to the {side.name.lower()} share, so the nearest one is taken; more rows "
                "may move it back"
            )


def _nearest(groups: Codes, stands: SideCodes, side: Side) -> Codes:
    """[1] or [0] of the groups, in the order of their ranks: the one next to a side."""
    above = groups[stands > side]
    return above[:1] if len(above) else groups[-1:]


def _plan_test_prompts(plan: Plan, sources: Sources, config: DataConfig) -> None:
    given = sources.evaluation_prompts
    if len(given):
        candidates = whole(given).distinct(given.asked)
        _count(plan.dropped, "duplicate evaluation prompts", len(given) - len(candidates))
    else:
        distinct = whole(sources.prompts).distinct(sources.prompts.asked)
        candidates, _ = plan.free(distinct)
    if not len(candidates):
        raise DataError(
            "all prompts are one group, so that none can be held out for evaluation; add "
            "different prompts, or name data.evaluation_prompts"
        )
    remedy = "data.evaluation_prompts has no others" if len(given) else ""
    plan.prompts["test"] = _capped(plan, "prompts.test", candidates, config, remedy)


def _plan_preferences(plan: Plan, table: RowTable, recipe: Recipe) -> None:
    if not len(table):
        return
    config = recipe.data
    rows = whole(table)
    test, validation, free = (plan.on(side, rows) for side in Side)
    train = free.drawn(config.max_preferences, f"{recipe.seed} preferences")
    _check_filled("preferences", {"train": train, "validation": validation, "test": test})
    plan.preferences = {
        "train": train,
        "validation": _capped(plan, "preferences.validation", validation, config),
        "test": _capped(plan, "preferences.test", test, config),
    }
    _count(plan.set_aside, "preferences beyond max_preferences", len(free) - len(train))


def _plan_demonstrations(plan: Plan, table: RowTable, recipe: Recipe) -> None:
    if not len(table):
        return
    config = recipe.data
    distinct = whole(table).distinct(table.content)
    held, validation, free = (plan.on(side, distinct) for side in Side)
    train = free.drawn(config.max_demonstrations, f"{recipe.seed} demonstrations")
    _check_filled("demonstrations", {"train": train, "validation": validation})
    plan.demonstrations = {
        "train": train,
        "validation": _capped(plan, "demonstrations.validation", validation, config),
    }
    _count(plan.dropped, "duplicate demonstrations", len(table) - len(distinct))
    _count(plan.set_aside, "demonstrations of held-out prompts", len(held))
    _count(plan.set_aside, "demonstrations beyond max_demonstrations", len(free) - len(train))


def _plan_prompts(plan: Plan, sources: Sources, recipe: Recipe) -> None:
    distinct = whole(sources.prompts).distinct(sources.prompts.asked)
    held, free = plan.free(distinct)
    if not len(free):
        raise DataError(
            "every prompt is held out for evaluation, so that none is left to train on; add "
            "prompts whose text is not among the evaluation prompts"
        )
    if selects_by(recipe):
        free = _set_selection_prompts_aside(plan, free, recipe.data)
    train = free.drawn(recipe.data.max_prompts, f"{recipe.seed} prompts")
    plan.prompts["train"] = train
    if sources.prompts_from == "prompts":
        _count(plan.dropped, "duplicate prompts", len(sources.prompts) - len(distinct))
        if len(sources.evaluation_prompts):
            _count(plan.set_aside, "prompts among the held-out ones", len(held))
    _count(plan.set_aside, "prompts beyond max_prompts", len(free) - len(train))
    if collects(recipe):
        plan.prompts["collect"] = _collect_prompts(plan, free, recipe)


def _set_selection_prompts_aside(plan: Plan, free: Part, config: DataConfig) -> Part:
    """Makes `prompts.validation`, which chooses a checkpoint; returns the prompts to train on."""
    sides = plan.sides.of(free.table.group[free.rows])
    validation, train = _partition(free, sides == Side.VALIDATION)
    if not len(train) or not len(validation):
        plan.notes.append(
            "too few prompts to choose the policy's checkpoint by prompts of its own: the last one "
            "stays; a higher data.validation_share, or more prompts, would give some"
        )
        return free
    plan.prompts["validation"] = _capped(plan, "prompts.validation", validation, config)
    return train


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


def _check_filled(kind: str, splits: dict[str, Part]) -> None:
    for name, part in splits.items():
        if not len(part):
            raise DataError(
                f"no {kind} are left for the {name} split: too few different prompts, or the "
                f"evaluation prompts cover them; give rows of at least {len(splits)} other prompts"
            )


def _capped(plan: Plan, split: str, part: Part, config: DataConfig, remedy: str = "") -> Part:
    """At most as many rows as the recipe allows; the surplus and a lack are told."""
    kind, _, side = split.partition(".")
    key = "evaluation_rows" if side == "test" else "validation_rows"
    most = getattr(config, key)
    drawn = part.drawn(most, side)
    what = "held-out" if side == "test" else side
    _count(plan.set_aside, f"{what} {kind} beyond {key}", len(part) - len(drawn))
    if len(drawn) < most:
        plan.notes.append(
            f"{split} has {len(drawn)} rows, not the {most} of data.{key}: "
            + (remedy or f"a higher data.{side}_share holds out more")
        )
    return drawn


def _partition(part: Part, marks: Marks) -> tuple[Part, Part]:
    """Rows that are marked, and the others."""
    return part.only(marks), part.only(~marks)


def whole(table: RowTable) -> Part:
    """All rows of a table, in order."""
    return Part(table, np.arange(len(table), dtype=np.int64))


def _count(counter: Counter[str], reason: str, rows: int) -> None:
    if rows:
        counter[reason] += rows
