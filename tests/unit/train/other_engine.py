"""An engine that is not the own one, in place of vLLM: it tells what it thinks of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from amenable.models.roles import Role
from amenable.rollout.transformers_engine import RolloutCopy, TransformersEngine
from amenable.rollout.types import Request, Rollout, Sampling


class OtherCopy:
    """The role's weights merged into plain transformers.

    Args:
        role: who samples.
        stale: it tells what the weights that it began with say.
        off: nats that every log-probability is told too high.
    """

    def __init__(self, role: Role, *, stale: bool = False, off: float = 0.0) -> None:
        self.role, self._off = role, off
        self._copy = RolloutCopy(role)
        self._copy.sync()
        self._believed = deepcopy(self._copy.model) if stale else self._copy.model
        self.syncs, self.closed = 0, False

    def sync(self) -> None:
        self.syncs += 1
        self._copy.sync()

    def close(self) -> None:
        self.closed = True

    def engine(self, renderer: Any) -> OtherEngine:
        return OtherEngine(self._believed, self._copy.engine(renderer), self._off)


class OtherEngine:
    def __init__(self, model: Any, own: TransformersEngine, off: float) -> None:
        self._model, self._own, self._off = model, own, off

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: Any = None
    ) -> list[Rollout]:
        return [
            replace(rollout, logprobs=self._told(rollout, sampling.temperature))
            for rollout in self._own.generate(requests, sampling, on_progress)
        ]

    @torch.no_grad()
    def _told(self, rollout: Rollout, temperature: float) -> tuple[float, ...]:
        if not temperature:
            return ()
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        logits = self._model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        wide = torch.log_softmax(logits.double() / temperature, -1)
        drawn = torch.tensor(rollout.completion_ids)[:, None]
        return tuple((wide.gather(1, drawn)[:, 0] + self._off).tolist())
