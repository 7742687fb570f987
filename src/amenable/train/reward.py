"""The reward model: a scalar head on the trunk, trained on pairs (Bradley and Terry 1952).

Both candidates of a pair share one encoding of their prompt. After training, scores are
centred: `reward_offset` is the mean raw score of demonstrations (of chosen candidates where
there are none), stored with the model and subtracted by whoever uses it. Beside it stands
`reward_temperature`, which calibrates the scores on held-out pairs, unless all of them are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amenable.artifacts import write_json
from amenable.data.collate import PromptGroup, collate
from amenable.data.render import Renderer
from amenable.data.row_file import open_demonstrations, open_preferences
from amenable.data.schemas import Choice, Preference
from amenable.data.tokens.cache import TokenCache
from amenable.evaluate.reward_report import reward_report
from amenable.models.build import Foundation
from amenable.models.export import export_reward
from amenable.models.heads import HeadEnsemble, ScalarHead
from amenable.models.pull import cache_home
from amenable.ranks import group as ranks
from amenable.rollout.rewards import score_groups
from amenable.train.loop import Metrics, add_gradient, train_supervised
from amenable.train.rank_loss import PLAIN, RankLoss, bootstrap_weights, pair_tokens
from amenable.train.sft import demonstration_group

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

_OFFSET_ROWS = 64

_BASELINE_ROWS = 20_000
"""Most training pairs that the report's bag of words learns from: it holds their texts in memory.

They are a draw: the rows of a split stand in drawn order.
"""


def run(ctx: StageContext) -> dict[str, Any]:
    """The `reward` stage: preferences to `models/reward` and its report."""
    foundation = Foundation.open(ctx.recipe)
    renderer, budget = foundation.renderer, ctx.recipe.reward.micro_batch_tokens
    pairs = {
        split: open_preferences(ctx.folder.data / f"preferences.{split}.jsonl")
        for split in ("train", "validation", "test")
    }
    cache = TokenCache(cache_home() / "tokens", renderer, ctx.progress.say)
    groups = {split: cache.preferences(rows) for split, rows in pairs.items()}
    role = reward_role(ctx, foundation)
    rank_loss = RankLoss.fit(ctx.recipe.reward, pairs["train"], groups["train"])

    def evaluate() -> Metrics:
        losses, correct = pair_losses(
            role, renderer, pairs["validation"], budget, groups["validation"], rank_loss
        )
        return {"eval_rank_loss": losses, "eval_accuracy": correct}

    train_supervised(
        ctx,
        ctx.recipe.reward,
        role,
        rows=len(pairs["train"]),
        gradient=lambda rows: reward_gradient(
            role,
            [groups["train"][row] for row in rows],
            [pairs["train"][row] for row in rows],
            renderer.pad_id,
            budget,
            rank_loss,
            ctx.recipe.seed,
            ctx.progress.blame,
        ),
        evaluate=evaluate,
        loss_name="rank_loss",
    )
    ctx.progress.say("reward: scoring held-out pairs")
    margins = pair_margins(role, renderer, pairs["test"], budget, groups["test"])
    learnt_from = pairs["train"][:_BASELINE_ROWS]
    report = reward_report(learnt_from, pairs["test"], margins, seed=ctx.recipe.seed)
    report["pairs_train"] = sum(row.choice is not Choice.TIE for row in pairs["train"])
    if isinstance(role.scalar_head, HeadEnsemble):
        report |= _disagreement(role, renderer, pairs["test"], groups["test"], margins, budget)
    offset = float(
        score_groups(
            role, _offset_groups(ctx, renderer, pairs["train"]), renderer.pad_id, budget
        ).mean()
    )
    export_reward(
        role.model,
        role.scalar_head,
        foundation.tokenizer,
        ctx.folder.models / "reward",
        role.adapter,
        offset,
        # Where every held-out pair is right no temperature fits: any choice would be certain.
        reward_temperature=report["temperature"] if report["accuracy"] < 1 else None,
        base=ctx.recipe.model.base,
        dtype=foundation.dtype,
    )
    write_json(ctx.out / "report.json", {**report, "reward_offset": offset})
    return {**report, "reward_offset": offset}


def reward_role(ctx: StageContext, foundation: Foundation) -> Role:
    """An untrained reward model on the SFT model, or on the base where there is none."""
    sft = ctx.folder.models / "sft"
    width, heads = hidden_size(foundation), ctx.recipe.reward.heads
    seed = ctx.recipe.seed
    head = HeadEnsemble(width, heads, seed) if heads > 1 else ScalarHead(width, seed)
    return foundation.role("reward", sft if sft.is_dir() else None, head=head)


def hidden_size(foundation: Foundation) -> int:
    """Width of the base model's hidden states."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(foundation.source).get_text_config()
    return int(config.hidden_size)


def preference_group(renderer: Renderer, row: Preference) -> PromptGroup:
    """Token ids of a pair: the chosen candidate first."""
    return PromptGroup(
        renderer.prompt_ids(row.prompt),
        [renderer.completion_ids(row.chosen), renderer.completion_ids(row.rejected)],
    )


