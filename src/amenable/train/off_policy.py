"""Algorithms that learn from pairs which exist already: DPO and its relatives. No roll-outs.

One loop, and a loss a row of `pair_losses.LOSSES`. Both candidates of a pair share one encoding of
their prompt. Log-probabilities are sums over real tokens at temperature 1, whatever
`policy.temperature` says: the implicit reward beta log(policy / reference) is that of the
distribution itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.artifacts import write_json
from amenable.config.preference import PreferenceConfig
from amenable.data.collate import PromptGroup, collate
from amenable.data.row_file import open_prompts
from amenable.errors import NumericsError
from amenable.losses.kto import kto_reference_point
from amenable.models.build import Foundation
from amenable.models.export import export_policy
from amenable.ranks import group as ranks
from amenable.rollout.transformers_engine import RolloutCopy
from amenable.train.checkpoints import Checkpoints
from amenable.train.gate import run_gate
from amenable.train.loop import Metrics, add_gradient, train_supervised
from amenable.train.pair_losses import LOSSES, PairLoss, Pairs
from amenable.train.pair_reference import (
    FrozenStart,
    PairReference,
    PairRows,
    all_logprobs,
    mismatched,
    open_pairs,
    open_reference,
    pair_logprobs,
    start_folder,
)
from amenable.train.passes import EXACT
from amenable.train.policy_roles import PolicyRoles
from amenable.train.tuned_samples import sample_tuned

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role


def run(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage: preferences to `models/tuned`."""
    config, algorithm = ctx.recipe.policy.preference, ctx.recipe.policy.algorithm
    row = LOSSES[algorithm]
    foundation = Foundation.open(ctx.recipe)
    data = {
        split: open_pairs(ctx, foundation.renderer, split, ties=row.ties)
        for split in ("train", "validation")
    }
    _say_left_out(ctx, data["train"], algorithm)
    checkpoints = Checkpoints(ctx)
    fresh = checkpoints.step is None
    start, pad_id = FrozenStart(ctx, foundation), foundation.renderer.pad_id
    role = foundation.role("policy", start_folder(ctx))
    if fresh and ctx.recipe.policy.gate:
        _run_gate(ctx, foundation, role, start)
    reference = open_reference(
        ctx, start, pad_id, data, mismatched_too=row.mismatched, wanted=row.reference
    )
    learner = PairLearner(ctx, row, role, pad_id, data, reference, fresh=fresh)
    result = train_supervised(
        ctx,
        config,
        role,
        rows=len(data["train"]),
        gradient=learner.gradient,
        evaluate=learner.evaluate,
        loss_name="loss",
        checkpoints=checkpoints,
    )
    export_policy(
        role.model,
        foundation.tokenizer,
        ctx.folder.models / "tuned",
        role.adapter,
        base=ctx.recipe.model.base,
        dtype=foundation.dtype,
    )
    accuracy_first, accuracy_last = _first_and_last(ctx, "accuracy")
    return {
        "algorithm": algorithm,
        "episodes": None,
        "updates": result.steps,
        "pairs": len(data["train"]),
        "ties_left_out": data["train"].left_out,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "accuracy_first": accuracy_first,
        "accuracy_last": accuracy_last,
        "reward_first": None,
        "reward_last": None,
        **sample_tuned(ctx, foundation, role, start, result.steps),
    }


def _run_gate(ctx: StageContext, foundation: Foundation, role: Role, start: FrozenStart) -> None:
    """The numerics gate, on training prompts; it needs no reward."""
    path = ctx.folder.data / "prompts.train.jsonl"
    if not path.is_file():
        return
    copy = RolloutCopy(role, merged=ctx.recipe.policy.merged_rollouts)
    copy.sync()
    found = run_gate(
        ctx,
        PolicyRoles(foundation, role, start.role(), None, None, None),
        copy.engine(foundation.renderer),
        open_prompts(path),
        copy=copy,
    )
    write_json(ctx.out / "gate.json", found)


