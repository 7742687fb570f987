"""What each stage asks of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

RAY_STAGES = ("sft", "collect", "reward", "policy", "evaluate")
"""Those with a section of their own; the others are one process each."""


@dataclass(frozen=True, kw_only=True)
class RayStageConfig:
    """One stage, where it asks for something else than the others."""

    workers: int = 0
    """Processes that share the stage's work; 0 takes `ray.workers`."""

    cpus_per_worker: float = 0.0
    """Cores of each; 0 takes `ray.cpus_per_worker`."""

    gpus_per_worker: float = -1.0
    """GPUs of each; -1 takes `ray.gpus_per_worker`."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the stages run with `--on ray` (docs/ray.md); it changes no result."""

    workers: int = 1
    """Processes that share the work of a stage."""

    cpus_per_worker: float = 1.0
    """Cores of each, and threads that it computes with."""

    gpus_per_worker: float = 0.0
    """GPUs of each."""

    max_failures: int = 3
    """How often the workers of a stage are started again after one of them has died; -1: always."""

    sft: RayStageConfig = RayStageConfig()
    """Fine-tuning."""

    collect: RayStageConfig = RayStageConfig()
    """Collecting preferences."""

    reward: RayStageConfig = RayStageConfig()
    """Reward model."""

    policy: RayStageConfig = RayStageConfig()
    """Policy optimisation."""

    evaluate: RayStageConfig = RayStageConfig()
    """Side-by-Side evaluation."""
