"""The forecast of a run: tokens, FLOPs, memory, time and disk, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amenable.artifacts import Json
from amenable.config.needs import learns_from_preferences
from amenable.config.recipe import Recipe
from amenable.plan.hardware import Hardware
from amenable.plan.memory import Budget, StageMemory
from amenable.plan.rates import (
    Rates,
    calibration_path,
    identity,
    rates_of_table,
    saved_rates,
    training_flops,
)
from amenable.plan.rows import Rows
from amenable.plan.shape import ModelShape
from amenable.plan.work import Work, stage_work, token_means

LEAST_TOKENS = 128
_TRAINING = ("sft", "reward", "policy")


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """One stage that is on."""

    name: str
    work: Work
    flops: float
    seconds: float
    memory: StageMemory


@dataclass(frozen=True, kw_only=True)
class MicroBatchForecast:
    """A stage's key, and what it could be."""

    key: str
    chosen: int
    longest_row: int
    """A micro-batch holds at least one row."""
    most: int
    """The largest that fits; 0: not even one row does."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All that is told of a run that has not begun."""

    recipe: Recipe = field(repr=False)
    shape: ModelShape
    machine: Hardware
    rows: Rows = field(repr=False)
    rates: Rates
    stages: tuple[StageForecast, ...]
    micro_batches: tuple[MicroBatchForecast, ...]
    disk: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        """Of the stage that takes most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage stays inside the memory of one card, or of the process."""
        return self.peak_bytes <= self.machine.memory_bytes

    def as_json(self) -> Json:
        """Bytes, seconds and counts by name."""
        return {
            "model": {
                "name": self.shape.name,
                "parameters": self.shape.parameters,
                "embedding": self.shape.embedding,
                "head": self.shape.head,
                "tied": self.shape.tied,
                "linear": self.shape.linear,
                "trained": self.trained,
            },
            "hardware": {
                "name": self.machine.name,
                "cards": self.machine.cards,
                "memory_bytes": self.machine.memory_bytes,
            },
            "rows": {"origin": self.rows.origin, "counts": self.rows.counts},
            "times": self.rates.origin,
            "stages": {
                stage.name: {
                    "tokens": round(stage.work.tokens),
                    "flops": stage.flops,
                    "seconds": round(stage.seconds, 1),
                    "memory_bytes": round(stage.memory.total),
                    "memory_phase": stage.memory.phase,
                    "memory_parts": {k: round(v) for k, v in stage.memory.parts.items()},
                    "memory_phases": {k: round(v) for k, v in stage.memory.phases.items()},
                }
                for stage in self.stages
            },
            "seconds": round(self.seconds, 1),
            "peak_bytes": round(self.peak_bytes),
            "micro_batches": {
                found.key: {"chosen": found.chosen, "most": found.most}
                for found in self.micro_batches
            },
            "disk_bytes": {name: round(size) for name, size in self.disk.items()},
            "fits": self.fits,
        }

    @property
    def trained(self) -> int:
        """Weights that one role trains."""
        lora = self.recipe.model.lora
        return self.shape.adapter(lora.rank) if lora.enabled else self.shape.parameters


def forecast(
    recipe: Recipe,
    shape: ModelShape,
    rows: Rows,
    machine: Hardware,
    *,
    process: float = 0.0,
) -> Forecast:
    """Puts the parts together.

    Args:
        recipe: the run.
        shape: of its base model.
        rows: of its data.
        machine: where it would take place.
        process: bytes of this process before a model is loaded; 0: the usual.
    """
    from amenable.pipeline.stages import STAGES

    names = [stage.name for stage in STAGES if not stage.off(recipe)]
    budget = Budget(recipe, shape, rows, machine, process)
    context, predicted = token_means(recipe, rows)
    path = calibration_path(recipe, shape, identity(machine, budget.dtype))
    rates = saved_rates(path) or rates_of_table(recipe, shape, machine, context, predicted)
    forward = shape.forward_flops(context, predicted)
    backward = training_flops(recipe, shape, context, predicted)
    decoded = shape.forward_flops(2 * context, 1.0)

    def stage(memory: StageMemory) -> StageForecast:
        work = stage_work(memory.stage, recipe, rows)
        flops = forward * work.forward_tokens + backward * work.train_tokens
        return StageForecast(
            name=memory.stage,
            work=work,
            flops=flops + decoded * work.decode_tokens,
            seconds=rates.seconds(work) + rates.startup_s * (memory.stage == names[0]),
            memory=memory,
        )

    peaks = budget.stages(names)
    return Forecast(
        recipe=recipe,
        shape=shape,
        machine=machine,
        rows=rows,
        rates=rates,
        stages=tuple(map(stage, peaks)),
        micro_batches=tuple(_micro_batches(budget, peaks)),
        disk=budget.disk(names),
    )


