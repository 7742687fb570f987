"""Policy gradients without a critic: GRPO and its variants, RLOO, REINFORCE++.

They differ in three functions, named in one table: how scores become advantages, the loss of a
token, and how tokens are averaged. The steps are the same for all.
Shapes: N completions and C tokens of a whole roll-out batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from amenable.losses.advantages import (
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
)
from amenable.losses.masked import masked_whiten
from amenable.losses.policy import gspo_clipped_tokens, gspo_policy_loss
from amenable.train.experience import MicroBatch, Minibatches, flat, padded, unpadded
from amenable.train.loop import Metrics
from amenable.train.on_policy import run_on_policy
from amenable.train.passes import (
    Lesson,
    PolicyPasses,
    Surrogate,
    clip_sides,
    clipped_surrogate,
    policy_rate,
)
from amenable.train.penalty import KLPenalty
from amenable.train.policy_roles import PolicyRoles

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.config.recipe import Recipe
    from amenable.models.roles import Role


@dataclass(frozen=True)
class Sampled:
    """A roll-out batch as the advantages see it."""

    rewards: Tensor
    """[N, C] of each token, the penalty within where it is one of the reward."""
    mask: Tensor
    """[N, C] True at real tokens."""
    groups: Sequence[Tensor]
    """Of each prompt, the rows of its completions."""

    @property
    def scores(self) -> Tensor:
        """[N] sum of a completion's rewards."""
        return self.rewards.sum(1)


@dataclass(frozen=True)
class PolicyGradient:
    """A row of the table."""

    advantages: Callable[[Sampled], Tensor]
    """[N, C]."""
    surrogate: Callable[[Recipe], Surrogate]
    drop_equal: bool = False
    """Prompts of which all completions score alike leave the batch and its means (DAPO)."""


def by_group(sampled: Sampled, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """[N, C]: an advantage a completion, from the scores of its prompt's completions."""
    scores = sampled.scores
    own = torch.zeros_like(scores)
    for rows in sampled.groups:
        own[rows] = advantages(scores[rows][None])[0]
    return own[:, None] * sampled.mask


def _group_std(sampled: Sampled) -> Tensor:
    return by_group(sampled, lambda scores: group_relative(scores, "std"))


def _group_mean(sampled: Sampled) -> Tensor:
    return by_group(sampled, lambda scores: group_relative(scores, None))


def _leave_one_out(sampled: Sampled) -> Tensor:
    return by_group(sampled, leave_one_out)


def _returns(sampled: Sampled) -> Tensor:
    return reinforce_plus_plus(sampled.rewards, sampled.mask)


def _returns_of_centred(sampled: Sampled) -> Tensor:
    """A prompt at a time, as its groups may differ in size; whitened over all of them."""
    return masked_whiten(_group_mean(sampled), sampled.mask)


def _gspo(recipe: Recipe) -> Surrogate:
    sides = clip_sides(recipe.policy, (3e-4, 4e-4))
    return Surrogate(
        loss=lambda new, old, a, mask: gspo_policy_loss(new, old, a, mask, sides),
        clipped=lambda new, old, a, mask: gspo_clipped_tokens(new, old, a, mask, sides),
        aggregation="sequence",
    )


def _clipped(
    aggregation: Literal["token", "sequence", "constant"], high: float = 0.2
) -> Callable[[Recipe], Surrogate]:
    return lambda recipe: clipped_surrogate(recipe.policy, aggregation, (0.2, high))


def _clipped_over_limit(recipe: Recipe) -> Surrogate:
    """Sums of tokens over the longest possible completion, which is the same for all."""
    return clipped_surrogate(recipe.policy, "constant", length=recipe.data.max_completion_tokens)


GRADIENTS = {
    "grpo": PolicyGradient(_group_std, _clipped("sequence")),
    "dr-grpo": PolicyGradient(_group_mean, _clipped_over_limit),
    "dapo": PolicyGradient(_group_std, _clipped("token", high=0.28), drop_equal=True),
    "gspo": PolicyGradient(_group_std, _gspo),
    "rloo": PolicyGradient(_leave_one_out, _clipped("constant")),
    "reinforce++": PolicyGradient(_returns, _clipped("token")),
    "reinforce++-baseline": PolicyGradient(_returns_of_centred, _clipped("token")),
}
"""By the name of the algorithm."""


def run(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage with a policy gradient of the table."""
    return run_on_policy(ctx, PolicyGradientLearner)


class PolicyGradientLearner:
    """Advantages from a roll-out batch, then passes of the policy over it."""

    sampler = "policy"
    critic_role: Role | None = None

    def __init__(self, ctx: StageContext, roles: PolicyRoles) -> None:
        self._config = config = ctx.recipe.policy
        self._row = GRADIENTS[config.algorithm]
        self._penalty = KLPenalty(config)
        self._passes = PolicyPasses(
            config,
            roles.policy,
            ctx.recipe.seed,
            self._row.surrogate(ctx.recipe),
            kl_in_loss=self._penalty.in_loss,
            on_broken=lambda episode: ctx.progress.blame(f"policy: loss is not finite: {episode}"),
        )

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """Advantages over the whole batch; then the passes."""
        micros = flat(minibatches)
        sampled = _sampled(micros, self._penalty, kl_coef)
        advantages = self._row.advantages(sampled)
        learnt = (
            sampled.mask & _told_apart(sampled)[:, None] if self._row.drop_equal else (sampled.mask)
        )
        if not bool(learnt.any()):
            return {
                "without_spread": 1.0,
                "passes": 0.0,
                "learning_rate": policy_rate(self._config, update),
                "undone_steps": float(self._passes.optimizer.undone),
            }
        cut = zip(micros, unpadded(advantages, micros), unpadded(learnt, micros), strict=True)
        lessons = iter([Lesson(micro, own, mask) for micro, own, mask in cut])
        parts = [[next(lessons) for _ in minibatch] for minibatch in minibatches]
        kept = [part for part in parts if any(bool(lesson.learnt.any()) for lesson in part)]
        metrics = self._passes.run(kept, update, kl_coef)
        if max(map(len, sampled.groups)) > 1:
            metrics["without_spread"] = 1.0 - float(_told_apart(sampled).float().mean())
        return metrics

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The optimizer."""
        return {"policy_optimizer": self._passes.optimizer.state()}, {}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        self._passes.optimizer.load_state(tensors["policy_optimizer"])


def _sampled(micros: Sequence[MicroBatch], penalty: KLPenalty, kl_coef: float) -> Sampled:
    rewards = [penalty.token_rewards(micro, kl_coef) for micro in micros]
    groups, start = [], 0
    for micro in micros:
        groups += [torch.arange(start + own.start, start + own.stop) for own in micro.groups()]
        start += len(micro.episodes)
    return Sampled(padded(rewards), padded([micro.batch.mask for micro in micros], False), groups)


def _told_apart(sampled: Sampled) -> Tensor:
    """[N] whether the completions of the same prompt differ in score at all."""
    scores, told = sampled.scores, torch.zeros(len(sampled.mask), dtype=torch.bool)
    for rows in sampled.groups:
        told[rows] = bool((scores[rows] != scores[rows[0]]).any())
    return told.to(sampled.mask.device)
