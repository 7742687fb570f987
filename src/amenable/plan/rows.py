"""How long a run's rows are and how many each split will have.

Measured where there is something to measure: on the run folder's splits, else on the recipe's
files; the rest follows from the recipe's limits. What was done is told with the forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from amenable.config.needs import collects, needs_preferences, selects_by
from amenable.config.recipe import Recipe
from amenable.data.reading.read_log import DroppingLog
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.row_file import open_demonstrations, open_preferences, open_prompts
from amenable.data.schemas import Demonstration, Preference, Prompt
from amenable.errors import DataError

if TYPE_CHECKING:
    from amenable.data.render import Renderer

Row = Demonstration | Preference | Prompt
Lengths = tuple[int, ...]
"""Tokens of a prompt and of each completion that the row has."""

MEASURED_ROWS = 200
_COUNTED_ROWS = 50_000
_CHARACTERS_A_TOKEN = 4
_TEMPLATE = 20  # tokens that a chat template adds
_ASSUMED_ROWS = 1000
_TASK_ROWS = 2350  # of the built-in task, at 36 words; more words, more rows
_TASK_TOKENS_A_WORD = 1.25


@dataclass(frozen=True)
class Rows:
    """What the forecast knows of the data."""

    lengths: dict[str, list[Lengths]]
    """By kind of row (`demonstrations`, `preferences`, `prompts`): a sample of its rows."""

    counts: dict[str, int]
    """Rows by split, named as its file: `prompts.train`."""

    origin: str
    """Where both come from, for the reader."""

    def __getitem__(self, split: str) -> int:
        return self.counts.get(split, 0)

    @property
    def completions(self) -> list[int]:
        """Tokens of single completions, end of sequence included."""
        rows = [*self.lengths.get("demonstrations", ()), *self.lengths.get("preferences", ())]
        return [tokens for row in rows for tokens in row[1:]]


def rows_of(recipe: Recipe, renderer: Renderer | None, data: Path | None = None) -> Rows:
    """The rows of a recipe.

    Args:
        recipe: whose data.
        renderer: counts tokens; None: a token is taken to have four characters.
        data: the `data/` of a run folder, read where it has splits.

    Raises:
        DataError: the run folder's splits are damaged.
    """
    size = partial(_tokens, renderer, recipe)
    how = "tokenized" if renderer is not None else "at four characters a token"
    if data is not None and (data / "prompts.train.jsonl").is_file():
        return _of_folder(recipe, data, size, how)
    if recipe.data.task == "docstrings":
        lengths, read = _of_task(recipe)
        origin = "the built-in task's usual lengths; a run folder with data has the exact ones"
    else:
        try:
            lengths, read = _of_files(recipe, size)
            shown = min(MEASURED_ROWS, max(read.values(), default=0))
            origin = f"the recipe's files, up to {shown} rows of a kind {how}"
        except DataError as error:
            lengths, read = _longest(recipe)
            origin = f"{_ASSUMED_ROWS} rows of a kind of the recipe's longest lengths: {error}"
    return Rows(_completed(recipe, lengths), _splits(recipe, read), origin)


def _texts(row: Row) -> tuple[str, ...]:
    """The completions that a row brings."""
    if isinstance(row, Demonstration):
        return (row.output_text,)
    return (row.candidate_0, row.candidate_1) if isinstance(row, Preference) else ()


def _tokens(renderer: Renderer | None, recipe: Recipe, row: Row) -> Lengths:
    prompt, texts = row if isinstance(row, Prompt) else row.prompt, _texts(row)
    if renderer is not None:
        ids = [renderer.prompt_ids(prompt), *map(renderer.completion_ids, texts)]
        return tuple(map(len, ids))
    data = recipe.data
    turns = sum(len(message.content) for message in prompt.messages) + len(data.instruction)
    answers = [math.ceil(len(text) / _CHARACTERS_A_TOKEN) + 1 for text in texts]
    return (
        min(data.max_prompt_tokens, math.ceil(turns / _CHARACTERS_A_TOKEN) + _TEMPLATE),
        *(min(data.max_completion_tokens, tokens) for tokens in answers),
    )


def _of_folder(recipe: Recipe, data: Path, size: Callable[[Row], Lengths], how: str) -> Rows:
    openers: dict[str, Callable[[Path], Sequence[Row]]] = {
        "demonstrations": open_demonstrations,
        "preferences": open_preferences,
        "prompts": open_prompts,
    }
    lengths: dict[str, list[Lengths]] = {}
    counts: dict[str, int] = {}
    for kind, opened in openers.items():
        for path in sorted(data.glob(f"{kind}.*.jsonl")):
            rows = opened(path)
            counts[path.stem] = len(rows)
            if path.stem == f"{kind}.train":
                lengths[kind] = [size(row) for row in rows[:MEASURED_ROWS]]
    origin = f"{data}, up to {max(map(len, lengths.values()))} rows of a kind {how}"
    return Rows(_completed(recipe, lengths), _to_collect(recipe, counts) | counts, origin)


def _of_files(
    recipe: Recipe, size: Callable[[Row], Lengths]
) -> tuple[dict[str, list[Lengths]], dict[str, int]]:
    """Lengths of the first rows, and numbers of rows up to a limit, of each kind of file."""
    data, lengths, read = recipe.data, {}, {}
    readers: dict[str, Callable[[], Iterator[tuple[object, Row]]]] = {
        "demonstrations": lambda: iter_demonstrations(data.demonstrations, DroppingLog()),
        "preferences": lambda: iter_preferences(data.preferences, DroppingLog()),
        "prompts": lambda: iter_prompts(data.prompts, DroppingLog()),
        "evaluation_prompts": lambda: iter_prompts(data.evaluation_prompts, DroppingLog()),
    }
    for kind, opened in readers.items():
        if getattr(data, kind):
            rows = (row for _, row in islice(opened(), _COUNTED_ROWS))
            lengths[kind] = [size(row) for row in islice(rows, MEASURED_ROWS)]
            read[kind] = len(lengths[kind]) + sum(1 for _ in rows)
    return lengths, read


def _of_task(recipe: Recipe) -> tuple[dict[str, list[Lengths]], dict[str, int]]:
    """Explanations of 12 to `data.max_words` words and summaries of 4 to 14, evenly spread."""
    data = recipe.data
    steps = [step / 19 for step in range(20)]

    def tokens(words: float, more: int, most: int) -> int:
        return min(most, round(words * _TASK_TOKENS_A_WORD) + more)

    prompts = [
        tokens(12 + step * (data.max_words - 12), _TEMPLATE, data.max_prompt_tokens)
        for step in steps
    ]
    answers = [tokens(4 + step * 10, 2, data.max_completion_tokens) for step in steps]
    mixed = [(prompt, answers[7 * n % 20]) for n, prompt in enumerate(prompts)]
    count = round(_TASK_ROWS * min(1.8, data.max_words / 36))
    return {"demonstrations": list(mixed)}, {"demonstrations": count}


def _longest(recipe: Recipe) -> tuple[dict[str, list[Lengths]], dict[str, int]]:
    """Of every kind that the recipe names."""
    data = recipe.data
    prompt, answer = data.max_prompt_tokens, data.max_completion_tokens
    rows: dict[str, list[Lengths]] = {
        "demonstrations": [(prompt, answer)],
        "preferences": [(prompt, answer, answer)],
        "prompts": [(prompt,)],
    }
    named = {kind: row for kind, row in rows.items() if getattr(data, kind)}
    return named, dict.fromkeys(named, _ASSUMED_ROWS)


def _completed(recipe: Recipe, lengths: dict[str, list[Lengths]]) -> dict[str, list[Lengths]]:
    """Every kind that a stage needs, made of the others where it is not there yet."""
    given = next(rows for rows in lengths.values() if rows)
    prompts = lengths.get("prompts") or [row[:1] for row in given]
    answers = [row[1] for row in lengths.get("demonstrations") or given if len(row) > 1]
    answers = answers or [recipe.data.max_completion_tokens]
    found = {"prompts": [row[:1] for row in prompts]}
    if lengths.get("demonstrations"):
        found["demonstrations"] = lengths["demonstrations"]
    if needs_preferences(recipe):
        found["preferences"] = lengths.get("preferences") or [
            (row[0], answers[n % len(answers)], answers[(n + 1) % len(answers)])
            for n, row in enumerate(prompts)
        ]
    return found


def _splits(recipe: Recipe, read: dict[str, int]) -> dict[str, int]:
    """Rows of each split as shares and limits make them, groups apart."""
    data = recipe.data
    asked = read.get("prompts") or read.get("demonstrations") or read.get("preferences") or 0
    named = read.get("evaluation_prompts", 0)
    test = named or round(data.test_share * asked)
    train = asked if named else asked - test
    counts = {"prompts.test": max(1, min(test, data.evaluation_rows)), "prompts.train": train}
    held = {"validation": data.validation_share, "test": 0.0 if named else data.test_share}
    for kind in ("demonstrations", "preferences"):
        count = read.get(kind, 0)
        if count:
            rest = count * (1 - sum(held.values()))
            counts[f"{kind}.train"] = _limited(rest, getattr(data, f"max_{kind}"))
            counts[f"{kind}.validation"] = _limited(
                max(1, count * held["validation"]), data.validation_rows
            )
            counts[f"{kind}.test"] = _limited(max(1, count * held["test"]), data.evaluation_rows)
    if selects_by(recipe):
        chosen = round(data.validation_share * asked)
        counts["prompts.validation"] = _limited(chosen, data.validation_rows)
        train -= chosen
    counts["prompts.train"] = _limited(train, data.max_prompts)
    if collects(recipe):
        wanted = recipe.collect.pairs + data.validation_rows
        counts["prompts.collect"] = min(wanted, max(1, train))
        counts |= _to_collect(recipe, counts)
    return counts


def _to_collect(recipe: Recipe, counts: dict[str, int]) -> dict[str, int]:
    """The pairs that the collect stage will write: one a prompt, where two samples differ."""
    prompts = counts.get("prompts.collect", 0)
    if not prompts:
        return {}
    validation = min(recipe.data.validation_rows, prompts // 4)
    return {
        "preferences.validation": validation,
        "preferences.train": prompts - validation,
        "preferences.test": counts["prompts.test"],
    }


def _limited(rows: float, most: int) -> int:
    return round(min(rows, most) if most else rows)
