"""Collecting preferences: two samples a prompt from the SFT model, an annotator chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.artifacts import write_jsonl
from amenable.data.formats.native import preference_to_row
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Prompt
from amenable.errors import StageError
from amenable.models.build import Foundation
from amenable.ranks.group import rank
from amenable.rollout.annotators import Annotator, Shown, open_annotator
from amenable.rollout.transformers_engine import engine_for
from amenable.rollout.types import Request, Sampling

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.config.recipe import Recipe
    from amenable.data.render import Renderer
    from amenable.rollout.types import Engine

_PROMPTS_BETWEEN_LOOKS = 64  # at the clock, where there is a time budget


def run(ctx: StageContext) -> dict[str, Any]:
    """The `collect` stage: prompts to `data/preferences.*.jsonl`.

    Of several ranks all sample, and the first has the choices made.
    """
    recipe, data = ctx.recipe, ctx.folder.data
    annotator = open_annotator(ctx) if rank() == 0 else None
    if annotator is not None:
        ctx.progress.say(f"collect: {annotator.describe()}")
    prompts = open_prompts(data / "prompts.collect.jsonl")
    held_out = open_prompts(data / "prompts.test.jsonl")
    validation = min(recipe.data.validation_rows, len(prompts) // 4)
    splits = {
        "validation": prompts[:validation],
        "train": prompts[validation:],
        "test": held_out,
    }
    pairs = sample_pairs(ctx, _interleaved(list(splits.values())))
    return {} if annotator is None else _chosen(ctx, annotator, splits, pairs)


def _chosen(
    ctx: StageContext,
    annotator: Annotator,
    splits: Mapping[str, Sequence[Prompt]],
    pairs: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """The annotator chooses between the samples of each prompt; the rows are written."""
    counts = {
        split: write_choices(
            ctx.folder.data / f"preferences.{split}.jsonl",
            annotator,
            [(prompt, *pairs[prompt.id]) for prompt in own if prompt.id in pairs],
        )
        for split, own in splits.items()
    }
    if not counts["train"] or not counts["validation"] or not counts["test"]:
        raise StageError(
            "for every prompt of a split the two samples were equal or empty, or the judge was in "
            "doubt: nothing to choose from; raise collect.temperature or collect.pairs"
        )
    same = sum(not usable(*pair) for pair in pairs.values())
    doubtful = len(pairs) - same - sum(counts.values())
    ctx.progress.say(
        f"collect: {sum(counts.values())} pairs, {same} prompts with equal samples left out"
        + (f", {doubtful} of which the judge was in doubt" if doubtful else "")
    )
    return {
        "pairs": counts,
        "equal_samples": same,
        "simulated": ctx.recipe.collect.annotator == "simulated",
        "annotator": annotator.describe(),
        **annotator.figures(),
    }


def _interleaved(splits: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """All prompts, so ordered that every beginning holds the same share of each split."""
    placed = [(i / len(own), n, i) for n, own in enumerate(splits) for i in range(len(own))]
    return [splits[n][i] for _, n, i in sorted(placed)]


def sample_pairs(ctx: StageContext, prompts: Sequence[Prompt]) -> dict[str, tuple[str, str]]:
    """Two completions of each prompt, by its id; from the SFT model, or the base without one.

    The second one is of `collect.other`, where the recipe names another model. When the stage's
    time is up, the prompts that are left go without.
    """
    recipe = ctx.recipe
    foundation = Foundation.open(recipe)
    renderer, sft = foundation.renderer, ctx.folder.models / "sft"
    own = engine_for(sft if sft.is_dir() else foundation.source, foundation)
    sources: list[tuple[Engine, Renderer, tuple[int, ...]]] = [(own, renderer, (0, 1))]
    if recipe.collect.other:
        sources = [(own, renderer, (0,)), (*_other(recipe), (1,))]
    sampling = Sampling(
        max_new_tokens=recipe.data.max_completion_tokens, temperature=recipe.collect.temperature
    )
    size = len(prompts) if math.isinf(ctx.deadline.remaining_s()) else _PROMPTS_BETWEEN_LOOKS
    pairs: dict[str, tuple[str, str]] = {}
    with ctx.progress.track(2 * len(prompts), "collect: samples") as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            texts: list[list[str]] = [[] for _ in part]
            for engine, speaks, numbers in sources:
                requests = [
                    Request(tuple(speaks.prompt_ids(asked)), (recipe.seed, "collect", asked.id, k))
                    for asked in part
                    for k in numbers
                ]
                rollouts = engine.generate(requests, sampling, on_progress=bar.advance)
                for number, rollout in enumerate(rollouts):
                    text = speaks.completion_text(rollout.completion_ids)
                    texts[number // len(numbers)].append(text)
            for prompt, (first, second) in zip(part, texts, strict=True):
                pairs[prompt.id] = (first, second)
            if ctx.deadline.exceeded():
                break
    return pairs


def _other(recipe: Recipe) -> tuple[Engine, Renderer]:
    """The model that gives the second candidates, with its own tokenizer and template.

    Raises:
        ModelError: it cannot be loaded.
    """
    model = replace(recipe.model, base=recipe.collect.other)
    foundation = Foundation.open(replace(recipe, model=model))
    return engine_for(foundation.source, foundation), foundation.renderer


def usable(first: str, second: str) -> bool:
    """Two texts that differ, both with something in them."""
    return first != second and bool(first) and bool(second)


def write_choices(path: Path, annotator: Annotator, pairs: Sequence[Shown]) -> int:
    """Let the annotator choose and write the rows; pairs of equal or empty texts are left out.

    Returns:
        Number of rows written.
    """
    shown = [pair for pair in pairs if usable(*pair[1:])]
    chosen = annotator.choose_all(shown)
    rows = [row for prompt, _, _ in shown if (row := chosen[prompt.id]) is not None]
    write_jsonl(path, [preference_to_row(row) for row in rows])
    return len(rows)
