"""The `data` stage: rows of every kind, checked, split by prompt, written for all later stages.

It runs before any weight is loaded and imports no torch. Nothing of a held-out prompt stays in any
training split, whatever the kind of row. A split without rows has no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from amenable.artifacts import StageContext, storage_errors, write_json, write_jsonl
from amenable.config.data import DataConfig
from amenable.config.recipe import Recipe
from amenable.data.annotator import reference_of
from amenable.data.docstrings import harvest, harvest_fingerprint
from amenable.data.readers import (
    demonstration_to_row,
    preference_to_row,
    prompt_key,
    prompt_to_row,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from amenable.data.schemas import Demonstration, Preference, Prompt
from amenable.data.splits import TEST_SHARE, VALIDATION_SHARE, draw, hold_out, linked_groups
from amenable.errors import DataError

Json = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R", Demonstration, Preference)

SPLITS = (
    "demonstrations.train",
    "demonstrations.validation",
    "preferences.train",
    "preferences.validation",
    "preferences.test",
    "prompts.train",
    "prompts.collect",
    "prompts.test",
)
"""Files of `data/`, without `.jsonl`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything that was read or harvested, before it is split."""

    demonstrations: list[Demonstration]
    preferences: list[Preference]
    prompts: list[Prompt]
    prompts_from: str
    """Which rows the prompts are: `prompts`, `demonstrations` or `preferences`."""

    evaluation_prompts: list[Prompt]
    origin: Json
    """Files, or packages and versions."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """The splits as they are decided, and what there is to tell about them."""

    joint: dict[str, str]
    """Joint group of every group: rows of one prompt belong together under whatever name."""

    held: set[str] = field(default_factory=set)
    """Joint groups that no training split may hold."""

    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    preferences: dict[str, list[Preference]] = field(default_factory=dict)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)

    dropped: Counter[str] = field(default_factory=Counter)
    """Rows in no split because they add nothing: exact duplicates."""

    set_aside: Counter[str] = field(default_factory=Counter)
    """Good rows in no split: their prompt is held out, or a limit of the recipe is reached."""

    notes: list[str] = field(default_factory=list)

    def side(self, prompt: Prompt) -> str:
        """What decides the prompt's split."""
        return self.joint[prompt.group]

    def is_held(self, prompt: Prompt) -> bool:
        """Whether the prompt may not be trained on."""
        return self.side(prompt) in self.held

    def hold(self, prompts: Iterable[Prompt]) -> None:
        """Keeps these prompts, and all of their groups, out of every training split."""
        self.held.update(self.side(prompt) for prompt in prompts)

    def rows(self) -> dict[str, list[Json]]:
        """The rows of each split, as they are written."""
        splits: dict[str, list[Json]] = {}
        for name, demonstrations in self.demonstrations.items():
            splits[f"demonstrations.{name}"] = [*map(demonstration_to_row, demonstrations)]
        for name, preferences in self.preferences.items():
            splits[f"preferences.{name}"] = [*map(preference_to_row, preferences)]
        for name, prompts in self.prompts.items():
            splits[f"prompts.{name}"] = [*map(prompt_to_row, prompts)]
        return splits

    def note_short(self, split: str, rows: int, key: str, wanted: int) -> None:
        """Tells of a split that has fewer rows than the recipe asks."""
        if rows < wanted:
            self.notes.append(
                f"{split} has {rows} rows, not the {wanted} of data.{key}: there are too few "
                "different prompts to hold out more"
            )


def run(ctx: StageContext) -> Json:
    """Writes `data/*.jsonl` and `data/report.json`; returns the counts for `summary.json`.

    Raises:
        DataError: a file or row is faulty, or there are too few different prompts to split.
        StorageError: the disk is full or not writable.
    """
    sources = load(ctx.recipe.data)
    plan = make_plan(sources, ctx.recipe)
    rows = plan.rows()
    for name in SPLITS:
        path = ctx.folder.data / f"{name}.jsonl"
        if rows.get(name):
            write_jsonl(path, rows[name])
        else:
            with storage_errors(path):
                path.unlink(missing_ok=True)
    write_json(ctx.folder.data / "report.json", report(sources, plan))
    for note in plan.notes:
        ctx.progress.say(f"data: {note}")
    return summary(plan)


