"""The check of gradients: what the stage steps along, on average, against the enumerated gradient.

The policy stage runs as it is; the optimizer's step is replaced by one that records the gathered
gradient and leaves the weights alone. So sampling, masks, collation, advantages, losses and
denominators are the real ones. The first recorded step may move the policy to another point, as
every run starts at its reference.

Each batch's gradient is projected on a few directions: the expected gradient itself (length),
the gradients of reward and KL, and random ones (direction). Hotelling's T^2 over all of them gives
one p-value a cell, two-sided: an agreement that is too good is a fault as well.

D weights, d directions, U batches.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from amenable.algorithms import ALGORITHMS
from amenable.lab.expected_gradients import Enumerated
from amenable.lab.gradient_cells import CELLS, Cell
from amenable.lab.optima import World
from amenable.lab.pair_cells import PAIR_CELLS
from amenable.lab.places import POINTS, PROBLEMS, Place, enumerated, problem_named
from amenable.lab.recording import exact_critic, recorded
from amenable.lab.rows import Job, Options, Row
from amenable.lab.runs import make_context, train

CHECK = "gradient"
LEVEL = 1e-4
"""Two-sided p-values must lie above this."""

TABLE = CELLS + PAIR_CELLS
"""Every algorithm's row."""

_RANDOM_DIRECTIONS = 3
_ON_LLAMA = ("ppo, lambda 1, no critic", "rloo, as published", "grpo, as published")
_SEED = 0
_COSTS = {"table": 2.0, "llama": 3.0}


def jobs(options: Options) -> list[Job]:
    """One job for each cell and problem: a table at all points, a transformer at one.

    The cells are the same whatever `options.seeds` says: their seeds are fixed.
    """
    found = []
    for problem in PROBLEMS:
        points = POINTS if problem.model == "table" else POINTS[1:2]
        for cell in TABLE:
            if problem.model == "llama" and cell.label not in _ON_LLAMA:
                continue
            if options.algorithms and cell.algorithm not in options.algorithms:
                continue
            if options.problems and problem.name not in options.problems:
                continue
            arguments = {"cell": cell.label, "problem": problem.name, "points": points}
            found.append(
                Job(f"{__name__}:gradient_rows", arguments, _COSTS[problem.model] * len(points))
            )
    return found


def gradient_rows(cell: str, problem: str, points: Sequence[str] = POINTS) -> list[Row]:
    """The rows of a cell (by its label) on a problem, one a point."""
    own = next(own for own in TABLE if own.label == cell)
    with tempfile.TemporaryDirectory(prefix="amenable-lab-") as name:
        place = Place.of(problem_named(problem), Path(name) / "reference", points)
        return [
            judged(own, place, point, measure(place, own, point, Path(name) / point))
            for point in points
        ]


def judged(cell: Cell, place: Place, point: str, found: Comparison) -> Row:
    """The row of a comparison, with its verdict."""
    note = (
        f"length {found.length:.3f} ± {found.length_error:.3f} of what is expected; expected: "
        f"cosine {found.cosine:.3f}, length {found.scale:.3g} of the objective's; bias: {cell.bias}"
    )
    return Row(
        check=CHECK,
        algorithm=cell.algorithm,
        setting=f"{cell.name}; {point}",
        problem=place.world.problem.name,
        beta=place.world.problem.beta,
        seed=_SEED,
        gradient_p_value=found.p_value,
        passed=found.passed,
        note=note,
    )


@dataclass(frozen=True)
class Comparison:
    """Recorded against expected gradients."""

    p_value: float
    """Two-sided, of Hotelling's T^2."""

    length: float
    """Recorded mean along the expected gradient over the expected gradient's norm; 1 if right."""

    length_error: float
    """Standard error of `length`."""

    across: float
    """Norm of the recorded mean across it, over the same norm; 0 if right."""

    cosine: float
    """Of the expected gradient and that of minus the objective: the estimator's bias."""

    scale: float
    """Length of the expected gradient over that of the objective's."""

    @property
    def passed(self) -> bool:
        """The p-value is above the level."""
        return self.p_value > LEVEL


def directions(tables: Enumerated, expected: Tensor, seed: int) -> Tensor:
    """[D, d] orthonormal; the first is along the expected gradient."""
    generator = torch.Generator().manual_seed(seed)
    mass = tables.masses[:, :, None]
    wanted = [expected, tables.reward_gradient(), tables.kl_gradient()]
    for _ in range(_RANDOM_DIRECTIONS):
        random = torch.randn(mass.shape[:2], generator=generator, dtype=torch.float64)[:, :, None]
        wanted.append(tables.gradient(mass * random * tables.mask))
    kept: list[Tensor] = []
    for vector in wanted:
        rest = vector.clone()
        for _ in range(2):
            for own in kept:
                rest = rest - (rest @ own) * own
        if rest.norm() > 1e-3 * vector.norm():
            kept.append(rest / rest.norm())
    return torch.stack(kept, 1)


