"""The gradient check: its expectations against theorems, its test against made-up samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amenable.algorithms import ALGORITHMS
from amenable.lab.expected_gradients import Enumerated, Unit, expectation
from amenable.lab.gradient_cells import Cell, centred, of_groups, of_returns
from amenable.lab.gradients import (
    LEVEL,
    TABLE,
    compare,
    directions,
    gradient_rows,
    jobs,
    recorded_gradients,
)
from amenable.lab.places import POINTS, Place, enumerated, problem_named
from amenable.lab.rows import Options

MANY = 10**12
FAR = POINTS[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("lab") / "reference"
    return Place.of(problem_named("gradient table"), folder, POINTS[:2])


@pytest.fixture(scope="module")
def tables(place: Place) -> Enumerated:
    return enumerated(place.world, place.base, place.policies[FAR])


def cell_of(label: str, **changes: object) -> Cell:
    cell = next(cell for cell in TABLE if cell.label == label)
    return dataclasses.replace(cell, **changes)  # type: ignore[arg-type]


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-9 * wanted.norm())


def test_every_algorithm_has_a_row() -> None:
    assert {cell.algorithm for cell in TABLE} == set(ALGORITHMS)
    assert len({cell.label for cell in TABLE}) == len(TABLE)


def test_the_far_policy_is_far(place: Place, tables: Enumerated) -> None:
    policy = tables.logprobs.detach().sum(2)
    difference = policy - tables.reference.sum(2)
    nats = float((policy.exp() * difference).sum(1).mean())
    assert nats == pytest.approx(1.0, abs=0.01)
    assert torch.allclose(tables.masses.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("exact_critic", [False, True])
def test_policy_gradient_theorem(tables: Enumerated, exact_critic: bool) -> None:
    """In a large batch PPO's mean gradient is that of the objective over the mean length; with an
    exact critic at every lambda."""
    estimator = of_returns(
        whitened=False, exact_critic=exact_critic, gae_lambda=0.6 if exact_critic else 1.0
    )
    found = estimator(tables, cell_of("reinforce++, as published", prompts=MANY))
    length = (tables.masses * tables.lengths).sum(1).mean()
    assert close(found, -tables.objective_gradient() / length)


def test_group_mean_takes_its_share(tables: Enumerated) -> None:
    """A group's mean holds the completion itself: 2 / 3 of the gradient is left in groups of 3."""
    found = of_groups(centred, kl_in_reward=True)(tables, cell_of("dr-grpo, as published"))
    assert close(found, -tables.objective_gradient() * 2 / 3)


def test_a_ratio_of_means_is_expanded_to_second_order(tables: Enumerated) -> None:
    """mean(V) / mean(T) of n draws, against 200000 simulated batches of 12."""
    cell = cell_of("reinforce++, as published")
    generator = torch.Generator().manual_seed(0)
    mass, lengths = tables.masses[0], tables.lengths
    weight = torch.linspace(-1, 2, len(mass), dtype=torch.float64)
    own = dataclasses.replace(
        tables,
        logprobs=tables.logprobs[:1],
        reference=tables.reference[:1],
        rewards=tables.rewards[:1],
    )
    mask = tables.mask.double()
    unit = Unit(mass, [(weight[None], mask)], [lengths])
    count = 12
    draws = torch.multinomial(mass, 200_000 * count, replacement=True, generator=generator)
    tokens = lengths[draws].view(-1, count).sum(1, keepdim=True).expand(-1, count).flatten()
    share = torch.zeros_like(mass).index_add_(0, draws, weight[draws] / tokens) / 200_000
    wanted = own.gradient((share[:, None] * mask)[None])
    second = expectation(own, [unit], [lambda m: 1 / m[0]], count)
    first = expectation(own, [unit], [lambda m: 1 / m[0]], MANY)
    assert cell.prompts > 1
    assert (second - wanted).norm() < 0.01 * wanted.norm()
    assert (first - wanted).norm() > 3 * (second - wanted).norm()


def test_directions_are_orthonormal(tables: Enumerated) -> None:
    expected = -tables.objective_gradient()
    axes = directions(tables, expected, 0)
    assert torch.allclose(axes.T @ axes, torch.eye(axes.shape[1], dtype=torch.float64))
    assert float(axes[:, 0] @ expected) == pytest.approx(float(expected.norm()))


def test_p_values_of_a_right_sample_are_even() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    values = [
        compare(expected + torch.randn(40, 3, generator=generator).double(), expected).p_value
        for _ in range(200)
    ]
    below = [sum(value < level for value in values) / 200 for level in (0.1, 0.5, 0.9)]
    assert below == pytest.approx([0.1, 0.5, 0.9], abs=0.08)


def test_a_wrong_length_or_direction_or_too_good_a_sample_fails() -> None:
    generator = torch.Generator().manual_seed(1)
    expected = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    noise = 0.3 * torch.randn(60, 3, generator=generator).double()
    assert compare(expected + noise, expected).passed
    assert not compare(0.8 * expected + noise, expected).passed
    assert not compare(expected + noise + torch.tensor([0.0, 0.3, 0.0]), expected).passed
    mirrored = torch.cat([noise, -noise])
    found = compare(expected + mirrored, expected)
    assert found.p_value < LEVEL
    assert not found.passed


def test_a_real_cell_holds_and_notices_beta(
    place: Place, tables: Enumerated, tmp_path: Path
) -> None:
    """GRPO's recorded gradients fit the problem's beta and not 0.8 of it."""
    cell = cell_of("grpo, as published")
    expected = cell.expected(tables, cell)
    wrong = cell.expected(dataclasses.replace(tables, beta=0.8 * tables.beta), cell)
    axes = directions(tables, expected, 0)
    rows = recorded_gradients(place, cell, FAR, tmp_path / "run", axes, 60)
    assert rows.shape == (60, axes.shape[1])
    assert compare(rows, expected @ axes).passed
    assert not compare(rows, wrong @ axes).passed


def test_an_off_policy_cell_holds() -> None:
    (row,) = gradient_rows("dpo, drawn labels", "gradient table", ("far 2",))
    assert row.passed
    assert row.gradient_p_value is not None
    assert row.gradient_p_value > LEVEL
    assert (row.check, row.algorithm, row.kl_to_target) == ("gradient", "dpo", None)


def test_jobs_follow_the_options() -> None:
    every = jobs(Options())
    assert len({str(job.arguments) for job in every}) == len(every)
    rloo = jobs(Options(algorithms=("rloo",), problems=("gradient table",)))
    assert [job.arguments["cell"] for job in rloo] == [
        "rloo, as published",
        "rloo, temperature 0.7",
    ]
    assert jobs(Options(problems=("levels table",))) == []
