"""Seconds of what a stage computes: from a calibration on this machine, or from its data sheet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amenable.artifacts import read_json
from amenable.config.recipe import Recipe
from amenable.errors import AmenableError
from amenable.models.pull import cache_home
from amenable.plan.hardware import Hardware
from amenable.plan.shape import ModelShape
from amenable.plan.work import Work

_CPU_EFFICIENCY, _CARD_EFFICIENCY = 0.6, 0.35  # of the data sheet's matrix products
BANDWIDTH_SHARE = 0.6
"""Of the data sheet's memory bandwidth, that weights and caches are read at; assumed."""
_LAUNCHES_S = 0.8e-3  # of the kernels of one layer, one after another, on a card
DISK = 0.5e9
"""Bytes a second that are written and hashed, or read."""
_STARTUP_S = 5.0


@dataclass(frozen=True)
class Line:
    """Seconds of a pass: `fixed_s` and `each_s` for every token or sequence in it."""

    fixed_s: float
    each_s: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> Line:
        """The line through two measured (tokens, seconds), neither part below 0."""
        (x, t), (y, u) = sorted((first, second))
        each = max(0.0, (u - t) / (y - x)) if y > x else 0.0
        fixed = t - each * x
        return cls(fixed, each) if fixed >= 0 else cls(0.0, u / y)

    def seconds(self, passes: float, units: float) -> float:
        """Of so many passes with so many units in all."""
        return self.fixed_s * passes + self.each_s * units


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one model costs on one machine."""

    forward: Line
    train: Line
    """Forward and backward."""
    decode: Line
    """A step, and each sequence in it."""
    step_s: float
    """An optimizer step."""
    merge_s: float
    """An adapter merged into the roll-out copy."""
    file_s: float
    """Reading or writing a whole model."""
    startup_s: float
    """Importing what a run needs."""
    origin: str

    def seconds(self, work: Work) -> float:
        """Of all work of a stage."""
        return (
            self.forward.seconds(work.forward_passes, work.forward_tokens)
            + self.train.seconds(work.train_passes, work.train_tokens)
            + self.decode.seconds(work.decode_steps, work.decode_tokens)
            + self.step_s * work.optimizer_steps
            + self.merge_s * work.merges
            + self.file_s * (work.models_read + work.models_written)
            + work.fixed_s
        )


def training_flops(recipe: Recipe, shape: ModelShape, context: float, predicted: float) -> float:
    """Of one token, forward and backward: frozen weights need no gradient of their own.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1: backward is twice forward.
    """
    forward = shape.forward_flops(context, predicted)
    return forward * (2 if recipe.model.lora.enabled else 3)


def rates_of_table(
    recipe: Recipe, shape: ModelShape, machine: Hardware, context: float, predicted: float
) -> Rates:
    """From peak figures and assumed efficiencies: right within a small factor, no more.

    Args:
        recipe: adapters or every weight.
        shape: of the model.
        machine: where.
        context: tokens that a token attends to, on average.
        predicted: share of the tokens that go through the output projection.
    """
    on_card = machine.kind == "cuda"
    flops = machine.flops * (_CARD_EFFICIENCY if on_card else _CPU_EFFICIENCY)
    bandwidth = machine.bandwidth * BANDWIDTH_SHARE
    number = machine.dtype(recipe.model.dtype).itemsize
    launches = shape.layers * (_LAUNCHES_S if on_card else 0.2e-3)
    quantise = recipe.model.quantise
    weights = shape.frozen(number, quantise)
    written = shape.linear * 2 * number / bandwidth * (quantise != "none")
    decoded = shape.forward_flops(2 * context, 1.0) / flops
    cache = 2 * context * shape.kv_numbers() * number / bandwidth
    lora = recipe.model.lora
    trained = shape.adapter(lora.rank) if lora.enabled else shape.parameters
    forward, backward = (
        shape.forward_flops(context, predicted),
        training_flops(recipe, shape, context, predicted),
    )
    return Rates(
        forward=Line(launches + written, forward / flops),
        train=Line(3 * launches + 2 * written, backward / flops),
        decode=Line(max(launches, weights / bandwidth + written), decoded + cache),
        step_s=trained * 32 / bandwidth,
        merge_s=shape.linear * (3 * number / bandwidth) if lora.enabled else 0.0,
        file_s=shape.parameters * number / DISK,
        startup_s=_STARTUP_S,
        origin=f"from the table, at {flops / machine.flops:.0%} of its FLOP/s: not calibrated",
    )


def calibration_path(recipe: Recipe, shape: ModelShape, identity: Sequence[Any]) -> Path:
    """Where the rates of this model in this way on this machine are kept.

    Args:
        recipe: its adapters and quantisation.
        shape: of the model.
        identity: machine, threads and precision.
    """
    lora = recipe.model.lora
    facts = {**asdict(shape), "config": shape.config.model_type, "name": ""}
    way = [lora.enabled, lora.rank if lora.enabled else 0, recipe.model.quantise]
    key = json.dumps([facts, *way, *identity])
    return cache_home() / "calibration" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def saved_rates(path: Path) -> Rates | None:
    """The rates that a calibration left, or None."""
    try:
        found = read_json(path)["rates"]
        lines = {name: Line(**found[name]) for name in ("forward", "train", "decode")}
        return Rates(**{**found, **lines})
    except (AmenableError, OSError, KeyError, TypeError):
        return None


def identity(machine: Hardware, dtype: torch.dtype) -> list[Any]:
    """What a calibration is for."""
    from amenable.pipeline.manifest import hardware as described

    facts = described()
    own = machine.name if machine.kind == "cuda" else facts["processor"]
    return [own, facts["cores"], torch.get_num_threads(), str(dtype)]