def compare(
    sample: Tensor, expected: Tensor, cosine: float = 1.0, scale: float = 1.0
) -> Comparison:
    """Hotelling's test of projections [U, d] against the expected ones [d].

    T^2 = U (m - e)' S^-1 (m - e);  (U - d) / (d (U - 1)) T^2 ~ F(d, U - d)
    """
    count, size = sample.shape
    error = sample.mean(0) - expected
    spread = torch.atleast_2d(sample.T.cov())
    squared = float(count * error @ torch.linalg.solve(spread, error))
    test = stats.f(size, count - size)
    value = (count - size) / (size * (count - 1)) * squared
    length = float(expected[0])
    return Comparison(
        p_value=min(1.0, 2 * float(min(test.cdf(value), test.sf(value)))),
        length=float(sample[:, 0].mean()) / length,
        length_error=float(spread[0, 0].sqrt()) / math.sqrt(count) / length,
        across=float(sample[:, 1:].mean(0).norm()) / length,
        cosine=cosine,
        scale=scale,
    )


def measure(
    place: Place, cell: Cell, point: str, root: Path, batches: int = 0, seed: int = _SEED
) -> Comparison:
    """Runs the stage with a recording optimizer and compares.

    Args:
        place: problem and policies.
        cell: the algorithm's setting.
        point: at which policy.
        root: run folder.
        batches: how many gradients; 0: the cell's own number.
        seed: of the recipe.
    """
    tables = enumerated(place.world, place.base, place.policies[point], cell.temperature)
    expected = cell.expected(tables, cell)
    axes = directions(tables, expected, seed)
    rows = recorded_gradients(place, cell, point, root, axes, batches or cell.batches, seed)
    ideal = -tables.objective_gradient()
    cosine = float(expected @ ideal / expected.norm() / ideal.norm())
    return compare(rows, expected @ axes, cosine, float(expected.norm() / ideal.norm()))


def recorded_gradients(
    place: Place,
    cell: Cell,
    point: str,
    root: Path,
    axes: Tensor,
    batches: int,
    seed: int = _SEED,
    changes: Mapping[str, Any] | None = None,
) -> Tensor:
    """[U, d] gradients of the stage's steps, projected on axes [D, d].

    Args:
        place: problem and policies.
        cell: the algorithm's setting.
        point: at which policy.
        root: run folder.
        axes: directions.
        batches: U.
        seed: of the recipe.
        changes: recipe keys over the cell's.
    """
    policy, moved = place.policies[point], point != POINTS[0]
    tables = enumerated(place.world, place.base, policy, cell.temperature)
    settings = {**cell.keys, "policy.algorithm": cell.algorithm}
    pairs: list[dict[str, Any]] = []
    if ALGORITHMS[cell.algorithm].learns_from == "preferences":
        settings |= _pair_settings(place.world, cell)
        pairs = drawn_pairs(place.world, tables, cell.prompts * (batches + moved), seed)
    else:
        settings |= _sample_settings(place.world, cell, batches + moved)
    settings |= changes or {}
    ctx = make_context(place.world, place.base, root, seed, settings, pairs)
    start = [weight.detach() for weight in policy.parameters()] if moved else None
    critic = exact_critic(place.world, tables) if cell.exact_critic else nullcontext()
    with recorded(axes, start) as rows, critic:
        train(place.world, ctx)
    return torch.stack(rows)


def _sample_settings(world: World, cell: Cell, steps: int) -> dict[str, Any]:
    return {
        "policy.kl.coef": world.problem.beta,
        "policy.micro_batch_tokens": 200,
        "policy.prompts_per_update": cell.prompts,
        "policy.samples_per_prompt": cell.group,
        "policy.updates": steps,
    }


def _pair_settings(world: World, cell: Cell) -> dict[str, Any]:
    settings = {
        "beta": world.problem.beta,
        "batch_size": cell.prompts,
        "epochs": 1.0,
        "warmup_fraction": 0.0,
        "micro_batch_tokens": 200,
        "evaluations": 1,
    }
    return {f"policy.preference.{key}": value for key, value in settings.items()}


def drawn_pairs(world: World, tables: Enumerated, count: int, seed: int) -> list[dict[str, Any]]:
    """Preference rows that the policy at hand has drawn, labelled by Bradley and Terry."""
    generator = np.random.default_rng(seed)
    problem, masses = world.problem, tables.masses.numpy()
    rows = []
    for number in range(count):
        prompt = int(generator.integers(len(problem.prompts)))
        mass = masses[prompt] / masses[prompt].sum()
        one, two = generator.choice(len(problem.texts), size=2, p=mass)
        lead = world.rewards[prompt, one] - world.rewards[prompt, two]
        rows.append(
            {
                "id": str(number),
                "group": str(number),
                "input_text": problem.prompts[prompt],
                "candidate_0": problem.texts[one],
                "candidate_1": problem.texts[two],
                "choice": int(generator.random() >= 1 / (1 + np.exp(-lead))),
            }
        )
    return rows