def load(config: DataConfig) -> Sources:
    """Reads the recipe's files, or harvests the built-in task.

    Raises:
        DataError: a file or row is faulty, or nothing is named.
    """
    origin: Json = {"task": config.task}
    if config.task == "docstrings":
        demonstrations = harvest(config.max_words)
        origin["packages"] = harvest_fingerprint()
    else:
        demonstrations = read_demonstrations(config.demonstrations)
    kinds = ("demonstrations", "preferences", "prompts", "evaluation_prompts")
    origin["files"] = {kind: list(getattr(config, kind)) for kind in kinds}
    preferences = read_preferences(config.preferences)
    prompts, prompts_from = _prompts(read_prompts(config.prompts), demonstrations, preferences)
    return Sources(
        demonstrations=demonstrations,
        preferences=preferences,
        prompts=prompts,
        prompts_from=prompts_from,
        evaluation_prompts=read_prompts(config.evaluation_prompts),
        origin=origin,
    )


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
    prompts = sources.prompts + sources.evaluation_prompts
    prompts += [row.prompt for row in sources.demonstrations]
    prompts += [row.prompt for row in sources.preferences]
    plan = Plan(joint=linked_groups((prompt.group, prompt_key(prompt)) for prompt in prompts))
    _plan_test_prompts(plan, sources, recipe.data)
    _plan_preferences(plan, sources.preferences, recipe)
    _plan_demonstrations(plan, sources.demonstrations, recipe)
    _plan_prompts(plan, sources, recipe)
    return plan


def collects(recipe: Recipe) -> bool:
    """Whether preferences are to be collected: a reward to train, an annotator, no file."""
    trains = recipe.reward.enabled and not recipe.policy.reward
    return trains and recipe.collect.annotator != "none" and not recipe.data.preferences


def summary(plan: Plan) -> Json:
    """Row counts, the `data` section of `summary.json`."""
    prompts = plan.prompts
    return {
        "demonstrations": sum(map(len, plan.demonstrations.values())),
        "preferences": sum(map(len, plan.preferences.values())),
        "prompts": len(prompts["train"]) + len(prompts["test"]),
        "dropped": plan.dropped.total(),
        "set_aside": plan.set_aside.total(),
        "splits": {name: len(rows) for name, rows in plan.rows().items()},
    }


def report(sources: Sources, plan: Plan) -> Json:
    """What there is to know about the data, `data/report.json`. Lengths are in words."""
    preferences = sources.preferences
    return {
        **summary(plan),
        "source": sources.origin,
        "prompts_from": sources.prompts_from,
        "read": {
            "demonstrations": len(sources.demonstrations),
            "preferences": len(preferences),
            "prompts": len(sources.prompts),
            "evaluation_prompts": len(sources.evaluation_prompts),
        },
        "dropped": dict(plan.dropped),
        "set_aside": dict(plan.set_aside),
        "duplicate_preferences": len(preferences) - len(_distinct(preferences, _judgement)),
        "equal_candidates": sum(row.candidate_0 == row.candidate_1 for row in preferences),
        "choices": dict(Counter(str(row.choice.value) for row in preferences)),
        "splits": {name: _describe(rows) for name, rows in plan.rows().items()},
        "notes": plan.notes,
    }


def _prompts(
    prompts: list[Prompt], demonstrations: list[Demonstration], preferences: list[Preference]
) -> tuple[list[Prompt], str]:
    """The recipe's prompts, else the demonstrations' with their outputs, else the preferences'."""
    if prompts:
        return prompts, "prompts"
    if demonstrations:
        return [_with_reference(row) for row in demonstrations], "demonstrations"
    if preferences:
        return [_without_strength(row.prompt) for row in preferences], "preferences"
    raise DataError(
        "the recipe names no data; name files in data.prompts, data.preferences or "
        'data.demonstrations, or set data.task = "docstrings"'
    )


