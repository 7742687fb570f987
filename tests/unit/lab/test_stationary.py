from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from amenable.errors import NumericsError
from amenable.lab.optima import normalised
from amenable.lab.problems import PROBLEMS
from amenable.lab.stationary import (
    Tree,
    above_mean,
    above_mean_whitened,
    against_one,
    stationary_policy,
)
from amenable.losses.advantages import group_relative
from amenable.losses.kl import k3

from .conftest import SMALL, OpenWorld


def test_a_tree_gives_back_the_sequence_probabilities(opened: OpenWorld) -> None:
    world, _ = opened(PROBLEMS[1])
    tree = Tree.of(world.problem)
    for row in world.reference:
        conditionals = tree.conditionals(row)
        assert np.allclose(np.exp(conditionals).sum(1), 1)
        assert np.allclose(tree.sequences(conditionals), row, atol=1e-9)
    assert tree.lengths.tolist() == [len(world.problem.completion_ids(t)) for t in SMALL_TEXTS]


SMALL_TEXTS = PROBLEMS[1].texts


def test_the_gradient_over_all_pairs_of_completions_is_zero_there(opened: OpenWorld) -> None:
    """Every group of two, with the project's own advantage and losses, weighted by probability."""
    world, _ = opened(SMALL)
    tree, coef = Tree.of(SMALL), 0.3
    target = stationary_policy(world, against_one, coef=coef, by_length=True)
    logits = torch.tensor(tree.conditionals(target[0]), requires_grad=True)
    policy = torch.log_softmax(logits, -1)
    prefix, token = torch.from_numpy(tree.prefix), torch.from_numpy(tree.token)
    mask = torch.from_numpy(tree.mask)
    new = torch.where(mask, policy[prefix, token], 0.0)
    start = torch.from_numpy(tree.conditionals(world.reference[0]))
    ref = torch.where(mask, start[prefix, token], 0.0)
    total = torch.tensor(0.0, dtype=torch.float64)
    mass = np.exp(target[0])
    for a, b in itertools.product(range(len(mass)), repeat=2):
        rows = [a, b]
        scores = torch.from_numpy(world.rewards[0][rows])[None]
        advantages = group_relative(scores)[0][:, None] * mask[rows]
        losses = -advantages * new[rows] + coef * k3(new[rows], ref[rows])
        means = (losses * mask[rows]).sum(1) / mask[rows].sum(1)
        total = total + mass[a] * mass[b] * means.mean()
    (gradient,) = torch.autograd.grad(total, logits)
    assert float(gradient.abs().max()) < 1e-7
    assert np.abs(target - world.reference).max() > 0.1


def test_expected_advantages_by_listing_groups(opened: OpenWorld) -> None:
    """E over three companions of a score less its group's mean."""
    world, _ = opened(SMALL)
    rewards = world.rewards[0][:3]
    logprobs = normalised(world.reference[0][:3])
    mass = np.exp(logprobs)
    expected = np.zeros(3)
    for own in range(3):
        for others in itertools.product(range(3), repeat=2):
            group = rewards[[own, *others]]
            expected[own] += np.prod(mass[list(others)]) * (group[0] - group.mean())
    found = above_mean(3)(logprobs[None], rewards[None], np.ones(3))
    assert np.allclose(found[0], expected)


def test_the_whitened_advantage_has_unit_variance_over_tokens(opened: OpenWorld) -> None:
    """Large groups: variance over tokens of the expected advantages nears 1."""
    world, _ = opened(PROBLEMS[1])
    lengths = Tree.of(PROBLEMS[1]).lengths
    advantages = above_mean_whitened(10**6)(world.reference, world.rewards, lengths)
    tokens = np.exp(world.reference) * lengths
    tokens /= tokens.sum()
    variance = (tokens * advantages**2).sum() - (tokens * advantages).sum() ** 2
    assert variance == pytest.approx(1, abs=1e-3)


def test_a_gradient_that_does_not_rest_is_told(
    opened: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amenable.lab.stationary._STEPS", 3)
    world, _ = opened(SMALL)
    with pytest.raises(NumericsError, match="did not come to rest"):
        stationary_policy(world, against_one, coef=0.3, by_length=True)
