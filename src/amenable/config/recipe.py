"""The recipe: everything that a run depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from amenable.config.checkpoint import CheckpointConfig
from amenable.config.collect import CollectConfig
from amenable.config.data import DataConfig
from amenable.config.evaluate import EvaluateConfig
from amenable.config.health import HealthConfig
from amenable.config.kfp import KfpConfig
from amenable.config.model import ModelConfig
from amenable.config.policy import PolicyConfig
from amenable.config.ray import RayConfig
from amenable.config.reward import RewardConfig
from amenable.config.sft import SFTConfig

_Section = TypeVar("_Section", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, from data to report."""

    schema_version: int = 1
    """Version of the recipe's keys."""

    name: str = "run"
    """Names the run in its report; the default run folder is `runs/NAME`."""

    seed: int = 0
    """Seeds initial weights, data order, sampling and the simulated annotator."""

    trackers: tuple[str, ...] = ()
    """Experiment trackers that get the figures beside TensorBoard (docs/trackers.md): `wandb`,
    `mlflow`, `trackio`."""

    model: ModelConfig = ModelConfig()
    """The base model."""

    data: DataConfig = DataConfig()
    """Input rows."""

    sft: SFTConfig = SFTConfig()
    """Supervised fine-tuning."""

    collect: CollectConfig = CollectConfig()
    """Collecting preferences."""

    reward: RewardConfig = RewardConfig()
    """Reward model."""

    policy: PolicyConfig = PolicyConfig()
    """Policy optimisation."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """Side-by-Side evaluation."""

    health: HealthConfig = HealthConfig()
    """Health rules."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""

    kfp: KfpConfig = KfpConfig()
    """Kubeflow Pipelines."""

    ray: RayConfig = RayConfig()
    """Ray cluster."""

    def __post_init__(self) -> None:
        """Write out the sizes of micro-batches that were left to the kind of training."""
        tokens = 2048 if self.model.lora.enabled else 1024

        def sized(section: _Section) -> _Section:
            left = not section.micro_batch_tokens
            return replace(section, micro_batch_tokens=tokens) if left else section

        policy = sized(self.policy)
        policy = replace(policy, preference=sized(policy.preference))
        for name, section in (
            ("sft", sized(self.sft)),
            ("reward", sized(self.reward)),
            ("policy", policy),
        ):
            object.__setattr__(self, name, section)
