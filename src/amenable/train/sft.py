"""Supervised fine-tuning: cross entropy on the completion tokens of demonstrations.

Every prompt is encoded once with its completion behind it; the prompt's own tokens carry no
loss. The completion's end-of-sequence token does, so that the model learns to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from amenable.data.collate import PromptGroup, collate
from amenable.data.render import Renderer
from amenable.data.row_file import open_demonstrations
from amenable.data.schemas import Demonstration
from amenable.data.tokens.cache import TokenCache
from amenable.losses.likelihood import cross_entropy
from amenable.models.build import Foundation
from amenable.models.export import export_policy
from amenable.models.pull import cache_home
from amenable.ranks import group as ranks
from amenable.train.loop import Metrics, add_gradient, train_supervised

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role


def run(ctx: StageContext) -> dict[str, Any]:
    """The `sft` stage: demonstrations to `models/sft`."""
    foundation = Foundation.open(ctx.recipe)
    cache = TokenCache(cache_home() / "tokens", foundation.renderer, ctx.progress.say)
    groups = {
        split: cache.demonstrations(
            open_demonstrations(ctx.folder.data / f"demonstrations.{split}.jsonl")
        )
        for split in ("train", "validation")
    }
    role = foundation.role("sft")
    rows = open_demonstrations(ctx.folder.data / "demonstrations.train.jsonl")
    pad_id, budget = foundation.renderer.pad_id, ctx.recipe.sft.micro_batch_tokens
    result = train_supervised(
        ctx,
        ctx.recipe.sft,
        role,
        rows=len(groups["train"]),
        gradient=lambda batch: sft_gradient(
            role,
            [groups["train"][row] for row in batch],
            pad_id,
            budget,
            lambda place: ctx.progress.blame(
                f"sft: loss is not finite: row {rows[batch[place]].prompt.id!r}"
            ),
        ),
        evaluate=lambda: {"eval_loss": sft_loss(role, groups["validation"], pad_id, budget)},
        loss_name="loss",
    )
    export_policy(
        role.model,
        foundation.tokenizer,
        ctx.folder.models / "sft",
        role.adapter,
        base=ctx.recipe.model.base,
        dtype=foundation.dtype,
    )
    return {
        "steps": result.steps,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
    }


def demonstration_group(renderer: Renderer, row: Demonstration) -> PromptGroup:
    """Token ids of a demonstration."""
    return PromptGroup(renderer.prompt_ids(row.prompt), [renderer.completion_ids(row.output_text)])


def sft_gradient(
    role: Role,
    groups: Sequence[PromptGroup],
    pad_id: int,
    micro_batch_tokens: int,
    blame: Callable[[int], None] | None = None,
) -> Metrics:
    """Add the gradient of the mean loss a token over the whole batch.

    Args:
        role: the model.
        groups: token ids of the demonstrations.
        pad_id: fills rows.
        micro_batch_tokens: of a forward pass.
        blame: hears the number of each group whose loss is not finite.

    Returns:
        `loss` in nats a token, and `tokens` that carried it.
    """
    tokens = sum(len(ids) for group in groups for ids in group.completions)
    loss = 0.0
    for part, counts in role.turns(role.split(groups, micro_batch_tokens)):
        batch = collate([groups[i] for i in part], pad_id).to(role.device)
        losses = counts * cross_entropy(role.logprobs(batch).logprobs, batch.mask)
        loss += add_gradient(losses, batch.mask, tokens, partial(_blame, part, blame))
    (loss,) = ranks.summed(loss)
    return {"loss": loss, "tokens": tokens}


def _blame(part: Sequence[int], blame: Callable[[int], None] | None, number: int) -> None:
    if blame is not None:
        blame(part[number])


@torch.no_grad()
def sft_loss(
    role: Role, groups: Sequence[PromptGroup], pad_id: int, micro_batch_tokens: int
) -> float:
    """Mean loss in nats a completion token."""
    total = tokens = 0.0
    for part, counts in role.turns(role.split(groups, micro_batch_tokens)):
        batch = collate([groups[i] for i in part], pad_id).to(role.device)
        total += counts * float(cross_entropy(role.logprobs(batch).logprobs, batch.mask).sum())
        tokens += counts * int(batch.mask.sum())
    total, tokens = ranks.summed(total, tokens)
    return total / max(1, tokens)
