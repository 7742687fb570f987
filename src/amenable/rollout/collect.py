"""Collecting preferences: two samples a prompt from the SFT model, an annotator chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.artifacts import write_jsonl
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.formats.native import PREFERENCE_KEYS, preference_to_row
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Preference, Prompt
from amenable.errors import StageError
from amenable.models.build import Foundation
from amenable.rollout.transformers_engine import engine_for
from amenable.rollout.types import Request, Sampling

if TYPE_CHECKING:
    from amenable.artifacts import StageContext

_PROMPTS_BETWEEN_LOOKS = 64  # at the clock, where there is a time budget


def run(ctx: StageContext) -> dict[str, Any]:
    """The `collect` stage: prompts to `data/preferences.*.jsonl`."""
    recipe, data = ctx.recipe, ctx.folder.data
    annotator = SimulatedAnnotator(recipe.collect, recipe.seed)
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
    counts = {
        split: write_choices(
            data / f"preferences.{split}.jsonl",
            annotator,
            [(prompt, *pairs[prompt.id]) for prompt in own if prompt.id in pairs],
        )
        for split, own in splits.items()
    }
    if not counts["train"] or not counts["validation"] or not counts["test"]:
        raise StageError(
            "the two samples were equal or empty for every prompt of a split: nothing to choose "
            "from; raise collect.temperature or collect.pairs"
        )
    same = len(pairs) - sum(counts.values())
    ctx.progress.say(
        f"collect: {sum(counts.values())} pairs, {same} prompts with equal samples left out"
    )
    return {
        "pairs": counts,
        "equal_samples": same,
        "simulated": True,
        "annotator": annotator.describe(),
    }


def _interleaved(splits: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """All prompts, so ordered that every beginning holds the same share of each split."""
    placed = [(i / len(own), n, i) for n, own in enumerate(splits) for i in range(len(own))]
    return [splits[n][i] for _, n, i in sorted(placed)]


def sample_pairs(ctx: StageContext, prompts: Sequence[Prompt]) -> dict[str, tuple[str, str]]:
    """Two completions of each prompt, by its id; from the SFT model, or the base without one.

    When the stage's time is up, the prompts that are left go without.
    """
    recipe = ctx.recipe
    foundation = Foundation.open(recipe)
    renderer, sft = foundation.renderer, ctx.folder.models / "sft"
    engine = engine_for(sft if sft.is_dir() else foundation.source, foundation)
    sampling = Sampling(
        max_new_tokens=recipe.data.max_completion_tokens, temperature=recipe.collect.temperature
    )
    size = len(prompts) if math.isinf(ctx.deadline.remaining_s()) else _PROMPTS_BETWEEN_LOOKS
    pairs: dict[str, tuple[str, str]] = {}
    with ctx.progress.track(2 * len(prompts), "collect: samples") as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            requests = [
                Request(tuple(renderer.prompt_ids(prompt)), (recipe.seed, "collect", prompt.id, k))
                for prompt in part
                for k in range(2)
            ]
            rollouts = engine.generate(requests, sampling, on_progress=bar.advance)
            texts = [renderer.completion_text(rollout.completion_ids) for rollout in rollouts]
            for prompt, first, second in zip(part, texts[::2], texts[1::2], strict=True):
                pairs[prompt.id] = (first, second)
            if ctx.deadline.exceeded():
                break
    return pairs


def write_choices(
    path: Path,
    annotator: SimulatedAnnotator,
    pairs: Sequence[tuple[Prompt, str, str]],
) -> int:
    """Let the annotator choose and write the rows; pairs of equal or empty texts are left out.

    Returns:
        Number of rows written.
    """
    rows = [
        Preference(
            prompt=_without_judgement(prompt),
            candidate_0=first,
            candidate_1=second,
            choice=annotator.choose(prompt, first, second, key=prompt.id),
            annotator="simulated",
        )
        for prompt, first, second in pairs
        if first != second and first and second
    ]
    write_jsonl(path, [preference_to_row(row) for row in rows])
    return len(rows)


def _without_judgement(prompt: Prompt) -> Prompt:
    """The prompt without what a file of preferences said of it: another pair is judged now."""
    kept = {key: value for key, value in prompt.meta.items() if key not in PREFERENCE_KEYS}
    return replace(prompt, meta=kept)
