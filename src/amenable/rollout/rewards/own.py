"""The run's own reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.data.collate import PromptGroup, collate
from amenable.errors import StageError
from amenable.ranks.group import add_up
from amenable.rollout.rewards.normaliser import Normaliser

if TYPE_CHECKING:
    from amenable.models.roles import Role


@dataclass(frozen=True)
class OwnReward:
    """The part that the run's own reward model has in the mix; its scores come from elsewhere."""

    name: str
    weight: float
    normaliser: Normaliser

    def apply(self, scores: Tensor) -> Tensor:
        """Normalised scores [N], before the weight; meant to be called once a roll-out batch."""
        return self.normaliser.apply(scores)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-able."""
        return self.normaliser.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self.normaliser.load_state(state)


@torch.no_grad()
def score_groups(
    role: Role, groups: Sequence[PromptGroup], pad_id: int, micro_batch_tokens: int
) -> Tensor:
    """Raw scores [N] of every completion, in the order of the groups.

    Raises:
        StageError: one is not finite.
    """
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.completions))
    scores = torch.zeros(starts[-1], dtype=role.wide)
    for part, counts in role.turns(role.split(groups, micro_batch_tokens)):
        batch = collate([groups[i] for i in part], pad_id).to(role.device)
        found = role.scores(batch).cpu()
        if counts:
            scores[[n for i in part for n in range(starts[i], starts[i + 1])]] = found
    add_up([scores])
    if not math.isfinite(float(scores.sum())):
        raise StageError("the reward model gives scores that are not finite; train it again")
    return scores
