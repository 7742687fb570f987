"""What both versions of TRL share here: settings, the timer, and a process's main function.

Precision is TRL's own: `bf16=True` is autocast over float32 weights. A step is made of
micro-batches of `BATCH` rows, TRL's default; gradient checkpointing, which is on by default, is
off: it would trade time for memory. Nothing is saved or reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laps
import torch
import trl
import work
from transformers import TrainerCallback
from trl_common import common

BATCH = 8


class Steps(TrainerCallback):
    """Tells the timer of every optimizer step (PPO: of every update)."""

    def __init__(self, timer: laps.Laps) -> None:
        self._timer = timer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a step."""
        self._timer.mark()


def settings(out: Path, rows: int, dtype: str, steps: int) -> dict[str, Any]:
    """Of every trainer.

    Args:
        out: a folder for the trainer.
        rows: of a step.
        dtype: `bf16` or `fp32`.
        steps: all of them.
    """
    return {
        **common(out, 0),
        "bf16": dtype == "bf16",
        "per_device_train_batch_size": min(BATCH, rows),
        "gradient_accumulation_steps": max(1, rows // BATCH),
        "max_steps": steps,
        "learning_rate": work.RATE,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
    }


Builder = Callable[[Any, dict[str, Any], dict[str, Any]], Any]


def main(about: str | None, algorithms: dict[str, Builder]) -> None:
    """Time one trainer.

    Args:
        about: help.
        algorithms: of each, a function of (arguments, work, settings) that returns a trainer.
    """
    options = laps.parser(about).parse_args()
    timer, found = laps.Laps(options.steps), work.read(options.work)
    rows = len(found["rows"])
    if options.algorithm in ("grpo", "rloo"):
        rows = len(found["settings"]["online"]) * found["settings"]["samples"]
    with tempfile.TemporaryDirectory() as out:
        own = settings(Path(out), rows, options.dtype, timer.planned)
        trainer = algorithms[options.algorithm](options, found, own)
        trainer.add_callback(Steps(timer))
        trainer.train()
        check_lengths(trainer.state.log_history)
        timer.report(f"TRL {trl.__version__}", torch.get_num_threads())


def check_lengths(history: list[dict[str, Any]]) -> None:
    """Raises SystemExit where completions of another length were sampled (GRPO, RLOO)."""
    for row in history:
        length = row.get("completions/mean_length", work.NEW_TOKENS)
        if length != work.NEW_TOKENS:
            raise SystemExit(f"completions have {length} tokens, and not {work.NEW_TOKENS}")