def _with_reference(row: Demonstration) -> Prompt:
    return replace(row.prompt, meta={"output_text": row.output_text, **row.prompt.meta})


def _without_strength(prompt: Prompt) -> Prompt:
    meta = {key: value for key, value in prompt.meta.items() if key != "strength"}
    return replace(prompt, meta=meta)


def _plan_test_prompts(plan: Plan, sources: Sources, config: DataConfig) -> None:
    if sources.evaluation_prompts:
        candidates = _distinct(sources.evaluation_prompts, prompt_key)
        duplicates = len(sources.evaluation_prompts) - len(candidates)
        _count(plan.dropped, "duplicate evaluation prompts", duplicates)
    else:
        distinct = _distinct(sources.prompts, prompt_key)
        _, candidates = hold_out(distinct, config.evaluation_rows, plan.side, TEST_SHARE)
    if not candidates:
        raise DataError(
            "all prompts are one group, so that none can be held out for evaluation; add "
            "different prompts, or name data.evaluation_prompts"
        )
    test = draw(candidates, config.evaluation_rows, _prompt_id, "test")
    plan.prompts["test"] = test
    plan.hold(candidates)
    surplus = len(candidates) - len(test)
    _count(plan.set_aside, "held-out prompts beyond evaluation_rows", surplus)
    plan.note_short("prompts.test", len(test), "evaluation_rows", config.evaluation_rows)


def _plan_preferences(plan: Plan, rows: list[Preference], recipe: Recipe) -> None:
    if not rows:
        return
    config = recipe.data
    test, rest = _partition(rows, lambda row: plan.is_held(row.prompt))
    wanted = min(config.evaluation_rows, int(TEST_SHARE * len(rows)) or 1)
    rest, more = hold_out(rest, wanted - len(test), lambda row: plan.side(row.prompt), TEST_SHARE)
    plan.hold(row.prompt for row in more)
    free, validation = _hold_out_validation(plan, rest, config)
    train = draw(free, config.max_preferences, _row_id, f"{recipe.seed} preferences")
    plan.preferences = {
        "train": train,
        "validation": draw(validation, 0, _row_id, "validation"),
        "test": draw([*test, *more], 0, _row_id, "test"),
    }
    _count(plan.set_aside, "preferences beyond max_preferences", len(free) - len(train))
    _check_filled(plan, "preferences", plan.preferences, config)


def _plan_demonstrations(plan: Plan, rows: list[Demonstration], recipe: Recipe) -> None:
    if not rows:
        return
    config = recipe.data
    distinct = _distinct(rows, lambda row: (prompt_key(row.prompt), row.output_text))
    held, rest = _partition(distinct, lambda row: plan.is_held(row.prompt))
    free, validation = _hold_out_validation(plan, rest, config)
    train = draw(free, config.max_demonstrations, _row_id, f"{recipe.seed} demonstrations")
    plan.demonstrations = {
        "train": train,
        "validation": draw(validation, 0, _row_id, "validation"),
    }
    _count(plan.dropped, "duplicate demonstrations", len(rows) - len(distinct))
    _count(plan.set_aside, "demonstrations of held-out prompts", len(held))
    _count(plan.set_aside, "demonstrations beyond max_demonstrations", len(free) - len(train))
    _check_filled(plan, "demonstrations", plan.demonstrations, config)


def _hold_out_validation(plan: Plan, rows: list[R], config: DataConfig) -> tuple[list[R], list[R]]:
    """The training rows, and those that choose the best checkpoint."""
    return hold_out(
        rows, config.validation_rows, lambda row: plan.side(row.prompt), VALIDATION_SHARE
    )


