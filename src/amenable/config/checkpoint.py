"""Checkpoints of the training stages: how often, and how many stay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a stopped training stage goes on from (docs/run-folder.md). It changes no result."""

    every_minutes: float = 5.0
    """Longest time between two checkpoints, to the end of the step or update that runs; there are
    more: one at each evaluation, and one every `policy.checkpoint_every` updates. 0: no others."""

    keep_last: int = 2
    """How many stay: the newest is gone on from, the ones before it if it is damaged. Each holds
    the best weights so far as well, where a stage chooses the best."""
