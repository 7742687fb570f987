"""The `evaluate` stage: exported systems answer held-out prompts, judges score, pairs compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.artifacts import write_json, write_jsonl
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.collate import PromptGroup
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Prompt
from amenable.evaluate.generate import Answer, generate
from amenable.evaluate.side_by_side import compare
from amenable.evaluate.statistics import text_diversity
from amenable.models.build import Foundation
from amenable.models.export import load_reward_head
from amenable.rollout.rewards import open_rewards, score_groups
from amenable.rollout.transformers_engine import engine_for
from amenable.rollout.types import Engine, Sampling

if TYPE_CHECKING:
    from amenable.artifacts import StageContext

Answers = dict[str, list[Answer]]
Scores = dict[str, dict[str, list[float]]]  # judge -> system -> [prompts]

_SCORING_TOKENS = 2048
_FIRST_SHARE = 0.25  # of the time left, for the first of up to three systems
_PAIRS = (("base", "sft"), ("base", "tuned"), ("sft", "tuned"))


def run(ctx: StageContext) -> list[dict[str, Any]]:
    """Answers of base, SFT and tuned model; every pair by every judge."""
    foundation = Foundation.open(ctx.recipe)
    prompts = open_prompts(ctx.folder.data / "prompts.test.jsonl")
    answers = _answers(ctx, foundation, prompts)
    prompts = prompts[: len(answers["base"])]
    scores = _scores(ctx, foundation, prompts, answers)
    write_jsonl(ctx.out / "completions.jsonl", _rows(prompts, answers, scores))
    compared = [
        _comparison(ctx, a, b, judge, answers, of)
        for judge, of in scores.items()
        for a, b in _PAIRS
        if a in answers and b in answers
    ]
    return [row for row in compared if row is not None]


def systems(ctx: StageContext, foundation: Foundation) -> dict[str, Path | str]:
    """What is compared: the base, and the exported folders that the run has made."""
    found: dict[str, Path | str] = {"base": foundation.source}
    for name in ("sft", "tuned"):
        if (ctx.folder.models / name).is_dir():
            found[name] = ctx.folder.models / name
    return found


def _answers(ctx: StageContext, foundation: Foundation, prompts: Sequence[Prompt]) -> Answers:
    """Answers with the recipe's decoding; diversity at temperature 1 is measured on the way."""
    recipe, config = ctx.recipe, ctx.recipe.evaluate
    length = recipe.data.max_completion_tokens
    greedy = Sampling(max_new_tokens=length, temperature=config.temperature)
    pure = Sampling(max_new_tokens=length, temperature=1.0)
    diverse = prompts[: config.diversity_prompts]
    answers: Answers = {}
    diversity: dict[str, dict[str, float]] = {}
    for name, source in systems(ctx, foundation).items():
        engine = engine_for(source, foundation, config.batch_size)
        answers[name] = _in_time(ctx, foundation, engine, name, prompts, greedy)
        prompts = prompts[: len(answers[name])]
        if diverse and name != "base":
            sampled = generate(engine, foundation.renderer, diverse, pure, seed=recipe.seed)
            diversity[name] = text_diversity([answer.completion.text for answer in sampled])
    if diversity:
        write_json(
            ctx.out / "diversity.json",
            {"temperature": 1.0, "prompts": len(diverse), "systems": diversity},
        )
    return answers