def _plan_prompts(plan: Plan, sources: Sources, recipe: Recipe) -> None:
    distinct = _distinct(sources.prompts, prompt_key)
    held, free = _partition(distinct, plan.is_held)
    if not free:
        raise DataError(
            "every prompt is held out for evaluation, so that none is left to train on; add "
            "prompts whose text is not among the evaluation prompts"
        )
    train = draw(free, recipe.data.max_prompts, _prompt_id, f"{recipe.seed} prompts")
    plan.prompts["train"] = train
    if sources.prompts_from == "prompts":
        _count(plan.dropped, "duplicate prompts", len(sources.prompts) - len(distinct))
        if sources.evaluation_prompts:
            _count(plan.set_aside, "prompts among the held-out ones", len(held))
    _count(plan.set_aside, "prompts beyond max_prompts", len(free) - len(train))
    if collects(recipe):
        plan.prompts["collect"] = _collect_prompts(plan, free, recipe)
        for prompt in (*plan.prompts["test"], *free):
            reference_of(prompt)  # raises now, not after the SFT stage


def _collect_prompts(plan: Plan, free: list[Prompt], recipe: Recipe) -> list[Prompt]:
    """`collect.pairs + validation_rows` prompts, those that no training demonstration has first."""
    wanted = recipe.collect.pairs + recipe.data.validation_rows
    shown = {prompt_key(row.prompt) for row in plan.demonstrations.get("train", ())}
    drawn = draw(free, 0, _prompt_id, f"{recipe.seed} collect")
    again, fresh = _partition(drawn, lambda prompt: prompt_key(prompt) in shown)
    taken = [*fresh, *again][:wanted]
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


def _check_filled(plan: Plan, kind: str, splits: dict[str, list[T]], config: DataConfig) -> None:
    """Refuses a split that is empty although rows are asked for; notes one that is short."""
    keys = {"train": "", "validation": "validation_rows", "test": "evaluation_rows"}
    for name, rows in splits.items():
        wanted = getattr(config, keys[name]) if keys[name] else 1
        if wanted and not rows:
            remedy = " or set data.validation_rows = 0" if name == "validation" else ""
            raise DataError(
                f"no {kind} are left for the {name} split: too few different prompts, or the "
                f"evaluation prompts cover them; give rows of at least {len(splits)} other "
                f"prompts{remedy}"
            )
        plan.note_short(f"{kind}.{name}", len(rows), keys[name], wanted)


def _count(counter: Counter[str], reason: str, rows: int) -> None:
    if rows:
        counter[reason] += rows


def _distinct(rows: Sequence[T], key_of: Callable[[T], Hashable]) -> list[T]:
    """The first row of each key."""
    first: dict[Hashable, T] = {}
    for row in rows:
        first.setdefault(key_of(row), row)
    return list(first.values())


def _partition(rows: Sequence[T], test: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    """Rows that pass the test, and the others."""
    passed = [test(row) for row in rows]
    return (
        [row for row, passes in zip(rows, passed, strict=True) if passes],
        [row for row, passes in zip(rows, passed, strict=True) if not passes],
    )


def _prompt_id(prompt: Prompt) -> str:
    return prompt.id


def _row_id(row: Demonstration | Preference) -> str:
    return row.prompt.id


def _judgement(row: Preference) -> Hashable:
    return prompt_key(row.prompt), row.candidate_0, row.candidate_1, row.choice, row.annotator


def _describe(rows: list[Json]) -> Json:
    """Rows, groups and the lengths in words of each text of one split."""
    texts = {
        "prompt": [row.get("input_text") or row["messages"][-1]["content"] for row in rows],
        **{
            key: [row[key] for row in rows]
            for key in ("output_text", "candidate_0", "candidate_1")
            if all(isinstance(row.get(key), str) for row in rows)
        },
    }
    return {
        "rows": len(rows),
        "groups": len({row["group"] for row in rows}),
        "words": {key: _percentiles([len(text.split()) for text in texts[key]]) for key in texts},
    }


def _percentiles(lengths: list[int]) -> Json:
    """Nearest-rank percentiles; empty for no lengths."""
    ordered = sorted(lengths)
    percents = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    last = len(ordered) - 1
    return {name: ordered[round(last * p / 100)] for name, p in percents.items()} if ordered else {}
