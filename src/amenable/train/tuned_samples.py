"""What a policy that was tuned without roll-outs says: a few samples, and how far it has moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.artifacts import write_jsonl
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.collate import PromptGroup, collate
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Prompt
from amenable.losses.likelihood import sequence_logprobs
from amenable.models.build import Foundation
from amenable.ranks import group as ranks
from amenable.rollout.transformers_engine import RolloutCopy
from amenable.rollout.types import Request, Rollout, Sampling
from amenable.train.pair_reference import FrozenStart

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

_PROMPTS = 64
_LOGGED = 10


def sample_tuned(
    ctx: StageContext, foundation: Foundation, role: Role, start: FrozenStart, step: int
) -> dict[str, float | None]:
    """Samples one completion of up to 64 training prompts at temperature 1 and logs ten of them.

    Returns:
        `kl_last`, the mean log-ratio of policy and frozen start over whole completions (k1, nats
        a sequence), and `completion_tokens_mean`; None where there are no prompts or no time.
    """
    path = ctx.folder.data / "prompts.train.jsonl"
    if not path.is_file() or ctx.deadline.exceeded():
        return {"kl_last": None, "completion_tokens_mean": None}
    prompts = open_prompts(path)[:_PROMPTS]
    ctx.progress.say(f"policy: sampling {len(prompts)} prompts")
    rollouts = _rollouts(ctx, foundation, role, prompts)
    pad_id, budget = foundation.renderer.pad_id, ctx.recipe.policy.preference.micro_batch_tokens
    kl = _log_ratios(role, start.role(), rollouts, pad_id, budget)
    rows = _rows(ctx, foundation, prompts, rollouts, kl, step)[:_LOGGED]
    write_jsonl(ctx.log.samples_path, rows)  # a stage that ends twice leaves them once
    tokens = [len(rollout.completion_ids) for rollout in rollouts]
    return {"kl_last": float(kl.mean()), "completion_tokens_mean": sum(tokens) / len(tokens)}


def _rollouts(
    ctx: StageContext, foundation: Foundation, role: Role, prompts: Sequence[Prompt]
) -> list[Rollout]:
    renderer = foundation.renderer
    copy = RolloutCopy(role, merged=ctx.recipe.policy.merged_rollouts)
    copy.sync()
    engine = copy.engine(renderer)
    requests = [
        Request(tuple(renderer.prompt_ids(prompt)), (ctx.recipe.seed, "tuned", prompt.id))
        for prompt in prompts
    ]
    return engine.generate(requests, Sampling(max_new_tokens=ctx.recipe.data.max_completion_tokens))


@torch.no_grad()
def _log_ratios(
    policy: Role, reference: Role, rollouts: Sequence[Rollout], pad_id: int, budget: int
) -> Tensor:
    """[n] nats of each completion."""
    groups = [PromptGroup(rollout.prompt_ids, [rollout.completion_ids]) for rollout in rollouts]
    found = torch.zeros(len(groups), dtype=policy.wide)
    for part, counts in policy.turns(policy.split(groups, budget)):
        batch = collate([groups[i] for i in part], pad_id).to(policy.device)
        sides = [
            sequence_logprobs(r.logprobs(batch).logprobs, batch.mask) for r in (policy, reference)
        ]
        if counts:
            found[part] = (sides[0] - sides[1]).cpu()
    ranks.add_up([found])
    return found


def _rows(
    ctx: StageContext,
    foundation: Foundation,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    kl: Tensor,
    step: int,
) -> list[dict[str, Any]]:
    simulated = ctx.recipe.collect.annotator == "simulated"
    gold = SimulatedAnnotator(ctx.recipe.collect, ctx.recipe.seed) if simulated else None
    rows = []
    for prompt, rollout, distance in zip(prompts, rollouts, kl.tolist(), strict=True):
        text = foundation.renderer.completion_text(rollout.completion_ids)
        row = {
            "step": step,
            "prompt": prompt.text,
            "completion": text,
            "kl": distance,
            "ended": rollout.ended,
        }
        if gold is not None:
            row["gold"] = gold.score(prompt, text)
        rows.append(row)
    return rows