def _in_time(
    ctx: StageContext,
    foundation: Foundation,
    engine: Engine,
    name: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> list[Answer]:
    """Answers to all prompts; under a time budget, the first system answers what its share allows.

    Later systems must answer the same prompts, so they are not cut.
    """
    time_left = ctx.deadline.part(_FIRST_SHARE)
    free = math.isinf(ctx.deadline.remaining_s()) or name != "base"
    size = len(prompts) if free else ctx.recipe.evaluate.batch_size
    answers: list[Answer] = []
    with ctx.progress.track(len(prompts), f"evaluate: {name}") as bar:
        for start in range(0, len(prompts), size):
            answers += generate(
                engine,
                foundation.renderer,
                prompts[start : start + size],
                sampling,
                seed=ctx.recipe.seed,
                on_progress=bar.advance,
            )
            if len(answers) < len(prompts) and time_left.exceeded():
                ctx.progress.say(f"evaluate: time allows {len(answers)} of {len(prompts)} prompts")
                break
    return answers


def _scores(
    ctx: StageContext, foundation: Foundation, prompts: Sequence[Prompt], answers: Answers
) -> Scores:
    recipe = ctx.recipe
    scores: Scores = {}
    if recipe.collect.annotator == "simulated":
        annotator = SimulatedAnnotator(recipe.collect, recipe.seed)
        scores["annotator"] = {
            name: [
                annotator.score(prompt, a.completion.text)
                for prompt, a in zip(prompts, of, strict=True)
            ]
            for name, of in answers.items()
        }
    rewarded = _reward_scores(ctx, foundation, prompts, answers)
    if rewarded is not None:
        scores["reward_model"] = rewarded
    return scores


def _reward_scores(
    ctx: StageContext, foundation: Foundation, prompts: Sequence[Prompt], answers: Answers
) -> dict[str, list[float]] | None:
    """By the rewards that the policy was tuned on, if there are any; NaN where one failed.

    Running normalisers begin anew and see all answers at once, so that systems are treated alike.
    """
    data, names = ctx.recipe.data, list(answers)
    texts, own = open_rewards(
        ctx.recipe.policy,
        max_prompt_tokens=data.max_prompt_tokens,
        max_completion_tokens=data.max_completion_tokens,
        instruction=data.instruction,
        system_message=data.system_message,
    )
    if own is not None and not (ctx.folder.models / "reward").is_dir():
        return None
    ctx.progress.say("evaluate: scoring with the reward model")
    total = torch.zeros(len(prompts) * len(names))
    if own is not None:
        total += own.weight * own.apply(_own_scores(ctx, foundation, answers))
    if texts is not None:
        judged = texts.judge(
            [prompt for prompt in prompts for _ in names],
            [answers[name][i].completion.text for i in range(len(prompts)) for name in names],
            all_may_fail=True,
        )
        total += judged.scores
        failed = [reason for reason in judged.reasons if reason]
        if failed:
            ctx.progress.say(
                f"evaluate: a reward failed for {len(failed)} of {len(total)} answers, whose "
                f"prompts are left out; the first: {failed[0]}"
            )
    table = total.view(len(prompts), len(names))
    return {name: table[:, column].tolist() for column, name in enumerate(names)}


def _own_scores(ctx: StageContext, foundation: Foundation, answers: Answers) -> Tensor:
    """[prompts × systems] centred scores of the run's own reward model.

    All systems' answers to a prompt are read from one encoding of it.
    """
    folder, names = ctx.folder.models / "reward", list(answers)
    head, offset = load_reward_head(folder)
    role = foundation.role("reward", folder, head=head, train=False)
    groups = [
        PromptGroup(
            of_prompt[0].rollout.prompt_ids, [answer.rollout.completion_ids for answer in of_prompt]
        )
        for of_prompt in zip(*(answers[name] for name in names), strict=True)
    ]
    return score_groups(role, groups, foundation.renderer.pad_id, _SCORING_TOKENS) - offset


def _rows(prompts: Sequence[Prompt], answers: Answers, scores: Scores) -> list[dict[str, Any]]:
    return [
        {
            "id": prompt.id,
            "input_text": prompt.text,
            "reference": prompt.meta.get("output_text"),
            "completions": {name: of[i].completion.text for name, of in answers.items()},
            "tokens": {name: of[i].completion.tokens for name, of in answers.items()},
            "ended": {name: of[i].completion.ended for name, of in answers.items()},
            "scores": {
                judge: {
                    name: None if math.isnan(values[i]) else values[i]
                    for name, values in of.items()
                }
                for judge, of in scores.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


def _comparison(
    ctx: StageContext, a: str, b: str, judge: str, answers: Answers, scores: dict[str, list[float]]
) -> dict[str, Any] | None:
    """Over the prompts for which the judge could score both; None if there is none."""
    sums = [x + y for x, y in zip(scores[a], scores[b], strict=True)]
    kept = [i for i, both in enumerate(sums) if not math.isnan(both)]
    if not kept:
        return None
    texts = {name: [answers[name][i].completion.text for i in kept] for name in (a, b)}
    lengths = {name: [len(text.split()) for text in texts[name]] for name in (a, b)}
    return compare(
        a,
        b,
        judge,
        [scores[a][i] for i in kept],
        [scores[b][i] for i in kept],
        lengths[a],
        lengths[b],
        seed=ctx.recipe.seed,
        bootstrap_samples=ctx.recipe.evaluate.bootstrap_samples,
        identical=[x == y for x, y in zip(texts[a], texts[b], strict=True)],
    )
