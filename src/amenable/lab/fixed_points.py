"""The check of fixed points: each setting is trained on each problem, its policy enumerated.

A cell passes where the trained policy is at most 0.01 nats from its target and leaves at most 2 %
of the objective. Two controls must fail it: the untrained policy, and one trained at 0.8 beta.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from amenable.errors import NumericsError, UsageError
from amenable.lab.enumerate import policy_table
from amenable.lab.optima import World, kl, make_world, objective_gap
from amenable.lab.preferences import pair_rows, pair_tables
from amenable.lab.problems import PROBLEMS, Floats, Problem, write_model
from amenable.lab.rows import Job, Options, Row
from amenable.lab.runs import make_context, train
from amenable.lab.settings import GAP_BOUND, KL_BOUND, LOSS_GAP_BOUND, SETTINGS, Setting

CHECK = "fixed point"
WRONG_BETA = 0.8
"""Share of the KL weight that the second control is trained with."""

_CONTROL = SETTINGS[1]  # rloo: no critic that could be blamed
_COSTS = {"table": 1.0, "llama": 3.0}


def jobs(options: Options) -> list[Job]:
    """One job for each setting, problem and seed, and the controls."""
    problems = chosen_problems(options)
    found = [
        Job(
            f"{__name__}:cell",
            {"setting": number, "problem": problem.name, "seed": seed},
            _COSTS[problem.model],
        )
        for number, setting in enumerate(SETTINGS)
        if not options.algorithms or setting.algorithm in options.algorithms
        for problem in problems
        for seed in range(options.seeds)
    ]
    return found + [
        Job(f"{__name__}:controls", {"problem": problem.name}, _COSTS[problem.model])
        for problem in problems
        if found
    ]


def chosen_problems(options: Options) -> list[Problem]:
    """The problems of this check that the user named, or all.

    Raises:
        UsageError: an unknown name.
    """
    from amenable.lab.places import PROBLEMS as SMALL

    known = {problem.name: problem for problem in PROBLEMS}
    names = [*known, *(problem.name for problem in SMALL)]
    unknown = [name for name in options.problems if name not in names]
    if unknown:
        raise UsageError(f"--problems: {unknown[0]!r} is unknown; choose from {names}")
    return [problem for name, problem in known.items() if name in (options.problems or known)]


def problem_named(name: str) -> Problem:
    """The problem of the table."""
    return next(problem for problem in PROBLEMS if problem.name == name)


def open_world(problem: Problem, folder: Path) -> World:
    """Writes the reference model to `folder`, enumerates it and scales the reward."""
    return make_world(problem, policy_table(problem, write_model(problem, folder)))


def cell(setting: int, problem: str, seed: int) -> list[Row]:
    """Trains one setting (its number in the table) and measures where it lands."""
    row = SETTINGS[setting]
    with tempfile.TemporaryDirectory(prefix="amenable-lab-") as name:
        base = Path(name) / "reference"
        world = open_world(problem_named(problem), base)
        coef = row.kl_coef(world)
        try:
            policy = trained(row, world, base, Path(name) / "run", seed)
        except NumericsError as error:  # of one cell; the others are still worth knowing
            return [replace(_row(row, world, seed, coef), note=str(error))]
        return [judged(row, world, policy, target_of(row, world, coef), seed, coef)]


def target_of(setting: Setting, world: World, coef: float) -> Floats | None:
    """[P, S] where the setting must land; None where only its loss says how far it is."""
    if setting.gap is not None:
        return None
    return setting.optimum(world, coef) if setting.optimum is not None else world.pi_star


def trained(
    setting: Setting,
    world: World,
    base: Path,
    root: Path,
    seed: int,
    changes: Mapping[str, Any] | None = None,
) -> Floats:
    """[P, S] log-probabilities after the policy stage has run with the setting.

    Args:
        setting: what to run.
        world: problem and rewards.
        base: the reference's model folder.
        root: the run folder.
        seed: of the recipe.
        changes: dotted recipe keys over the setting's.
    """
    keys = setting.recipe_keys(world) | dict(changes or {})
    pairs = []
    if setting.pairs:
        pairs = list(pair_rows(world, pair_tables(world, setting.flip_rate)))
        keys["policy.preference.batch_size"] = len(pairs)
    ctx = make_context(world, base, root, seed, keys, pairs)
    return policy_table(world.problem, train(world, ctx))


def judged(
    setting: Setting, world: World, policy: Floats, target: Floats | None, seed: int, coef: float
) -> Row:
    """The row of a policy, with its verdict."""
    if target is None:
        assert setting.gap is not None
        distance, gap, far = None, setting.gap(world, policy), None
        passed = gap <= LOSS_GAP_BOUND
    else:
        distance, gap = kl(policy, target), objective_gap(world, policy, target)
        far = kl(target, world.pi_star) if setting.target == "own" else None
        passed = distance <= KL_BOUND and gap <= GAP_BOUND
    return replace(
        _row(setting, world, seed, coef),
        kl_to_target=distance,
        objective_gap=gap,
        distance_from_pi_star=far,
        passed=passed,
    )


def _row(setting: Setting, world: World, seed: int, coef: float) -> Row:
    """A cell of which nothing is known yet."""
    return Row(
        check=CHECK,
        algorithm=setting.algorithm,
        setting=setting.name,
        problem=world.problem.name,
        beta=coef,
        seed=seed,
        target=setting.target,
        passed=False,
    )


def controls(problem: str) -> list[Row]:
    """Rows that must fail: the reference itself, and a policy trained at 0.8 beta."""
    with tempfile.TemporaryDirectory(prefix="amenable-lab-") as name:
        base = Path(name) / "reference"
        world = open_world(problem_named(problem), base)
        beta = world.problem.beta
        changes = {"policy.kl.coef": WRONG_BETA * beta}
        wrong = trained(_CONTROL, world, base, Path(name) / "run", 0, changes)
    named = {"untrained": world.reference, "0.8 beta": wrong}
    return [
        _as_control(judged(_CONTROL, world, policy, world.pi_star, 0, beta), name)
        for name, policy in named.items()
    ]


def _as_control(row: Row, name: str) -> Row:
    algorithm = "none" if name == "untrained" else row.algorithm
    return replace(row, algorithm=algorithm, setting=name, control=True)
