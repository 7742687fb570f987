"""The `data` stage: rows of every kind, checked, split by prompt, written for all later stages.

It runs before any weight is loaded; only the tokenizer is asked. Nothing of a held-out prompt stays
in any training split, whatever the kind of row. A split without rows has no file. Rows are a
stream: their texts go through files, and what the decisions need stays in memory as columns of
numbers.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from amenable.artifacts import StageContext, storage_errors, write_json
from amenable.config.data import DataConfig
from amenable.config.needs import collects
from amenable.data.annotator import reference_of
from amenable.data.content.statistics import length_summary
from amenable.data.docstrings import harvest, harvest_fingerprint
from amenable.data.plan import Part, Plan, Sources, make_plan
from amenable.data.quality import quality, refuse, warnings
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.reading.records import DroppingLog, ReadLog, Row
from amenable.data.reading.sources import without_secrets
from amenable.data.row_file import write_lines
from amenable.data.row_table import CHOICES, TEXTS, RowTable, read_table
from amenable.data.schemas import Demonstration, Preference, Prompt
from amenable.errors import DataError

__all__ = ["SPLITS", "collects", "load", "report", "run", "summary"]

Json = dict[str, Any]
T = TypeVar("T", Prompt, Demonstration, Preference)

SPLITS = (
    "demonstrations.train",
    "demonstrations.validation",
    "preferences.train",
    "preferences.validation",
    "preferences.test",
    "prompts.train",
    "prompts.validation",
    "prompts.collect",
    "prompts.test",
)
"""Files of `data/`, without `.jsonl`."""

KINDS = ("demonstrations", "preferences", "prompts", "evaluation_prompts")
"""What a recipe names files of."""

SPOOL = ".reading"
"""Folder within `data/` for the rows on their way; gone when the stage ends."""


def run(ctx: StageContext) -> Json:
    """Writes `data/*.jsonl` and `data/report.json`; returns the counts for `summary.json`.

    The old splits stay as they are until all new ones are on the disk.

    Raises:
        DataError: a file or row is faulty, there are too few different prompts to split, or
            training on the rows would certainly fail; what was found is then in `report.json`.
        StorageError: the disk is full or not writable.
    """
    data, path = ctx.folder.data, ctx.folder.data / "report.json"
    with _spool(data / SPOOL) as spool:
        simulated = ctx.recipe.collect.annotator == "simulated"
        sources = load(ctx.recipe.data, spool, needs_references=simulated)
        plan = make_plan(sources, ctx.recipe)
        told, counts = report(sources, plan), summary(plan)
        for name in _filled(plan):
            write_lines(spool / "new" / f"{name}.jsonl", plan.splits[name].lines())
        _replace_splits(spool / "new", data)
    write_json(path, told)  # of these splits, should the look at them be cut off
    found = quality(data, _filled(plan), ctx.recipe.data, ctx.open_renderer)
    write_json(path, {**told, **found})
    for reason, count in sources.dropped.most_common():
        ctx.progress.say(f"data: {count} records left out of {reason}")
    for note in plan.notes:
        ctx.progress.say(f"data: {note}")
    for warning in warnings(found):
        ctx.progress.say(f"data: {warning}")
    refuse(found)
    return counts


def load(config: DataConfig, spool: Path, *, needs_references: bool = False) -> Sources:
    """Reads the recipe's files, or harvests the built-in task.

    Args:
        config: what to read, and what a faulty row means.
        spool: a folder for the rows; needed as long as the result is used.
        needs_references: whether a prompt without the author's line is at fault, because the
            simulated annotator will score answers to it.

    Raises:
        DataError: a file or row is faulty, nothing is named, or no row of a kind is left.
        StorageError: the disk is full or not writable.
    """
    logs: dict[str, ReadLog] = {}

    def log_of(kind: str) -> ReadLog:
        return logs.setdefault(kind, DroppingLog() if config.on_error == "drop" else ReadLog())

    def read(kind: str, rows: Iterable[tuple[Row | None, T]]) -> RowTable:
        table = read_table(spool / f"{kind}.jsonl", rows, log_of(kind))
        if getattr(config, kind, ()) and not len(table):
            raise _none_left(kind, log_of(kind))
        return table

    def asked_in(kind: str) -> Iterator[tuple[Row, Prompt]]:
        rows = iter_prompts(getattr(config, kind), log_of(kind))
        return _with_references(rows, log_of(kind)) if needs_references else rows

    origin: Json = {"task": config.task}
    if config.task == "docstrings":
        harvested = ((None, row) for row in harvest(config.max_words))
        demonstrations = read("harvested", harvested)
        del logs["harvested"]  # nothing was read from a file
        origin["packages"] = harvest_fingerprint()
    else:
        rows = iter_demonstrations(config.demonstrations, log_of("demonstrations"))
        demonstrations = read("demonstrations", rows)
    origin["files"] = {
        kind: [without_secrets(name) for name in getattr(config, kind).files] for kind in KINDS
    }
    pairs = iter_preferences(config.preferences, log_of("preferences"))
    preferences = read("preferences", pairs)
    given = read("prompts", asked_in("prompts"))
    prompts, prompts_from = _prompts(given, demonstrations, preferences)
    return Sources(
        demonstrations=demonstrations,
        preferences=preferences,
        prompts=prompts,
        prompts_from=prompts_from,
        evaluation_prompts=read("evaluation_prompts", asked_in("evaluation_prompts")),
        origin=origin,
        reading={kind: _met(log) for kind, log in logs.items() if getattr(config, kind)},
        dropped=Counter(
            {f"{kind}: {why}": n for kind, log in logs.items() for why, n in log.dropped.items()}
        ),
    )


def _with_references(
    rows: Iterable[tuple[Row, Prompt]], log: ReadLog
) -> Iterator[tuple[Row, Prompt]]:
    """The same rows; the log is told of those without the author's line, which are left out.

    Raises:
        DataError: there is such a row, and the log fails.
    """
    for row, prompt in rows:
        try:
            reference_of(prompt)
        except DataError as error:
            log.fault(row.fault(error.field, error.reason), row.values)
            log.rows -= 1
        else:
            yield row, prompt


def summary(plan: Plan) -> Json:
    """Row counts, the `data` section of `summary.json`."""
    prompts = plan.prompts
    return {
        "demonstrations": sum(map(len, plan.demonstrations.values())),
        "preferences": sum(map(len, plan.preferences.values())),
        "prompts": len(prompts["train"]) + len(prompts["test"]),
        "dropped": plan.dropped.total(),
        "set_aside": plan.set_aside.total(),
        "splits": {name: len(part) for name, part in plan.splits.items()},
    }


def report(sources: Sources, plan: Plan) -> Json:
    """What there is to know about the data, `data/report.json`. Lengths are in words."""
    preferences = sources.preferences
    choices, counts = np.unique(preferences.choice, return_counts=True)
    return {
        **summary(plan),
        "source": sources.origin,
        "prompts_from": sources.prompts_from,
        "reading": sources.reading,
        "read": {
            "demonstrations": len(sources.demonstrations),
            "preferences": len(preferences),
            "prompts": len(sources.prompts),
            "evaluation_prompts": len(sources.evaluation_prompts),
        },
        "dropped": dict(plan.dropped),
        "set_aside": dict(plan.set_aside),
        "duplicate_preferences": len(preferences) - len(np.unique(preferences.content)),
        "equal_candidates": int(preferences.equal.sum()),
        "choices": {
            str(CHOICES[choice].value): count
            for choice, count in zip(choices.tolist(), counts.tolist(), strict=True)
        },
        "splits": {name: _describe(part) for name, part in plan.splits.items()},
        "notes": plan.notes,
    }


def _none_left(kind: str, log: ReadLog) -> DataError:
    """Files are named, but give nothing: other rows in their place would be a guess."""
    reasons = "; ".join(f"{count} times: {why}" for why, count in log.dropped.most_common(3))
    return DataError(
        f"no row of data.{kind} is left ({reasons or 'nothing was read'}); mend the rows or "
        "remove the key"
    )


def _met(log: ReadLog) -> Json:
    """What the reading of one kind of row met."""
    return {
        "records": log.records,
        "rows": log.rows,
        "dropped": dict(log.dropped),
        "coerced": dict(log.coerced),
        "examples": [without_secrets(text) for text in getattr(log, "examples", ())],
        "formats": {without_secrets(file): name for file, name in log.formats.items()},
    }


def _prompts(
    prompts: RowTable, demonstrations: RowTable, preferences: RowTable
) -> tuple[RowTable, str]:
    """The recipe's prompts, else the demonstrations' with their outputs, else the preferences'."""
    if len(prompts):
        return prompts, "prompts"
    if len(demonstrations):  # the line of a demonstration is that of such a prompt
        return demonstrations, "demonstrations"
    if len(preferences):
        return preferences.prompts_of_preferences(), "preferences"
    raise DataError(
        "the recipe names no data; name files in data.prompts, data.preferences or "
        'data.demonstrations, or set data.task = "docstrings"'
    )


def _describe(part: Part) -> Json:
    """Rows, groups and the lengths in words of each text of one split."""
    words = part.table.words[part.rows]
    return {
        "rows": len(part),
        "groups": len(np.unique(part.table.group[part.rows])),
        "words": {
            name: _percentiles(words[:, column])
            for column, name in enumerate(TEXTS)
            if (words[:, column] >= 0).all()
        },
    }


def _percentiles(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> Json:
    """Nearest-rank percentiles; empty for no lengths."""
    found = length_summary(lengths)
    return {name: found[name] for name in ("min", "p10", "p50", "p90", "p99", "max") if found}


def _filled(plan: Plan) -> list[str]:
    """The splits that have rows, in the order of `SPLITS`."""
    return [name for name in SPLITS if plan.splits.get(name)]


def _replace_splits(new: Path, data: Path) -> None:
    """Renames each split over the old one, and removes those that are no more."""
    for name in SPLITS:
        path = data / f"{name}.jsonl"
        with storage_errors(path):
            if (new / path.name).exists():
                (new / path.name).replace(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _spool(path: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; what a killed stage left goes first."""
    with storage_errors(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
