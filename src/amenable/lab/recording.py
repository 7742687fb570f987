"""Stand-ins for the time of one run: an optimizer that only records, a critic that is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amenable.lab.expected_gradients import Enumerated
from amenable.lab.gradient_cells import prefix_values, token_rewards
from amenable.lab.optima import World
from amenable.losses import policy as policy_losses
from amenable.models.heads import ScalarHead
from amenable.train import passes, policy_gradient, ppo
from amenable.train.experience import flat
from amenable.train.loop import Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amenable.artifacts import StageContext
    from amenable.models.roles import Role
    from amenable.train.experience import MicroBatch, Minibatches
    from amenable.train.loop import Metrics
    from amenable.train.policy_roles import PolicyRoles


@contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    """While it holds, an attribute (or an entry of a dictionary) is another."""
    holds = isinstance(where, dict)
    real = where[name] if holds else vars(where)[name]
    put = where.__setitem__ if holds else partial(setattr, where)
    put(name, value)
    try:
        yield
    finally:
        put(name, real)


@contextmanager
def recorded(axes: Tensor, start: Sequence[Tensor] | None) -> Iterator[list[Tensor]]:
    """While it holds, the optimizer that steps first is the policy's, and none moves anything.

    Args:
        axes: [D, d] directions.
        start: weights that the policy takes at its first step, whose gradient is then left out.

    Yields:
        [d] projections of the gradients, one a step.
    """
    rows: list[Tensor] = []
    first: list[Optimizer] = []

    def step(self: Optimizer, rate: float) -> float:
        weights = self._parameters
        gradient = _gathered(weights)
        self._adam.zero_grad(set_to_none=True)
        if not first:
            first.append(self)
            if start is not None:
                _overwrite(weights, start)
                return float(gradient.norm())
        if self is first[0]:
            rows.append(gradient @ axes)
        return float(gradient.norm())

    with replaced(Optimizer, "step", step):
        yield rows


def _gathered(weights: Sequence[nn.Parameter]) -> Tensor:
    """[D] float64."""
    return torch.cat(
        [
            (torch.zeros_like(weight) if weight.grad is None else weight.grad).double().flatten()
            for weight in weights
        ]
    )


def _overwrite(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


@dataclass
class _ExactCritic:
    """Reads the expected return of every prefix from a table; nothing of it can be trained."""

    role: Role
    table: dict[tuple[str, str], Tensor]
    """[C] by prompt and completion."""

    def values(self, micro: MicroBatch) -> Tensor:
        """[N, C], 0 off the mask."""
        width = micro.batch.mask.shape[1]
        rows = [self.table[e.prompt.text, e.text][:width] for e in micro.episodes]
        values = torch.stack(rows).float() * micro.batch.mask
        return values + 0.0 * self.role.scalar_head.weight.sum()


@contextmanager
def exact_critic(world: World, tables: Enumerated) -> Iterator[None]:
    """While it holds, PPO's critic is right everywhere."""
    values = prefix_values(tables, token_rewards(tables))
    problem = world.problem
    table = {
        (prompt, text): values[p, s]
        for p, prompt in enumerate(problem.prompts)
        for s, text in enumerate(problem.texts)
    }

    def make(ctx: StageContext, roles: PolicyRoles) -> _ExactCritic:
        width = roles.policy.plain.config.get_text_config().hidden_size
        head = ScalarHead.from_weight(torch.zeros(1, width))
        return _ExactCritic(roles.foundation.role("critic", None, head=head), table)

    with replaced(ppo, "make_critic", make):
        yield


@dataclass(frozen=True)
class Watched:
    """An update as the learner was given it."""

    micros: Sequence[MicroBatch]

    policy: PreTrainedModel
    """A copy from before the update's first step."""


@contextmanager
def watched() -> Iterator[tuple[list[Watched], list[float]]]:
    """While it holds, critic-free updates are noted, and how far first ratios are from 1.

    Yields:
        The updates; and the largest |ratio - 1| of each forward pass before an update's first step,
        if `policy.epochs` and `policy.minibatches` are 1.
    """
    updates: list[Watched] = []
    ratios: list[float] = []
    real_learn, real_ratios = policy_gradient.PolicyGradientLearner.learn, policy_losses.ratios

    def learn(
        self: policy_gradient.PolicyGradientLearner,
        minibatches: Minibatches,
        update: int,
        kl_coef: float,
    ) -> Metrics:
        updates.append(Watched(flat(minibatches), deepcopy(self._passes._role.plain)))
        return real_learn(self, minibatches, update, kl_coef)

    def noted(new: Tensor, old: Tensor) -> Tensor:
        found = real_ratios(new, old)
        ratios.append(float((found - 1).abs().max()))
        return found

    with (
        replaced(policy_gradient.PolicyGradientLearner, "learn", learn),
        replaced(passes, "ratios", noted),
    ):
        yield updates, ratios