def _micro_batches(budget: Budget, peaks: Sequence[StageMemory]) -> Iterator[MicroBatchForecast]:
    """What each stage that trains could take: its activations grow with the tokens."""
    policy, recipe = budget.recipe.policy, budget.recipe
    chosen = {
        "sft": ("sft.micro_batch_tokens", recipe.sft.micro_batch_tokens),
        "reward": ("reward.micro_batch_tokens", recipe.reward.micro_batch_tokens),
        "policy": ("policy.micro_batch_tokens", policy.micro_batch_tokens),
    }
    if learns_from_preferences(recipe):
        key = "policy.preference.micro_batch_tokens"
        chosen["policy"] = (key, policy.preference.micro_batch_tokens)
    for peak in peaks:
        batch = budget.largest(peak.stage)
        if peak.stage not in _TRAINING or batch is None:
            continue
        active = budget.activations(peak.stage)
        room = budget.machine.memory_bytes - peak.unscaled
        most = int(max(0.0, room) / (active / batch.tokens)) // LEAST_TOKENS * LEAST_TOKENS
        key, tokens = chosen[peak.stage]
        yield MicroBatchForecast(
            key=key,
            chosen=tokens,
            longest_row=batch.width,
            most=most if most >= batch.width else 0,
        )


def comparison(found: Forecast, measured: dict[str, Any]) -> Json:
    """The manifest's `forecast`: by stage what was expected beside what was measured.

    Args:
        found: the forecast.
        measured: the manifest's `stages`.
    """
    stages = {
        stage.name: {
            "memory_gb": round(stage.memory.total / 1e9, 3),
            "measured_memory_gb": measured[stage.name]["peak_rss_gb"],
            "wall_s": round(stage.seconds, 1),
            "measured_wall_s": measured[stage.name]["wall_s"],
        }
        for stage in found.stages
        if stage.name in measured
    }
    return {
        "hardware": found.machine.name,
        "times": found.rates.origin,
        "rows": found.rows.origin,
        "stages": stages,
    }


def plan(
    recipe: Recipe,
    machine: Hardware,
    *,
    data: Path | None = None,
    process: float = 0.0,
) -> Forecast:
    """The forecast of a recipe.

    Args:
        recipe: the run.
        machine: where.
        data: a run folder's `data/`, if there is one.
        process: as of `forecast`.

    Raises:
        ModelError: the base model's configuration is not at hand.
        DataError: the run folder's splits are damaged.
    """
    from amenable.plan.rows import rows_of
    from amenable.plan.shape import config_of, shape_of

    shape = shape_of(config_of(recipe.model.base), recipe.model.base)
    return forecast(
        recipe, shape, rows_of(recipe, renderer(recipe), data), machine, process=process
    )


def renderer(recipe: Recipe) -> Any:
    """The run's renderer where the base model is on this disk, else None."""
    from amenable.models.build import Foundation
    from amenable.models.pull import BUILT_IN, is_pulled

    base = recipe.model.base
    at_hand = is_pulled(base) if base in BUILT_IN else Path(base).expanduser().is_dir()
    return Foundation.open(recipe).renderer if at_hand else None
