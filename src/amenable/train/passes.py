"""Passes of the policy over a roll-out batch: what PPO and its critic-free relatives share.

Each pass visits every minibatch once, in an order drawn for it; each minibatch is one optimizer
step, its losses weighted over all of its tokens at once, so that micro-batches do not change it.
Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from amenable.data.collate import seeded_epochs
from amenable.errors import NumericsError
from amenable.losses.aggregation import Aggregation, token_weights
from amenable.losses.kl import k2, k3, kl_loss
from amenable.losses.policy import (
    clipped_tokens,
    importance_weights,
    ppo_policy_loss,
    ratios,
)
from amenable.ranks import group as ranks
from amenable.train.experience import Episode, MicroBatch, padded, unpadded
from amenable.train.loop import Metrics, Optimizer, add_gradient, learning_rate

if TYPE_CHECKING:
    from amenable.config.policy import PolicyConfig
    from amenable.models.roles import Role

ADAM_EPS = 1e-5
EXACT = 1e-6
"""Nats: the same pass twice, and policy against reference, before the first step."""

CLIP_RANGE = (0.2, 0.2)


@dataclass(frozen=True)
class Lesson:
    """A micro-batch with what the policy learns from it."""

    micro: MicroBatch
    advantages: Tensor
    """[N, C] constants; a completion of which all are 0 still weighs in the means."""
    learnt: Tensor
    """[N, C] True at the tokens that the loss is over."""


Lessons = list[list[Lesson]]


class PolicyLoss(Protocol):
    """An unreduced loss of tokens."""

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        """[N, C] from [N, C] each."""
        ...


@dataclass(frozen=True)
class Surrogate:
    """What a step of the policy minimises: a loss of tokens and how tokens are averaged."""

    loss: PolicyLoss
    clipped: PolicyLoss
    """[N, C] bool: the tokens whose gradient clipping stops."""
    aggregation: Aggregation
    length: int = 1
    """Divides the sums of tokens under "constant"."""


def clip_sides(policy: PolicyConfig, own: tuple[float, float]) -> tuple[float, float]:
    """The clip range below and above 1: the recipe's, or the algorithm's own."""
    if not policy.clip_range:
        return own[0], policy.clip_range_high or own[1]
    return policy.clip_range, policy.clip_range_high or policy.clip_range


def clipped_surrogate(
    policy: PolicyConfig,
    aggregation: Aggregation,
    own_range: tuple[float, float] = CLIP_RANGE,
    length: int = 1,
) -> Surrogate:
    """PPO's clipped loss of each token."""
    sides, dual = clip_sides(policy, own_range), policy.dual_clip or float("inf")
    return Surrogate(
        loss=lambda new, old, a, mask: ppo_policy_loss(new, old, a, sides, dual),
        clipped=lambda new, old, a, mask: clipped_tokens(new, old, a, sides, dual),
        aggregation=aggregation,
        length=length,
    )


