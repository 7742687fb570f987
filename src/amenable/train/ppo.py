"""Proximal policy optimisation (Schulman et al. 2017) with a critic.

Follows the practice of Stiennon et al. 2020 and its published re-implementations; departures
from the paper: the KL to the reference sits in the reward, advantages are whitened over the
whole roll-out batch, policy and critic have an optimizer each, minibatches hold whole prompts,
and their composition is drawn once per roll-out batch so that ratios start at exactly 1.
Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from amenable.errors import RecipeError
from amenable.losses.advantages import gae
from amenable.losses.masked import masked_whiten
from amenable.losses.value import explained_variance, value_loss
from amenable.models.heads import ScalarHead
from amenable.models.logprobs import scatter
from amenable.models.roles import Role
from amenable.ranks import group as ranks
from amenable.train.experience import MicroBatch, Minibatches, flat, padded, unpadded
from amenable.train.loop import Metrics, Optimizer, add_gradient
from amenable.train.on_policy import run_on_policy
from amenable.train.passes import (
    ADAM_EPS,
    Lesson,
    PolicyPasses,
    clipped_surrogate,
    minibatch_order,
    policy_rate,
)
from amenable.train.penalty import KLPenalty
from amenable.train.policy_roles import PolicyRoles

if TYPE_CHECKING:
    from amenable.artifacts import StageContext

T = TypeVar("T")


def run(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage with PPO."""
    return run_on_policy(ctx, PPOLearner)


class Critic(Protocol):
    """Values the state before every completion token."""

    role: Role

    def values(self, micro: MicroBatch) -> Tensor:
        """[N, C], 0 off the mask."""
        ...


@dataclass
class RoleCritic:
    """A critic with trunk weights of its own: it reads the tokens."""

    role: Role
    offset: float = 0.0

    def values(self, micro: MicroBatch) -> Tensor:
        """One forward pass."""
        return (self.role.values(micro.batch) - self.offset) * micro.batch.mask


@dataclass
class HeadCritic:
    """A critic that is one scalar head on the frozen reward model's states.

    It starts at zero: the reward model's own head was trained on last tokens alone, and what it
    says of earlier ones is no estimate of the score to come.
    """

    role: Role

    def values(self, micro: MicroBatch) -> Tensor:
        """No forward pass: the states were read together with the scores."""
        assert micro.states is not None
        return scatter(self.role.scalar_head(micro.states.before), micro.batch.mask)


def make_critic(ctx: StageContext, roles: PolicyRoles) -> Critic:
    """The critic that the recipe wants, started from the reward model where there is one.

    Raises:
        RecipeError: `policy.ppo.critic = "head"` without a reward model of this run.
    """
    foundation, reward = roles.foundation, roles.reward_role
    if ctx.recipe.policy.ppo.critic == "head":
        if reward is None:
            raise RecipeError(
                'policy.ppo.critic = "head" reads the states of the run\'s own reward model, but '
                'policy.reward names another reward; set policy.ppo.critic = "adapter"'
            )
        head = ScalarHead.from_weight(torch.zeros_like(reward.scalar_head.mean_weight))
        head.to(reward.device, reward.wide)
        role = _HeadOnly(reward.model, reward.adapter, head, reward.dtype)
        return HeadCritic(role)
    if reward is not None:
        folder = ctx.folder.models / "reward"
        head = ScalarHead.from_weight(reward.scalar_head.mean_weight.detach())
        return RoleCritic(foundation.role("critic", folder, head=head), roles.reward_offset)
    sft = ctx.folder.models / "sft"
    width = roles.policy.plain.config.get_text_config().hidden_size
    head = ScalarHead.from_weight(torch.zeros(1, width))
    return RoleCritic(foundation.role("critic", sft if sft.is_dir() else None, head=head))


