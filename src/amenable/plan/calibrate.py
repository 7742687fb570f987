"""A short measurement of a recipe's own model shape on this machine, with the run's own code.

The weights are random: no model is read. Passes are measured at two sizes, so that what a pass
costs by itself and what a token costs are told apart.
"""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from amenable.artifacts import write_json
from amenable.config.recipe import Recipe
from amenable.data.collate import GroupBatch, PromptGroup, collate
from amenable.errors import UsageError
from amenable.models.adapters import add_adapter
from amenable.models.build import best_device
from amenable.models.load import resolve_dtype, set_dropout_to_zero
from amenable.models.packed_layers import shorten
from amenable.models.quantised import is_quantised, quantise
from amenable.models.roles import Role
from amenable.plan.hardware import hardware
from amenable.plan.rates import DISK, Line, Rates, calibration_path, identity
from amenable.plan.rows import Lengths
from amenable.plan.shape import ModelShape
from amenable.rollout.transformers_engine import RolloutCopy, TransformersEngine
from amenable.rollout.types import Request, Sampling
from amenable.train.loop import Optimizer

_TOKENS = (64, 512)
"""Of the smaller and the larger pass, about."""
_SEQUENCES = (4, 32)
_PROMPT_TOKENS = 16
_STEPS = 8
_ROOM = 0.4  # of the memory that weights, gradients and moments may take
_IMPORTS = "import torch, transformers, peft, amenable.train.ppo, torch.utils.tensorboard"


def calibrate(recipe: Recipe, shape: ModelShape, rows: Sequence[Lengths]) -> Rates:
    """Measures the rates and keeps them in the cache; half a minute for the demo's model.

    Args:
        recipe: precision and adapters.
        shape: of the model, whose configuration is used.
        rows: lengths of prompts with their completions, of which the median one is taken.

    Raises:
        UsageError: the model is too large for this machine.
        StorageError: the cache cannot be written.
    """
    machine, device = hardware(), best_device()
    dtype = resolve_dtype(recipe.model.dtype, device)
    needed = shape.parameters * (2 * dtype.itemsize if recipe.model.lora.enabled else 16)
    if needed > _ROOM * machine.memory_bytes:
        raise UsageError(
            f"--calibrate: {shape.name} leaves no room to train on this machine; leave "
            "--calibrate out, or take a smaller model.base"
        )
    role = _role(recipe, shape, dtype, device)
    row = sorted(rows, key=sum)[len(rows) // 2]
    small, large = (_batch(row, tokens, shape.vocabulary).to(device) for tokens in _TOKENS)
    _train(role, small)  # the first pass of a process also chooses kernels
    train = _line(partial(_train, role), small, large)
    step = _step_seconds(role)
    with torch.no_grad():
        forward = _line(role.logprobs, small, large)
    copied = RolloutCopy(role)
    merge = _seconds(copied.sync)
    engine = TransformersEngine(
        copied.model,
        eos_ids=frozenset(),
        pad_id=0,
        dtype=dtype,
        role=role if is_quantised(copied.model) else None,
    )
    decode = [(count, _step_of(engine, count, shape.vocabulary)) for count in _SEQUENCES]
    rates = Rates(
        forward=forward,
        train=train,
        decode=Line.through(*decode),
        step_s=step,
        merge_s=merge,
        file_s=shape.parameters * dtype.itemsize / DISK,
        startup_s=_startup(),
        origin=f"calibrated on this machine, {datetime.now(UTC):%Y-%m-%d}",
    )
    path = calibration_path(recipe, shape, identity(machine, dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"model": shape.name, "dtype": str(dtype), "rates": asdict(rates)})
    return rates


def _role(recipe: Recipe, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Role:
    """A policy with random weights."""
    config, lora = copy.deepcopy(shape.config), recipe.model.lora
    set_dropout_to_zero(config)
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype if lora.enabled else torch.float32
        )
    model = model.to(device).eval()
    shorten(model)
    if not lora.enabled:
        return Role(model, dtype=dtype)
    model.requires_grad_(False)
    if recipe.model.quantise != "none":
        quantise(model, recipe.model.quantise, dtype, device)
    return Role(add_adapter(model, "policy", lora, seed=0), "policy", dtype=dtype)


def _batch(row: Lengths, tokens: int, vocabulary: int) -> GroupBatch:
    """Rows of these lengths, of about so many tokens."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    count = max(1, tokens // sum(row))
    return collate([PromptGroup(ids(row[0]), list(map(ids, row[1:]))) for _ in range(count)], 0)


def _line(work: Callable[[GroupBatch], object], *batches: GroupBatch) -> Line:
    """Seconds of a pass by its tokens, padding included."""
    first, second = ((batch.input_ids.numel(), _seconds(partial(work, batch))) for batch in batches)
    return Line.through(first, second)


def _train(role: Role, batch: GroupBatch) -> None:
    role.logprobs(batch).logprobs.sum().backward()


def _step_seconds(role: Role) -> float:
    """Of an optimizer step with the gradients that are there, the first of which sets it up."""
    optimizer = Optimizer(role.trainable_parameters())
    grads = [torch.zeros_like(p) for p in role.trainable_parameters()]

    def step() -> None:
        for parameter, grad in zip(role.trainable_parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step(0.0)

    step()
    return _seconds(step)


def _step_of(engine: TransformersEngine, sequences: int, vocabulary: int) -> float:
    """Seconds of one decoding step: of many steps less those of a first token alone."""
    draw = random.Random(0)
    requests = [
        Request(tuple(draw.randrange(vocabulary) for _ in range(_PROMPT_TOKENS)), (n,))
        for n in range(sequences)
    ]

    def decode(tokens: int) -> float:
        sampling = Sampling(max_new_tokens=tokens, temperature=1.0)
        return _seconds(lambda: engine.generate(requests, sampling))

    return max(1e-6, (decode(1 + _STEPS) - decode(1)) / _STEPS)


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two times: what disturbs a measurement only makes it longer."""
    return min(_once(work), _once(work))


def _once(work: Callable[[], object]) -> float:
    _settle()
    start = time.perf_counter()
    work()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _startup() -> float:
    """Seconds that a new process takes to import what a run needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=False, capture_output=True)
    return time.perf_counter() - start