class PairLearner:
    """Gradient and metrics of one algorithm.

    Args:
        ctx: the stage.
        row: the algorithm.
        role: the policy.
        pad_id: of the tokenizer.
        data: `train` and `validation`.
        reference: log-probabilities under the frozen start.
        fresh: no step has been made, so that the first batch must see policy = reference.
    """

    def __init__(
        self,
        ctx: StageContext,
        row: PairLoss,
        role: Role,
        pad_id: int,
        data: dict[str, PairRows],
        reference: PairReference,
        *,
        fresh: bool = False,
    ) -> None:
        self._ctx, self._row, self._role = ctx, row, role
        self._pad_id, self._data, self._reference = pad_id, data, reference
        checked = "reference" not in ctx.recipe.policy.gate_skip
        self._fresh = fresh and row.reference and checked
        self._config = ctx.recipe.policy.preference

    def gradient(self, rows: Sequence[int]) -> Metrics:
        """Add the gradient of the mean weighted loss over the whole batch.

        Raises:
            NumericsError: at the first step the policy's log-probabilities are not the
                reference's.
        """
        data = self._data["train"]
        groups = [data.groups[row] for row in rows]
        self._reference.complete(rows, groups)
        ref = self._reference.behind_other_prompts(rows, groups) if self._row.mismatched else None
        point = self._reference_point(groups, ref)
        tally = _Tally(self._row, self._config, point)
        weight = sum(data.weights[row] for row in rows)
        for (part, own), counts in self._role.turns(self._parts(rows, groups)):
            pairs = self._forward(data, part, own, self._reference.train, point)
            losses = counts * self._losses(pairs) * self._weights(data, part)
            tally.loss += add_gradient(losses, None, weight, partial(self._blame, part))
            if counts:
                tally.add(pairs)
        tally.share()
        if self._fresh:
            tally.check_start()
            self._fresh = False
        return tally.metrics()

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """`eval_loss` and `eval_accuracy` of the validation pairs."""
        data = self._data["validation"]
        groups = list(data.groups)
        point = self._reference_point(groups, self._reference.mismatched_validation)
        tally = _Tally(self._row, self._config, point)
        for (part, own), counts in self._role.turns(self._parts(range(len(data)), groups)):
            pairs = self._forward(data, part, own, self._reference.validation, point)
            losses = counts * self._losses(pairs) * self._weights(data, part)
            tally.loss += float(losses.sum()) / sum(data.weights)
            if counts:
                tally.add(pairs)
        tally.share()
        metrics = tally.metrics()
        found: Metrics = {"eval_loss": metrics["loss"]}
        return found | ({"eval_accuracy": metrics["accuracy"]} if "accuracy" in metrics else {})

    def _parts(
        self, rows: Sequence[int], groups: Sequence[PromptGroup]
    ) -> list[tuple[list[int], list[PromptGroup]]]:
        """The rows of each micro-batch, and their groups."""
        parts = self._role.split(groups, self._config.micro_batch_tokens)
        return [([rows[i] for i in part], [groups[i] for i in part]) for part in parts]

    def _forward(
        self,
        data: PairRows,
        rows: Sequence[int],
        groups: Sequence[PromptGroup],
        reference: Tensor,
        point: Tensor,
    ) -> Pairs:
        batch = collate(groups, self._pad_id).to(self._role.device)
        policy = pair_logprobs(self._role, batch)
        tokens = batch.mask.sum(1).view(-1, 2)
        ref = reference[list(rows)].to(policy.device)
        return Pairs(
            policy_chosen=policy[:, 0],
            policy_rejected=policy[:, 1],
            ref_chosen=ref[:, 0],
            ref_rejected=ref[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            tied=torch.tensor([data.tied[row] for row in rows], device=policy.device),
            reference_point=point,
        )

    def _losses(self, pairs: Pairs) -> Tensor:
        losses = self._row.loss(pairs, self._config)
        if self._config.sft_coef:
            losses = losses + self._config.sft_coef * pairs.chosen_nll
        return losses

    def _weights(self, data: PairRows, rows: Sequence[int]) -> Tensor:
        return torch.tensor([data.weights[row] for row in rows], device=self._role.device)

    def _reference_point(self, groups: Sequence[PromptGroup], ref: Tensor | None) -> Tensor:
        """KTO's z of a whole batch; 0 for other algorithms, and where there is no other prompt."""
        if ref is None:
            return torch.zeros((), device=self._role.device)
        budget = self._config.micro_batch_tokens
        policy = all_logprobs(self._role, mismatched(groups), self._pad_id, budget)
        return kto_reference_point(policy.flatten(), ref.flatten()).to(self._role.device)

    def _blame(self, rows: Sequence[int], place: int) -> None:
        row_id = self._data["train"].row_id(rows[place])
        self._ctx.progress.blame(f"policy: the loss of the pair with id {row_id!r} is not finite")


class _Tally:
    """Sums up the metrics of a batch over its micro-batches."""

    def __init__(self, row: PairLoss, config: PreferenceConfig, point: Tensor) -> None:
        self._row, self._config, self._point = row, config, point
        self.loss = 0.0
        self._tokens = 0
        self._seen: list[Tensor] = []  # [7, decided pairs] of each micro-batch
        self._worst = torch.zeros(())

    def add(self, pairs: Pairs) -> None:
        """Take in a micro-batch; only pairs with a winner count, except among the tokens."""
        four = torch.stack([side.detach() for side in pairs.four])
        policy, ref = four[:2], four[2:]
        tokens = torch.stack([pairs.chosen_tokens, pairs.rejected_tokens])
        decided = ~pairs.tied
        scale = self._row.reward_scale(self._config)
        rewards = scale * ((policy - ref) if self._row.reference else policy / tokens)
        self._tokens += int(tokens.sum())
        seen = torch.cat([rewards, four, pairs.chosen_nll.detach()[None]])
        self._seen.append(seen[:, decided].cpu())
        self._worst = torch.maximum(self._worst, (policy - ref).abs().max().cpu())

    def share(self) -> None:
        """Take in what the other ranks have seen of the batch."""
        everybodys = ranks.gathered((self.loss, self._tokens, self._worst, self._seen))
        self.loss = sum(loss for loss, _, _, _ in everybodys)
        self._tokens = sum(tokens for _, tokens, _, _ in everybodys)
        self._worst = torch.stack([worst.double() for _, _, worst, _ in everybodys]).max()
        self._seen = [seen for _, _, _, own in everybodys for seen in own]

    def check_start(self) -> None:
        """Raises NumericsError unless policy and reference agree, as they must at step 0."""
        if bool(self._worst <= EXACT):
            return
        raise NumericsError(
            "before the first step the policy's log-probabilities of the pairs differ from the "
            f"reference's by up to {self._worst:.2g} nats a completion (allowed: {EXACT:g}). They "
            "must be the same weights in the same forward pass; is dropout off, and was "
            "models/sft changed by hand?"
        )

    def metrics(self) -> Metrics:
        """By name; the figures of pairs are left out of a batch that has only ties."""
        found: Metrics = {"loss": self.loss, "tokens": float(self._tokens)}
        if self._row.mismatched:
            found |= {"reference_point": float(self._point)}
        seen = torch.cat(self._seen, dim=1)
        chosen, rejected, policy_chosen, policy_rejected, ref_chosen, _, nll = seen
        if not len(chosen):
            return found
        margin = chosen - rejected
        found |= {
            "accuracy": float(((margin > 0).float() + 0.5 * (margin == 0).float()).mean()),
            "margin": float(margin.mean()),
            "chosen_reward": float(chosen.mean()),
            "rejected_reward": float(rejected.mean()),
            "chosen_logprob": float(policy_chosen.mean()),
            "rejected_logprob": float(policy_rejected.mean()),
            "chosen_nll": float(nll.mean()),
        }
        if self._row.reference:
            found |= {"log_ratio": float((policy_chosen - ref_chosen).mean())}
        return found


def _first_and_last(ctx: StageContext, name: str) -> tuple[float | None, float | None]:
    """Mean of a metric over the first and the last tenth of the steps."""
    key = f"{ctx.stage}/{name}"
    values = [row[key] for row in ctx.log.rows() if row.get(key) is not None]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None, None
    count = max(1, len(values) // 10)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _say_left_out(ctx: StageContext, rows: PairRows, algorithm: str) -> None:
    if rows.left_out:
        ctx.progress.say(f"policy: {rows.left_out} ties left out: {algorithm} has no use for them")
