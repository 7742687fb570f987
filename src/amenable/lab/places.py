"""Where gradients and identities are looked at: a problem, its reference, policies far from it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amenable.lab.expected_gradients import Enumerated, enumerate_tokens
from amenable.lab.optima import World, kl, make_world
from amenable.lab.problems import PAD_ID, Floats, Problem, write_model
from amenable.models.load import load_causal_lm

PROBLEMS = (
    Problem(
        name="gradient table",
        letters="ab",
        prompts=("a", "b"),
        max_tokens=4,
        model="table",
        reward="levels",
        beta=1.0,
        kl=0.5,
        seed=4,
    ),
    Problem(
        name="gradient llama",
        letters="ab",
        prompts=("a", "b"),
        max_tokens=4,
        model="llama",
        reward="random",
        beta=1.0,
        kl=0.5,
        seed=5,
    ),
)
"""Smaller than those of the fixed points, as groups of three are enumerated: 31 completions."""

POINTS = ("reference", "far 1", "far 2")
"""Policies at which gradients are compared."""

_FAR = {"far 1": (1.0, 1), "far 2": (2.0, 2)}
"""Nats from the reference, and the seed of the way there."""

_SHAKEN = ("table.weight", "q_proj.weight", "k_proj.weight")


def problem_named(name: str) -> Problem:
    """The problem of the table."""
    return next(problem for problem in PROBLEMS if problem.name == name)


@dataclass(frozen=True)
class Place:
    """A problem, written to disk, with the policies at which gradients are compared."""

    world: World
    base: Path
    policies: dict[str, PreTrainedModel]

    @classmethod
    def of(cls, problem: Problem, folder: Path, points: Sequence[str] = POINTS) -> Place:
        """Writes the reference to `folder`."""
        base = load_causal_lm(write_model(problem, folder), torch.float64)
        world = make_world(problem, sequence_table(problem, base))
        policies = {
            point: perturbed(world, folder, *_FAR[point])
            if point in _FAR
            else load_causal_lm(folder, torch.float32)
            for point in points
        }
        return cls(world, folder, policies)


def perturbed(world: World, base: Path, nats: float, seed: int) -> PreTrainedModel:
    """The reference with random changes to its weights, `nats` of KL(policy || reference) away."""
    start = load_causal_lm(base, torch.float32)
    noise = _noise(start, seed)

    def too_near(size: float) -> bool:
        policy = sequence_table(world.problem, _moved(start, noise, size))
        return kl(policy, world.reference) < nats

    low, high = 0.0, 0.25
    while too_near(high):
        low, high = high, 1.5 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if too_near(middle) else (low, middle)
    return _moved(start, noise, high)


def sequence_table(problem: Problem, model: PreTrainedModel) -> Floats:
    """[P, S] log-probabilities of all completions, by the model's plain forward pass."""
    with torch.no_grad():
        table: Floats = enumerate_tokens(problem, model)[0].sum(2).numpy()
    return table


def _noise(model: PreTrainedModel, seed: int) -> list[Tensor]:
    """Normal noise of the weights' size: on a table, or on a transformer's attention and output.

    A transformer's other weights, and the pad token's row, stay: they keep that token improbable.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator) * weight.detach().std()
        if name == "lm_head.weight":
            noise[PAD_ID], noise[:, 0] = 0.0, 0.0
        elif not name.endswith(_SHAKEN):
            noise[:] = 0.0
        found.append(noise)
    return found


def _moved(model: PreTrainedModel, noise: Sequence[Tensor], size: float) -> PreTrainedModel:
    copy = deepcopy(model)
    with torch.no_grad():
        for weight, change in zip(copy.parameters(), noise, strict=True):
            weight.add_(size * change)
    return copy


def enumerated(
    world: World, base: Path, policy: PreTrainedModel, temperature: float = 1.0
) -> Enumerated:
    """Policy and reference over all completions, in float64."""
    model = deepcopy(policy).double()
    logprobs, tokens = enumerate_tokens(world.problem, model, temperature)
    with torch.no_grad():
        start = load_causal_lm(base, torch.float64)
        reference, _ = enumerate_tokens(world.problem, start, temperature)
    return Enumerated(
        logprobs=logprobs,
        reference=reference,
        tokens=tokens,
        rewards=torch.from_numpy(world.rewards),
        beta=world.problem.beta,
        weights=list(model.parameters()),
    )