def loss_penalty(policy: PolicyConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The KL of the loss, [N, C] of (present, old, reference) log-probabilities."""
    estimator = policy.kl.loss_estimator
    if estimator == "weighted-k3":
        return kl_loss
    plain = {"k2": k2, "k3": k3}[estimator]
    return lambda new, old, ref: plain(new, ref)


class PolicyPasses:
    """Steps of the policy's optimizer over roll-out batches.

    Args:
        config: the policy section.
        role: the policy.
        seed: of the order of minibatches.
        surrogate: the loss.
        kl_in_loss: add the KL, weighted with the present coefficient, to the loss.
        on_broken: hears of each completion whose loss is not finite.
    """

    def __init__(
        self,
        config: PolicyConfig,
        role: Role,
        seed: int,
        surrogate: Surrogate,
        *,
        kl_in_loss: bool,
        on_broken: Callable[[Episode], None],
    ) -> None:
        self._config, self._role, self._seed = config, role, seed
        self._surrogate = surrogate
        self._penalty = loss_penalty(config) if kl_in_loss else None
        self._on_broken = on_broken
        self.optimizer = Optimizer(
            role.trainable_parameters(), eps=ADAM_EPS, max_grad_norm=config.max_grad_norm
        )

    def run(self, lessons: Lessons, update: int, kl_coef: float) -> Metrics:
        """All passes over a roll-out batch; they end early where the policy has moved far enough.

        Returns:
            Metrics, among them `passes`.
        """
        totals, rate = Totals(), policy_rate(self._config, update)
        for epoch in range(self._config.epochs):
            for index in minibatch_order(len(lessons), self._seed, update, epoch):
                totals.start_minibatch()
                self._step(lessons[index], rate, kl_coef, totals)
            if totals.approx_kl_of_minibatch() > self._config.max_approx_kl:
                break
        return totals.metrics() | {
            "learning_rate": rate,
            "passes": float(epoch + 1),
            "undone_steps": float(self.optimizer.undone),
        }

    def _step(self, lessons: Sequence[Lesson], rate: float, kl_coef: float, totals: Totals) -> None:
        weights = lesson_weights(lessons, self._surrogate.aggregation, self._surrogate.length)
        owners = [lesson.micro.owner for lesson in lessons]
        parts = list(zip(lessons, weights, strict=True))
        for (lesson, weight), counts in self._role.turns(parts, owners):
            new = self._gradient(lesson, weight * counts, kl_coef, totals if counts else Totals())
            if not totals.norms and "ratio" not in self._config.gate_skip:
                check_ratio(new, lesson.micro)
        totals.share()
        totals.norms.append(self.optimizer.step(rate))

    def _gradient(self, lesson: Lesson, weights: Tensor, kl_coef: float, totals: Totals) -> Tensor:
        micro, advantages, mask = lesson.micro, lesson.advantages, lesson.learnt
        entropy_coef = self._config.entropy_coef
        output = self._role.logprobs(
            micro.batch, temperature=self._config.temperature, with_entropy=bool(entropy_coef)
        )
        new, old = output.logprobs, micro.logprobs
        losses = self._surrogate.loss(new, old, advantages, mask)
        totals.add("policy_loss", losses.detach(), mask)
        if self._penalty is not None:
            penalty = self._penalty(new, old, micro.ref_logprobs)
            totals.add("kl_penalty", penalty.detach(), mask)
            losses = losses + kl_coef * penalty
        if output.entropy is not None:
            losses = losses - entropy_coef * output.entropy
        if micro.sampler_logprobs is not None and self._config.vllm.ratio_cap:
            losses = losses * importance_weights(
                old, micro.sampler_logprobs, self._config.vllm.ratio_cap
            )
        add_gradient(losses * weights, mask, 1, lambda row: self._on_broken(micro.episodes[row]))
        new = new.detach()
        totals.add("clip_fraction", self._surrogate.clipped(new, old, advantages, mask), mask)
        totals.add("approx_kl", 0.5 * (new - old).square(), mask)
        totals.ratio_max = max(totals.ratio_max, float(ratios(new, old)[micro.batch.mask].max()))
        return new


def policy_rate(config: PolicyConfig, update: int) -> float:
    """The policy's learning rate in an update."""
    return learning_rate(
        update,
        config.updates,
        config.learning_rate,
        final_fraction=config.final_learning_rate_fraction,
    )


def minibatch_order(count: int, seed: int, update: int, epoch: int) -> Sequence[int]:
    """The order in which a pass visits the minibatches."""
    return list(seeded_epochs(count, 1, seed + 1000 * update + epoch))


def lesson_weights(
    lessons: Sequence[Lesson], aggregation: Aggregation, length: int = 1
) -> list[Tensor]:
    """[N, C] of each micro-batch: what a token's loss counts in the minibatch."""
    learnt = padded([lesson.learnt for lesson in lessons], False)
    weights = token_weights(learnt, aggregation, length)
    return unpadded(weights, [lesson.micro for lesson in lessons])


def check_ratio(logprobs: Tensor, micro: MicroBatch) -> None:
    """Before the first step the policy is the one that sampled: every ratio must be 1.

    Raises:
        NumericsError: it is not.
    """
    worst = float((logprobs - micro.logprobs).abs().max())
    if not worst <= EXACT:
        raise NumericsError(
            "before the first step of an update old and new log-probabilities differ by "
            f"{worst:.2g} nats (allowed: {EXACT:g}): the forward pass is not repeatable. "
            "Is dropout off?"
        )


class Totals:
    """Sums over the passes of one update, and their means.

    Each rank adds what it sees, and `share` makes it everybody's.
    """

    def __init__(self) -> None:
        self._own: dict[str, tuple[float, int]] = {}
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._mark = (0.0, 0)
        self.norms: list[float] = []
        self.ratio_max = 0.0

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Count the real entries of [N, C] values."""
        total, tokens = self._own.get(name, (0.0, 0))
        wide = values[mask].to(torch.promote_types(values.dtype, torch.float32))
        self._own[name] = total + float(wide.sum()), tokens + int(mask.sum())

    def share(self) -> None:
        """Count what every rank has added since the last time."""
        everybodys = ranks.gathered((self._own, self.ratio_max))
        self.ratio_max = max(ratio for _, ratio in everybodys)
        for own, _ in everybodys:
            for name, (total, tokens) in own.items():
                self._sums[name] = self._sums.get(name, 0.0) + total
                self._tokens[name] = self._tokens.get(name, 0) + tokens
        self._own = {}

    def start_minibatch(self) -> None:
        """Remember where the minibatch begins, for its own approximate KL."""
        self._mark = (self._sums.get("approx_kl", 0.0), self._tokens.get("approx_kl", 0))

    def approx_kl_of_minibatch(self) -> float:
        """Nats a token, of the last minibatch."""
        total, tokens = self._mark
        return (self._sums["approx_kl"] - total) / max(1, self._tokens["approx_kl"] - tokens)

    def metrics(self) -> Metrics:
        """Means over tokens and steps."""
        means = {name: self._sums[name] / max(1, self._tokens[name]) for name in self._sums}
        return means | {"ratio_max": self.ratio_max, "grad_norm": sum(self.norms) / len(self.norms)}
