"""What identities are found on: a place with everything that they share, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amenable.data import collate as layout
from amenable.data.collate import PromptGroup
from amenable.lab.expected_gradients import enumerate_tokens
from amenable.lab.places import POINTS, Place
from amenable.lab.problems import PAD_ID
from amenable.lab.recording import Watched, watched
from amenable.lab.runs import make_context, train
from amenable.train.penalty import KLPenalty

FAR = POINTS[1]
"""The policy that identities are found at."""


@dataclass(frozen=True)
class Finding:
    """What an identity says."""

    worst: float
    """How far it is off."""

    allowed: float

    note: str = ""
    """In words."""

    refused: str = ""
    """What the code said where it would not go on: then the identity itself was not looked at."""

    @property
    def passed(self) -> bool:
        """Within bounds; never where it is not a number."""
        return self.worst <= self.allowed


class Bench:
    """A place, and a short run of rloo on it that identities look into."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self._folder = place, folder
        self.problem = place.world.problem
        self.numbers = {text: number for number, text in enumerate(self.problem.texts)}

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """[P, S, C] log-probabilities of the far policy, and [S, C] ids; plain forward pass."""
        return plain_table(self, self.place.policies[FAR])

    @cached_property
    def run(self) -> tuple[list[Watched], list[float], KLPenalty]:
        """Three updates at a high rate; the first ratios; and where the penalty enters."""
        settings = {
            "policy.algorithm": "rloo",
            "policy.kl.coef": self.problem.beta,
            "policy.prompts_per_update": 6,
            "policy.samples_per_prompt": 3,
            "policy.updates": 3,
            "policy.learning_rate": 0.05,
            "policy.micro_batch_tokens": 60,
        }
        world = self.place.world
        ctx = make_context(world, self.place.base, self._folder / "run", 0, settings)
        with watched() as (updates, ratios):
            train(world, ctx)
        return updates, ratios, KLPenalty(ctx.recipe.policy)

    def folder(self, name: str) -> Path:
        """A fresh run folder."""
        return self._folder / name


def plain_table(bench: Bench, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """[P, S, C] token log-probabilities, one completion at a time, and [S, C] ids."""
    with torch.no_grad():
        return enumerate_tokens(bench.problem, model)


def crowded(bench: Bench, together: int) -> tuple[layout.GroupBatch, list[tuple[int, int]]]:
    """All completions in groups of `together`, drawn by lot; and the (prompt, number) of each."""
    problem, generator = bench.problem, np.random.default_rng(0)
    groups, places = [], []
    for p, prompt in enumerate(problem.prompts):
        order = generator.permutation(len(problem.texts))
        for start in range(0, len(order), together):
            chosen = [int(n) for n in order[start : start + together]]
            ids = [problem.completion_ids(problem.texts[n]) for n in chosen]
            groups.append(PromptGroup(problem.prompt_ids(prompt), ids))
            places += [(p, n) for n in chosen]
    return layout.collate(groups, PAD_ID), places
