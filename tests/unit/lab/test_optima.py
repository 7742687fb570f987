from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from amenable.lab.optima import (
    best_of_n,
    kl,
    make_world,
    normalised,
    objective,
    objective_gap,
    pi_star,
)
from amenable.lab.problems import PROBLEMS, Problem

from .conftest import SMALL, OpenWorld

each = pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])


@each
def test_the_reward_is_scaled_to_the_stated_distance(problem: Problem, opened: OpenWorld) -> None:
    world, _ = opened(problem)
    assert kl(world.reference, world.pi_star) == pytest.approx(problem.kl, abs=1e-4)
    assert 0.5 <= problem.kl <= 3
    assert 0.05 <= problem.beta <= 1


def test_no_scale_reaches_the_distance_of_equal_rewards() -> None:
    """Rewards of one level: nothing tilts the reference."""

    class Flat(Problem):
        def raw_rewards(self) -> np.ndarray:
            return np.zeros((len(self.prompts), len(self.texts)))

    flat = Flat(**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})
    with pytest.raises(ValueError, match="no reward reaches"):
        make_world(flat, normalised(np.zeros((2, len(SMALL.texts)))))


def test_pi_star_is_what_numeric_optimisation_finds(opened: OpenWorld) -> None:
    """L-BFGS on the logits of all completions, from a random start."""
    world, _ = opened(SMALL)
    shape = world.reference.shape

    def loss(logits: np.ndarray) -> float:
        return -objective(world, log_softmax(logits.reshape(shape), axis=1))

    start = np.random.default_rng(0).standard_normal(world.reference.size)
    found = minimize(loss, start, tol=1e-14, options={"maxiter": 2000})
    policy = log_softmax(found.x.reshape(shape), axis=1)
    assert kl(policy, world.pi_star) < 1e-6
    assert objective(world, world.pi_star) >= -found.fun


def test_objective_gap_is_one_at_the_reference_and_zero_at_the_optimum(opened: OpenWorld) -> None:
    world, _ = opened(SMALL)
    star = world.pi_star
    assert objective_gap(world, world.reference, star) == pytest.approx(1)
    assert objective_gap(world, star, star) == 0
    other = normalised(world.reference + np.random.default_rng(1).standard_normal(star.shape))
    best, start = objective(world, star), objective(world, world.reference)
    by_objectives = (best - objective(world, other)) / (best - start)
    assert objective_gap(world, other, star) == pytest.approx(by_objectives, rel=1e-6)


@each
def test_a_policy_for_another_beta_is_outside_the_bound(
    problem: Problem, opened: OpenWorld
) -> None:
    world, _ = opened(problem)
    wrong = pi_star(world.reference, world.rewards, 0.8 * problem.beta)
    assert kl(wrong, world.pi_star) > 0.015


def test_best_of_n_by_listing_all_draws() -> None:
    """Three completions, two of them equally good: every ordered triple, first best taken."""
    probabilities, rewards = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0])
    expected = np.zeros(3)
    for draws in itertools.product(range(3), repeat=3):
        best = max(draws, key=lambda y: rewards[y])
        expected[best] += np.prod(probabilities[list(draws)])
    found = np.exp(best_of_n(np.log(probabilities)[None], rewards[None], 3))
    assert np.allclose(found[0], expected)