def reward_gradient(
    role: Role,
    groups: Sequence[PromptGroup],
    rows: Sequence[Preference],
    pad_id: int,
    micro_batch_tokens: int,
    rank_loss: RankLoss = PLAIN,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Metrics:
    """Add the gradient of the mean weighted rank loss over the whole batch, and over all heads.

    Args:
        role: the reward model.
        groups: token ids of the pairs, the chosen candidate first.
        rows: the pairs.
        pad_id: fills rows.
        micro_batch_tokens: of a forward pass.
        rank_loss: of a pair.
        seed: of the heads' bootstraps, where there are several.
        say: hears of each row whose loss is not finite.

    Returns:
        `rank_loss` in nats a pair, `accuracy` over pairs without ties, mean `margin` in logits.
    """
    weight = sum(row.weight for row in rows)
    decided = sum(row.choice is not Choice.TIE for row in rows)
    loss = correct = margin = 0.0
    for part, counts in role.turns(role.split(groups, micro_batch_tokens)):
        own, tokens = [rows[i] for i in part], pair_tokens([groups[i] for i in part])
        batch = collate([groups[i] for i in part], pad_id).to(role.device)
        scores = role.scalar_head.members(role.states(batch).last)
        heads = scores.shape[-1]
        scores = scores.view(-1, 2, heads)
        seen = bootstrap_weights(own, heads, seed).to(scores)
        losses = torch.stack([rank_loss(one, own, tokens) for one in scores.unbind(-1)], 1)
        loss += add_gradient(
            counts * losses * seen,
            None,
            weight * heads,
            partial(_blame, own, say),
        )
        if not counts:
            continue
        gap = (scores[:, 0] - scores[:, 1]).detach().mean(-1).cpu()
        margin += float(gap.sum())
        correct += _correct(gap, [rows[i] for i in part])
    loss, correct, margin = ranks.summed(loss, correct, margin)
    return {
        "rank_loss": loss,
        "accuracy": correct / max(1, decided),
        "margin": margin / len(rows),
    }


def _blame(rows: Sequence[Preference], say: Callable[[str], None] | None, number: int) -> None:
    if say is not None:
        say(f"reward: loss is not finite: row {rows[number].prompt.id!r}")


def _correct(gap: Tensor, rows: Sequence[Preference]) -> float:
    decided = torch.tensor([row.choice is not Choice.TIE for row in rows])
    return float(((gap > 0).float() + 0.5 * (gap == 0).float())[decided].sum())


def pair_margins(
    role: Role,
    renderer: Renderer,
    rows: Sequence[Preference],
    micro_batch_tokens: int,
    groups: Sequence[PromptGroup] | None = None,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[n] score of the chosen minus score of the rejected candidate.

    Args:
        role: the reward model.
        renderer: of the run.
        rows: the pairs.
        micro_batch_tokens: of a forward pass.
        groups: `preference_group` of each row, where they are known.
    """
    if groups is None:
        groups = [preference_group(renderer, row) for row in rows]
    scores = score_groups(role, groups, renderer.pad_id, micro_batch_tokens).view(-1, 2)
    return (scores[:, 0] - scores[:, 1]).double().numpy()


@torch.no_grad()
def pair_losses(
    role: Role,
    renderer: Renderer,
    rows: Sequence[Preference],
    micro_batch_tokens: int,
    groups: Sequence[PromptGroup] | None = None,
    rank_loss: RankLoss = PLAIN,
) -> tuple[float, float]:
    """Mean weighted rank loss and accuracy of held-out pairs; arguments as of `pair_margins`."""
    if groups is None:
        groups = [preference_group(renderer, row) for row in rows]
    scores = score_groups(role, groups, renderer.pad_id, micro_batch_tokens).view(-1, 2)
    weight = sum(row.weight for row in rows)
    decided = max(1, sum(row.choice is not Choice.TIE for row in rows))
    loss = float(rank_loss(scores, rows, pair_tokens(groups)).sum()) / weight
    return loss, _correct(scores[:, 0] - scores[:, 1], rows) / decided


@torch.no_grad()
def _disagreement(
    role: Role,
    renderer: Renderer,
    rows: Sequence[Preference],
    groups: Sequence[PromptGroup],
    margins: np.ndarray[Any, np.dtype[np.float64]],
    micro_batch_tokens: int,
) -> dict[str, Any]:
    """How far the heads of an ensemble are apart on held-out pairs, ties left out."""
    spread = torch.zeros(len(groups), dtype=role.wide)
    for part, counts in role.turns(role.split(groups, micro_batch_tokens)):
        batch = collate([groups[i] for i in part], renderer.pad_id).to(role.device)
        members = role.scalar_head.members(role.states(batch).last).view(len(part), 2, -1)
        if counts:
            spread[part] = (members[:, 0] - members[:, 1]).std(-1).cpu()
    ranks.add_up([spread])
    decided = torch.tensor([row.choice is not Choice.TIE for row in rows])
    spread, right = spread[decided], torch.from_numpy(margins > 0)[decided]
    return {
        "disagreement": float(spread.mean()),
        "disagreement_right": float(spread[right].mean()) if bool(right.any()) else None,
        "disagreement_wrong": float(spread[~right].mean()) if not bool(right.all()) else None,
    }


def _offset_groups(
    ctx: StageContext, renderer: Renderer, pairs: Sequence[Preference]
) -> list[PromptGroup]:
    """What the score 0 shall mean: demonstrations, else chosen candidates."""
    path = ctx.folder.data / "demonstrations.train.jsonl"
    if path.is_file() and path.stat().st_size:
        return [
            demonstration_group(renderer, row) for row in open_demonstrations(path)[:_OFFSET_ROWS]
        ]
    return [
        PromptGroup(renderer.prompt_ids(row.prompt), [renderer.completion_ids(row.chosen)])
        for row in pairs[:_OFFSET_ROWS]
    ]
