"""What the peers' runs share: arguments, the optimizer, saved policies, and a run's figures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import task
import torch
from transformers import TrainerCallback


def run_seeds(about: str | None, side: str, algorithms: dict[str, Callable[..., Any]]) -> None:
    """Train every wanted seed that has not been: `TASK OUT --algorithm NAME --seeds 0 1 2`.

    Args:
        about: help.
        side: name and version of the library.
        algorithms: of each, a function of (task folder, folder of the run, seed) that returns a
            trainer. Only `trainer.train()` is timed.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path, help="runs go to OUT/ALGORITHM-SIDE-SEED")
    parser.add_argument("--algorithm", choices=sorted(algorithms), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    for seed in options.seeds:
        folder = options.out / f"{options.algorithm}-trl-{seed}"
        if (folder / "run.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        trainer = algorithms[options.algorithm](options.task, folder, seed)
        began, cpu = time.monotonic(), time.process_time()
        trainer.train()
        found = {
            "algorithm": options.algorithm,
            "side": side,
            "seed": seed,
            "wall_s": round(time.monotonic() - began, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
        }
        (folder / "run.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(json.dumps(found), flush=True)


def prompts(folder: Path) -> list[task.Row]:
    """Training rows with the rendered prompt as `prompt`."""
    rows = task.read_rows(folder / "prompts.train.jsonl")
    return [{**row, "prompt": task.render(row["input_text"])} for row in rows]


def optimizers(
    model: Any, rate: float, updates: int, steps: int = 1, eps: float = task.ADAM_EPS
) -> tuple[Any, Any]:
    """AdamW, and a rate that falls linearly to 0 by updates of `steps` optimizer steps each."""
    adam = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.999), eps=eps, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: task.linear_decay(min(step // steps, updates), updates)
    )
    return adam, schedule


class SavePoints(TrainerCallback):
    """Saves the policy when an update of `task.save_points` is done.

    Args:
        out: folder of the run.
        updates: how many there will be.
        steps: optimizer steps that the trainer counts in an update.
        policy: the model, where the trainer wraps it.
    """

    def __init__(self, out: Path, updates: int, steps: int = 1, policy: Any = None) -> None:
        self._out, self._steps, self._policy = out, steps, policy
        self._points = set(task.save_points(updates))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After an optimizer step (PPO: an update)."""
        done, left = divmod(state.global_step, self._steps)
        if left == 0 and done in self._points:
            (self._policy or model).save_pretrained(self._out / f"step-{done}")


def common(folder: Path, seed: int) -> dict[str, Any]:
    """Settings of every trainer: one core, float32, nothing saved or reported but by us."""
    return {
        "output_dir": str(folder / "trainer"),
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_accumulation_steps": 1,
    }