class _HeadOnly(Role):
    """A role of which only the scalar head is trained, on states that others have read."""

    @property
    def sharded(self) -> bool:
        return False

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.scalar_head.parameters())

    def state(self) -> dict[str, Tensor]:
        return {"scalar_head": self.scalar_head.weight.detach().clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.scalar_head.weight.copy_(state["scalar_head"])


@dataclass(frozen=True)
class _Targets:
    """What the critic learns of a micro-batch."""

    micro: MicroBatch
    values: Tensor
    """[N, C] of the critic before this update."""
    returns: Tensor
    """[N, C]."""


class PPOLearner:
    """Clipped policy and value losses over a few passes of each roll-out batch."""

    sampler = "policy"

    def __init__(self, ctx: StageContext, roles: PolicyRoles) -> None:
        config = ctx.recipe.policy
        self._config, self._ppo, self._seed = config, config.ppo, ctx.recipe.seed
        self._penalty, self._tell = KLPenalty(config), ctx.progress.blame
        self._policy, self._critic = roles.policy, make_critic(ctx, roles)
        self.critic_role: Role | None = self._critic.role
        self._passes = PolicyPasses(
            config,
            roles.policy,
            ctx.recipe.seed,
            clipped_surrogate(config, "token"),
            kl_in_loss=self._penalty.in_loss,
            on_broken=lambda episode: ctx.progress.blame(f"policy: loss is not finite: {episode}"),
        )
        self._critic_optimizer = Optimizer(
            self._critic.role.trainable_parameters(),
            eps=ADAM_EPS,
            max_grad_norm=config.max_grad_norm,
        )

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """Rewards, values and advantages; then the passes of policy and critic."""
        lessons, targets = self._lessons(minibatches, kl_coef)
        metrics: Metrics = {"explained_variance": _explained(targets)}
        passes = self._config.epochs
        if update >= self._ppo.critic_warmup_updates:
            metrics |= self._passes.run(lessons, update, kl_coef)
            passes = int(metrics["passes"])
        rate = policy_rate(self._config, update) / self._config.learning_rate
        return metrics | self._train_critic(
            targets,
            update,
            self._ppo.critic_epochs or passes,
            rate * self._ppo.critic_learning_rate,
        )

    @torch.no_grad()
    def _lessons(
        self, minibatches: Minibatches, kl_coef: float
    ) -> tuple[list[list[Lesson]], list[list[_Targets]]]:
        """Per-token rewards, values, advantages; whitened over all real tokens of the batch."""
        ppo, micros = self._ppo, flat(minibatches)
        targets, advantages = [], []
        for micro, values in zip(micros, self._values(micros), strict=True):
            mask = micro.batch.mask
            rewards = self._penalty.token_rewards(micro, kl_coef)
            own, returns = gae(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
            targets.append(_Targets(micro, values, returns))
            advantages.append(own)
        if ppo.whiten_advantages:
            mask = padded([micro.batch.mask for micro in micros], False)
            advantages = unpadded(masked_whiten(padded(advantages), mask), micros)
        lessons = [Lesson(m, a, m.batch.mask) for m, a in zip(micros, advantages, strict=True)]
        sizes = [len(minibatch) for minibatch in minibatches]
        return _regrouped(lessons, sizes), _regrouped(targets, sizes)

    def _values(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        """[N, C] of each micro-batch, by its owner."""
        found = [torch.zeros_like(micro.logprobs) for micro in micros]
        owners = [micro.owner for micro in micros]
        for place, counts in self._critic.role.turns(range(len(micros)), owners):
            values = self._critic.values(micros[place])
            if counts:
                found[place] = values
        ranks.add_up(found)
        return found

    def _train_critic(
        self, targets: list[list[_Targets]], update: int, passes: int, rate: float
    ) -> Metrics:
        loss, tokens, norms = 0.0, 0, []
        for epoch in range(passes):
            for index in minibatch_order(len(targets), self._seed, update, epoch):
                total, count = self._critic_gradient(targets[index])
                loss, tokens = loss + total, tokens + count
                norms.append(self._critic_optimizer.step(rate))
        return {
            "value_loss": loss / tokens,
            "critic_grad_norm": sum(norms) / len(norms),
            "critic_undone_steps": float(self._critic_optimizer.undone),
        }

    def _critic_gradient(self, targets: Sequence[_Targets]) -> tuple[float, int]:
        """The gradient of a minibatch's mean value loss; returns the loss's sum, and its tokens."""
        tokens = sum(int(target.micro.batch.mask.sum()) for target in targets)
        loss = 0.0
        owners = [target.micro.owner for target in targets]
        for target, counts in self._critic.role.turns(targets, owners):
            mask, values = target.micro.batch.mask, self._critic.values(target.micro)
            losses = value_loss(values, target.values, target.returns, self._ppo.value_clip_range)
            loss += add_gradient(counts * losses, mask, tokens, partial(self._blame, target.micro))
        (loss,) = ranks.summed(loss)
        return loss * tokens, tokens

    def _blame(self, micro: MicroBatch, row: int) -> None:
        self._tell(f"policy: value loss is not finite: {micro.episodes[row]}")

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Critic and both optimizers."""
        tensors = {
            "critic": self._critic.role.state(),
            "policy_optimizer": self._passes.optimizer.state(),
            "critic_optimizer": self._critic_optimizer.state(),
        }
        return tensors, {}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        self._critic.role.load_state(tensors["critic"])
        self._passes.optimizer.load_state(tensors["policy_optimizer"])
        self._critic_optimizer.load_state(tensors["critic_optimizer"])


def _regrouped(items: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """A flat list cut into parts of these sizes."""
    parts: list[list[T]] = []
    start = 0
    for size in sizes:
        parts.append(list(items[start : start + size]))
        start += size
    return parts


def _explained(targets: list[list[_Targets]]) -> float:
    """Explained variance of the values before this update, mean over the minibatches."""
    shares = []
    for row in targets:
        masks = [target.micro.batch.mask for target in row]
        values = torch.cat([x.values[mask] for x, mask in zip(row, masks, strict=True)])[None]
        returns = torch.cat([x.returns[mask] for x, mask in zip(row, masks, strict=True)])[None]
        shares.append(float(explained_variance(values, returns, torch.ones_like(values) > 0)))
    return sum(shares) / len(shares)
