"""Where algorithms must land, from enumerated tables. P prompts, S completions; float64, nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from amenable.lab.problems import Floats, Problem

_LARGEST_SCALE = 1e4


@dataclass(frozen=True)
class World:
    """A problem with its reference enumerated and its reward scaled.

    Args:
        problem: what it is.
        reference: [P, S] log-probabilities of the reference policy.
        rewards: [P, S] in units of reward.
    """

    problem: Problem
    reference: Floats
    rewards: Floats

    @property
    def pi_star(self) -> Floats:
        """[P, S] log-probabilities of the KL-regularised optimum."""
        return pi_star(self.reference, self.rewards, self.problem.beta)


def make_world(problem: Problem, reference: Floats) -> World:
    """Scales the rewards so that KL(reference || optimum) is the problem's, by bisection.

    Raises:
        ValueError: no scale reaches it.
    """
    raw = problem.raw_rewards()
    raw = raw - (np.exp(reference) * raw).sum(1, keepdims=True)
    low, high = 0.0, _LARGEST_SCALE
    if _distance(reference, raw, high) < problem.kl:
        raise ValueError(f"problem {problem.name!r}: no reward reaches {problem.kl} nats")
    for _ in range(200):
        middle = (low + high) / 2
        if _distance(reference, raw, middle) < problem.kl:
            low = middle
        else:
            high = middle
    rewards = (problem.beta * high * raw).astype(np.float32)  # what the loop sees: ties stay ties
    return World(problem, reference, rewards.astype(np.float64))


def _distance(reference: Floats, raw: Floats, scale: float) -> float:
    return kl(reference, pi_star(reference, scale * raw, 1.0))


def pi_star(reference: Floats, rewards: Floats, beta: float) -> Floats:
    """What maximises E r - beta KL(pi || ref): log pi*(y) = log ref(y) + r(y) / beta - log Z."""
    return normalised(reference + rewards / beta)


def best_of_n(reference: Floats, rewards: Floats, n: int) -> Floats:
    """Log-probabilities of the best of n draws from the reference, ties broken at random.

    P(y) = ref(y) (F(r)^n - F(r-)^n) / (F(r) - F(r-)),  F the distribution of the reward at r = r(y)
    """
    rows = []
    for logprobs, scores in zip(reference, rewards, strict=True):
        probabilities = np.exp(logprobs)
        below = np.array([probabilities[scores < score].sum() for score in scores])
        level = np.array([probabilities[scores == score].sum() for score in scores])
        rows.append(logprobs + np.log(((below + level) ** n - below**n) / level))
    return normalised(np.array(rows))


def normalised(logits: Floats) -> Floats:
    """Log-probabilities along the last axis."""
    result: Floats = logits - logsumexp(logits, axis=-1, keepdims=True)
    return result


def kl(left: Floats, right: Floats) -> float:
    """KL(left || right), mean over prompts."""
    return float((np.exp(left) * (left - right)).sum(1).mean())


def objective(world: World, policy: Floats) -> float:
    """J = E r - beta KL(policy || reference), mean over prompts, in units of reward."""
    mean = float((np.exp(policy) * world.rewards).sum(1).mean())
    return mean - world.problem.beta * kl(policy, world.reference)


def objective_gap(world: World, policy: Floats, target: Floats) -> float:
    """Share of the way from reference to target that is left.

    For the optimum of the KL-regularised objective (J* - J) / (J* - J(ref)), which is
    KL(policy || target) / KL(ref || target); the second form serves every other target.
    """
    return kl(policy, target) / kl(world.reference, target)
