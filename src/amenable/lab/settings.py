"""The table of fixed points: which settings the lab runs, and where each of them must land.

"pi_star" rows have the sequence KL (k1) inside the reward, or Bradley-Terry labels, and must land
on ref(y) exp(r(y) / beta). "own" rows have another optimum, computed without any of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amenable.lab.optima import World, best_of_n
from amenable.lab.preferences import (
    kto_gap,
    least_loss_policy,
    likelihood_and_odds,
    logistic,
    mean_logistic,
    squared,
)
from amenable.lab.problems import Floats
from amenable.lab.rows import Target
from amenable.lab.stationary import (
    above_mean,
    above_mean_whitened,
    against_one,
    stationary_policy,
)

KL_BOUND = 0.01
"""Nats that a policy may be from its target, mean over prompts."""

GAP_BOUND = 0.02
"""Share of the objective, between reference and target, that it may leave."""

LOSS_GAP_BOUND = 0.01
"""Share of the loss, between reference and infimum, that KTO may leave."""

EPISODES = {"table": 96, "llama": 64}
"""Completions of an update, by kind of model."""

UPDATES = {"table": 160, "llama": 300}
"""Updates of an on-policy run, before its effort."""

STEPS = {"table": 120, "llama": 200}
"""Steps of an off-policy run, each on all pairs, before its effort."""

RATES = {"random table": 0.2, "levels table": 0.1, "structured llama": 0.005}
"""Adam's rate at the start, by problem; it falls to 0."""

Optimum = Callable[[World, float], Floats]
"""[P, S] log-probabilities from (problem, KL weight of the run)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of the table.

    Args:
        algorithm: a name of the algorithm table.
        name: which settings of it.
        keys: dotted recipe keys over those that every run has.
        optimum: its own one; None: the closed form.
        gap: measured in place of the KL to a target: the share of its loss that is left.
        pairs: learns from pairs with Bradley-Terry labels; else from prompts.
        flip_rate: share of the labels that name the wrong side.
        samples: completions of each prompt.
        coef: weight of the KL term; 0: `share` of the problem's beta.
        share: IPO's tau is compared with probabilities, which vary a quarter as much as rewards.
        per_deviation: the advantage is divided by a deviation, so the KL weight is in deviations:
            this times beta over the deviation of the reward under the reference. 0: it is not.
        effort: factor of updates or steps.
        rate: factor of the learning rate.
        rates: the same for single problems.
    """

    algorithm: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    optimum: Optimum | None = None
    gap: Callable[[World, Floats], float] | None = None
    pairs: bool = False
    flip_rate: float = 0.0
    samples: int = 8
    coef: float = 0.0
    share: float = 1.0
    per_deviation: float = 0.0
    effort: float = 1.0
    rate: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """Which optimum it is measured against."""
        return "own" if self.optimum is not None or self.gap is not None else "pi_star"

    def kl_coef(self, world: World) -> float:
        """Weight of the KL term, rounded to what the table prints."""
        if not self.per_deviation:
            return self.coef or self.share * world.problem.beta
        mass = np.exp(world.reference)
        means = (mass * world.rewards).sum(1, keepdims=True)
        deviation = float(np.sqrt((mass * (world.rewards - means) ** 2).sum(1)).mean())
        return round(self.per_deviation * world.problem.beta / deviation, 2)

    def recipe_keys(self, world: World) -> dict[str, Any]:
        """Every key of the run that depends on the setting."""
        problem = world.problem
        rate = RATES[problem.name] * self.rates.get(problem.name, self.rate)
        own = self._pair_keys(problem.model, rate) if self.pairs else self._keys(problem.model)
        coef = self.kl_coef(world)
        return {
            "policy.algorithm": self.algorithm,
            "policy.kl.coef": coef,
            "policy.preference.beta": coef,
            "policy.learning_rate": rate,
            "policy.ppo.critic_learning_rate": rate,
            **own,
            **self.keys,
        }

    def _keys(self, model: str) -> dict[str, Any]:
        return {
            "policy.updates": round(UPDATES[model] * self.effort),
            "policy.prompts_per_update": EPISODES[model] // self.samples,
            "policy.samples_per_prompt": self.samples,
        }

    def _pair_keys(self, model: str, rate: float) -> dict[str, Any]:
        steps = round(STEPS[model] * self.effort)
        return {
            "policy.preference.learning_rate": rate,
            "policy.preference.max_steps": steps,
            "policy.preference.epochs": float(steps),
            "policy.preference.micro_batch_tokens": 10**6,
            "policy.preference.warmup_fraction": 0.0,
            "policy.preference.max_grad_norm": 1e3,
            "policy.preference.evaluations": 1,
        }


