"""Proximal policy optimisation (Schulman et al. 2017) with a per-token KL reward.

Follows the practice of Stiennon et al. 2020 and its published re-implementations; departures
from the paper: the KL to the reference sits in the reward, advantages are whitened over the
whole roll-out batch, policy and critic have an optimizer each, minibatches hold whole prompts,
and their composition is drawn once per roll-out batch so that ratios start at exactly 1.
Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from amenable.data.collate import seeded_epochs
from amenable.errors import NumericsError, RecipeError
from amenable.losses.advantages import gae, shape_rewards
from amenable.losses.kl import adaptive_kl_coef
from amenable.losses.masked import masked_whiten
from amenable.losses.policy import clipped_tokens, ppo_policy_loss, ratios
from amenable.losses.value import explained_variance, value_loss
from amenable.models.heads import ScalarHead
from amenable.models.logprobs import scatter
from amenable.models.roles import Role
from amenable.train.loop import Metrics, Optimizer, add_gradient, learning_rate
from amenable.train.on_policy import (
    EXACT,
    MicroBatch,
    Minibatches,
    PolicyRoles,
    run_on_policy,
)

if TYPE_CHECKING:
    from amenable.artifacts import StageContext

_ADAM_EPS = 1e-5


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
        head = ScalarHead.from_weight(torch.zeros_like(reward.scalar_head.weight))
        role = _HeadOnly(reward.model, reward.adapter, head.to(reward.device), reward.dtype)
        return HeadCritic(role)
    if reward is not None:
        folder = ctx.folder.models / "reward"
        head = ScalarHead.from_weight(reward.scalar_head.weight.detach())
        return RoleCritic(foundation.role("critic", folder, head=head), roles.reward_offset)
    sft = ctx.folder.models / "sft"
    width = roles.policy.plain.config.get_text_config().hidden_size
    head = ScalarHead.from_weight(torch.zeros(1, width))
    return RoleCritic(foundation.role("critic", sft if sft.is_dir() else None, head=head))


class _HeadOnly(Role):
    """A role of which only the scalar head is trained."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.scalar_head.parameters())

    def state(self) -> dict[str, Tensor]:
        return {"scalar_head": self.scalar_head.weight.detach().clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.scalar_head.weight.copy_(state["scalar_head"])


@dataclass(frozen=True)
class _Lesson:
    """A micro-batch with what PPO learns from it."""

    micro: MicroBatch
    values: Tensor
    """[N, C] of the critic before this update."""
    returns: Tensor
    """[N, C] value targets."""
    advantages: Tensor
    """[N, C], whitened."""


class PPOLearner:
    """Clipped policy and value losses over a few passes of each roll-out batch."""

    def __init__(self, ctx: StageContext, roles: PolicyRoles) -> None:
        config = ctx.recipe.policy
        self._config, self._ppo, self._seed = config, config.ppo, ctx.recipe.seed
        self.minibatches = config.ppo.minibatches
        self._policy, self._critic = roles.policy, make_critic(ctx, roles)
        self._kl_coef = config.kl.coef
        self._policy_optimizer, self._critic_optimizer = (
            Optimizer(
                role.trainable_parameters(), eps=_ADAM_EPS, max_grad_norm=config.max_grad_norm
            )
            for role in (self._policy, self._critic.role)
        )

    def learn(self, minibatches: Minibatches, update: int) -> Metrics:
        """Steps 3 to 5: rewards and advantages, then the passes, then the KL controller."""
        lessons = self._lessons(minibatches)
        metrics = self._passes(lessons, update)
        micros = [micro for minibatch in minibatches for micro in minibatch]
        kl = float(torch.cat([micro.sequence_kl for micro in micros]).mean())
        reward = float(torch.cat([micro.scores for micro in micros]).mean())
        metrics |= {"kl_coef": self._kl_coef, "objective": reward - self._kl_coef * kl}
        if self._config.kl.adaptive:
            episodes = sum(len(micro.episodes) for micro in micros)
            self._kl_coef = adaptive_kl_coef(
                self._kl_coef, kl, self._config.kl.target, episodes, self._config.kl.horizon
            )
        return metrics

    @torch.no_grad()
    def _lessons(self, minibatches: Minibatches) -> list[list[_Lesson]]:
        """Per-token rewards, values, advantages; whitened over all real tokens of the batch."""
        ppo = self._ppo
        lessons = []
        for minibatch in minibatches:
            row = []
            for micro in minibatch:
                mask = micro.batch.mask
                values = self._critic.values(micro)
                rewards = shape_rewards(micro.scores, micro.kl, mask, self._kl_coef)
                advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
                row.append(_Lesson(micro, values, returns, advantages))
            lessons.append(row)
        return _whitened(lessons) if ppo.whiten_advantages else lessons

    def _passes(self, lessons: list[list[_Lesson]], update: int) -> Metrics:
        """Steps of policy and critic over the minibatches, in an order drawn for each pass."""
        totals = _Totals()
        rate = learning_rate(
            update,
            self._config.updates,
            self._config.learning_rate,
            final_fraction=self._config.final_learning_rate_fraction,
        )
        for row in lessons:
            totals.add_explained(row)
        passes = self._policy_passes(lessons, update, rate, totals)
        critic_rate = rate / self._config.learning_rate * self._ppo.critic_learning_rate
        for epoch in range(self._ppo.critic_epochs or passes):
            for index in seeded_epochs(len(lessons), 1, self._seed + 1000 * update + epoch):
                self._critic_step(lessons[index], critic_rate, totals)
        return totals.metrics() | {"learning_rate": rate, "passes": float(passes)}

    def _policy_passes(
        self, lessons: list[list[_Lesson]], update: int, rate: float, totals: _Totals
    ) -> int:
        """The policy's steps; returns how many passes were made."""
        for epoch in range(self._ppo.epochs):
            for index in seeded_epochs(len(lessons), 1, self._seed + 1000 * update + epoch):
                totals.start_minibatch()
                self._policy_step(lessons[index], rate, totals)
            if totals.approx_kl_of_minibatch() > self._ppo.max_approx_kl:
                break
        return epoch + 1

    def _policy_step(self, lessons: list[_Lesson], rate: float, totals: _Totals) -> None:
        tokens = _tokens(lessons)
        for lesson in lessons:
            logprobs = self._policy_gradient(lesson, tokens, totals)
            if not totals.policy_norms:
                _check_ratio(logprobs, lesson.micro)
        totals.policy_norms.append(self._policy_optimizer.step(rate))

    def _critic_step(self, lessons: list[_Lesson], rate: float, totals: _Totals) -> None:
        tokens = _tokens(lessons)
        for lesson in lessons:
            mask, values = lesson.micro.batch.mask, self._critic.values(lesson.micro)
            losses = value_loss(values, lesson.values, lesson.returns, self._ppo.value_clip_range)
            totals.add("value_loss", losses.detach(), mask)
            add_gradient(losses, mask, tokens)
        totals.critic_norms.append(self._critic_optimizer.step(rate))

    def _policy_gradient(self, lesson: _Lesson, tokens: int, totals: _Totals) -> Tensor:
        micro, mask, clip = lesson.micro, lesson.micro.batch.mask, self._ppo.clip_range
        logprobs = self._policy.logprobs(micro.batch, temperature=self._config.temperature).logprobs
        losses = ppo_policy_loss(logprobs, micro.logprobs, lesson.advantages, clip)
        add_gradient(losses, mask, tokens)
        new = logprobs.detach()
        totals.add("policy_loss", losses.detach(), mask)
        totals.add(
            "clip_fraction", clipped_tokens(new, micro.logprobs, lesson.advantages, clip), mask
        )
        totals.add("approx_kl", 0.5 * (new - micro.logprobs).square(), mask)
        totals.ratio_max = max(totals.ratio_max, float(ratios(new, micro.logprobs)[mask].max()))
        return new

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Critic, both optimizers, KL controller."""
        tensors = {
            "critic": self._critic.role.state(),
            "policy_optimizer": self._policy_optimizer.state(),
            "critic_optimizer": self._critic_optimizer.state(),
        }
        return tensors, {"kl_coef": self._kl_coef}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        self._critic.role.load_state(tensors["critic"])
        self._policy_optimizer.load_state(tensors["policy_optimizer"])
        self._critic_optimizer.load_state(tensors["critic_optimizer"])
        self._kl_coef = float(numbers["kl_coef"])


def _tokens(lessons: Sequence[_Lesson]) -> int:
    """Real tokens of a minibatch: the denominator of its losses."""
    return sum(int(lesson.micro.batch.mask.sum()) for lesson in lessons)


def _whitened(lessons: list[list[_Lesson]]) -> list[list[_Lesson]]:
    """The same lessons with advantages of mean 0 and variance 1 over all their real tokens."""
    flat = [lesson for minibatch in lessons for lesson in minibatch]
    sizes = [int(lesson.micro.batch.mask.sum()) for lesson in flat]
    tokens = torch.cat([lesson.advantages[lesson.micro.batch.mask] for lesson in flat])
    whitened = iter(masked_whiten(tokens, torch.ones_like(tokens, dtype=torch.bool)).split(sizes))
    return [
        [
            _Lesson(
                lesson.micro,
                lesson.values,
                lesson.returns,
                scatter(next(whitened), lesson.micro.batch.mask),
            )
            for lesson in minibatch
        ]
        for minibatch in lessons
    ]


def _check_ratio(logprobs: Tensor, micro: MicroBatch) -> None:
    """Before the first step the policy is the one that sampled: every ratio must be 1.

    Raises:
        NumericsError: it is not.
    """
    worst = float((logprobs - micro.logprobs).abs().max())
    if worst > EXACT:
        raise NumericsError(
            "before the first step of an update old and new log-probabilities differ by "
            f"{worst:.2g} nats (allowed: {EXACT:g}): the forward pass is not repeatable. "
            "Is dropout off?"
        )


class _Totals:
    """Sums over the passes of one update, and their means."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._mark = (0.0, 0)
        self.policy_norms: list[float] = []
        self.critic_norms: list[float] = []
        self._explained: list[float] = []
        self.ratio_max = 0.0

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Count the real entries of [N, C] values."""
        self._sums[name] = self._sums.get(name, 0.0) + float(values[mask].float().sum())
        self._tokens[name] = self._tokens.get(name, 0) + int(mask.sum())

    def add_explained(self, lessons: list[_Lesson]) -> None:
        """Explained variance of the values that the critic gave before this update."""
        masks = [lesson.micro.batch.mask for lesson in lessons]
        values = torch.cat([x.values[mask] for x, mask in zip(lessons, masks, strict=True)])[None]
        returns = torch.cat([x.returns[mask] for x, mask in zip(lessons, masks, strict=True)])[None]
        mask = torch.ones_like(values, dtype=torch.bool)
        self._explained.append(float(explained_variance(values, returns, mask)))

    def start_minibatch(self) -> None:
        """Remember where the minibatch begins, for its own approximate KL."""
        self._mark = (self._sums.get("approx_kl", 0.0), self._tokens.get("approx_kl", 0))

    def approx_kl_of_minibatch(self) -> float:
        """Nats a token, of the last minibatch."""
        total, tokens = self._mark
        return (self._sums["approx_kl"] - total) / max(1, self._tokens["approx_kl"] - tokens)

    def metrics(self) -> Metrics:
        """Means over tokens, steps and minibatches."""
        means = {name: self._sums[name] / self._tokens[name] for name in self._sums}
        return means | {
            "ratio_max": self.ratio_max,
            "grad_norm": sum(self.policy_norms) / len(self.policy_norms),
            "critic_grad_norm": sum(self.critic_norms) / len(self.critic_norms),
            "explained_variance": sum(self._explained) / len(self._explained),
        }