_IN_REWARD = {"policy.kl.placement": "reward"}
_TWO_PASSES = {"policy.epochs": 2}


def _grpo_in_pairs(world: World, coef: float) -> Floats:
    return stationary_policy(world, against_one, coef=coef, by_length=True)


ON_POLICY = (
    Setting(
        algorithm="ppo",
        name="lambda 1",
        keys={
            "policy.ppo.gae_lambda": 1.0,
            "policy.ppo.whiten_advantages": False,
            "policy.ppo.value_clip_range": 1e6,
            "policy.ppo.critic_epochs": 3,
        },
    ),
    Setting(algorithm="rloo", name="KL in the reward"),
    Setting(algorithm="reinforce++", name="KL in the reward", rates={"random table": 0.25}),
    Setting(algorithm="reinforce++-baseline", name="KL in the reward", keys=_IN_REWARD),
    Setting(algorithm="grpo", name="KL in the reward", keys=_IN_REWARD),
    Setting(algorithm="dr-grpo", name="KL in the reward", keys=_IN_REWARD),
    Setting(
        algorithm="gspo",
        name="KL in the reward, two passes",
        keys=_IN_REWARD | _TWO_PASSES,
        rates={"random table": 0.5, "structured llama": 0.5},
    ),
    Setting(algorithm="online-dpo", name="soft labels", rates={"random table": 1.5}),
    Setting(
        algorithm="grpo",
        name="as published, groups of 2",
        optimum=_grpo_in_pairs,
        samples=2,
        per_deviation=0.3,
        effort=3.5,
        rates={"random table": 0.25, "levels table": 0.5},
    ),
    Setting(
        algorithm="dr-grpo",
        name="as published",
        optimum=lambda world, coef: stationary_policy(
            world, above_mean(8), coef=coef, by_length=False
        ),
        effort=1.5,
    ),
    Setting(
        algorithm="reinforce++-baseline",
        name="as published",
        optimum=lambda world, coef: stationary_policy(
            world, above_mean_whitened(8), coef=coef, by_length=False
        ),
        per_deviation=1.0,
        effort=2.5,
        rates={"random table": 0.25, "levels table": 0.5},
    ),
    Setting(
        algorithm="best-of-n",
        name="one round, n = 2",
        keys={"policy.best_of_n.sampler": "reference"},
        optimum=lambda world, coef: best_of_n(world.reference, world.rewards, 2),
        samples=2,
        effort=4.5,
        rates={"random table": 0.1, "levels table": 0.2},
    ),
)

OFF_POLICY = (
    Setting(algorithm="dpo", name="exact labels", pairs=True),
    Setting(
        algorithm="robust-dpo",
        name="a tenth of the labels flipped",
        keys={"policy.preference.flip_rate": 0.1},
        pairs=True,
        flip_rate=0.1,
    ),
    Setting(
        algorithm="ipo",
        name="exact labels",
        optimum=lambda world, coef: least_loss_policy(world, squared(coef)),
        pairs=True,
        share=0.25,
    ),
    Setting(
        algorithm="cdpo",
        name="label smoothing 0.1",
        keys={"policy.preference.label_smoothing": 0.1},
        optimum=lambda world, coef: least_loss_policy(world, logistic(coef, 0.1)),
        pairs=True,
    ),
    Setting(
        algorithm="simpo",
        name="beta 4, margin 1",
        keys={"policy.preference.simpo_beta": 4.0, "policy.preference.simpo_margin": 1.0},
        optimum=lambda world, coef: least_loss_policy(world, mean_logistic(4.0, 1.0)),
        pairs=True,
    ),
    Setting(
        algorithm="orpo",
        name="lambda 0.5",
        keys={"policy.preference.orpo_weight": 0.5},
        optimum=lambda world, coef: least_loss_policy(world, likelihood_and_odds(0.5)),
        pairs=True,
    ),
    Setting(
        algorithm="kto",
        name="beta 1",
        gap=kto_gap,
        pairs=True,
        coef=1.0,
        effort=2.5,
        rates={"levels table": 2.0, "structured llama": 2.0},
    ),
)

SETTINGS = ON_POLICY + OFF_POLICY
"""The table."""
