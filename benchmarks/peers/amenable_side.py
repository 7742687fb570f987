"""One process of Amenable's side: a few steps of a stage, through the stage's own code.

    .venv/bin/python benchmarks/peers/amenable_side.py WORK ALGORITHM [--mode full|lora|head]

`--mode lora` trains adapters on one frozen base, PPO's critic too; `--mode head` trains of PPO's
critic only a scalar head on the frozen reward model's states. The stage is left after the last
timed step: no evaluation, checkpoint or export is timed. DPO measures its reference ahead of the
first step, here once for the rows that every step sees; that time is added to a step.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import laps
import task
import torch
import work

from amenable import __version__
from amenable.artifacts import MetricsLog, RunFolder, StageContext
from amenable.config.load import load_recipe
from amenable.pipeline.process import keep_freed_memory
from amenable.progress import Deadline, Progress, Tracker
from amenable.train import reward, sft
from amenable.train.registry import run_policy

STAGES: dict[str, tuple[str, Callable[[StageContext], object]]] = {
    "sft": ("sft", sft.run),
    "reward": ("reward", reward.run),
    **dict.fromkeys(("dpo", "grpo", "rloo", "ppo"), ("policy", run_policy)),
}


class Enough(Exception):
    """The last timed step is done."""


class Clock(MetricsLog):
    """The stage's log, which hears of the end of every step."""

    def __init__(self, stage: str, folder: Path, timer: laps.Laps) -> None:
        super().__init__(stage, folder, tensorboard=False)
        self._timer = timer

    def write(self, step: int, **figures: float) -> None:
        """Log a step.

        Raises:
            Enough: it was the last timed one.
            SystemExit: completions of another length were sampled.
        """
        super().write(step, **figures)
        length = figures.get("completion_tokens", work.NEW_TOKENS)
        if length != work.NEW_TOKENS:
            raise SystemExit(f"completions have {length} tokens, and not {work.NEW_TOKENS}")
        if self._timer.mark():
            raise Enough


class Sweep(Progress):
    """Says nothing, and times DPO's sweep over the reference."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seconds = 0.0

    @contextmanager
    def track(self, total: int, description: str, done: int = 0) -> Iterator[Tracker]:
        """Times a piece of work if it is the sweep."""
        began = time.monotonic()
        with super().track(total, description, done) as tracker:
            yield tracker
        if description == "policy: reference":
            self.seconds += time.monotonic() - began


def recipe(folder: Path, run: RunFolder, options: Any, settings: dict[str, Any]) -> list[str]:
    """Settings as `--set` would give them."""
    prompts = settings["online"] if options.algorithm in ("grpo", "rloo") else settings["lengths"]
    rows = len(settings["lengths"])
    supervised = {
        "epochs": float(options.steps + 2),
        "batch_size": rows,
        "learning_rate": work.RATE,
        "warmup_fraction": 0.0,
        "evaluations": 1,
    }
    ppo = options.algorithm == "ppo"
    wanted = {
        "model.base": str(folder / "start"),
        "model.dtype": options.dtype,
        "model.lora.enabled": options.mode != "full",
        "data.demonstrations": str(run.data / "demonstrations.train.jsonl"),
        "data.preferences": str(run.data / "preferences.train.jsonl"),
        "data.prompts": str(run.data / "prompts.train.jsonl"),
        "data.max_prompt_tokens": max(settings["lengths"]),
        "data.max_completion_tokens": work.NEW_TOKENS,
        "evaluate.best_of": 0,
        "policy.algorithm": options.algorithm
        if STAGES[options.algorithm][0] == "policy"
        else "ppo",
        "policy.reward": "" if ppo else f"{Path(task.__file__).resolve()}:score",
        "policy.updates": options.steps + 2,
        "policy.prompts_per_update": len(prompts),
        "policy.samples_per_prompt": 1 if ppo else settings["samples"],
        "policy.epochs": work.PPO_EPOCHS if ppo else 1,
        "policy.minibatches": 1,
        "policy.learning_rate": work.RATE,
        "policy.max_approx_kl": 1e9,
        "policy.missing_eos_penalty": 0.0,
        "policy.checkpoint_every": 1000,
        "checkpoint.every_minutes": 0,
        "policy.gate": False,
        "policy.kl.coef": task.GRPO["kl_coef"],
        "policy.ppo.critic": "head" if options.mode == "head" else "adapter",
        "policy.ppo.critic_learning_rate": work.RATE,
    }
    if STAGES[options.algorithm][0] == "policy":
        wanted["policy.algorithm"] = options.algorithm
    for section in ("sft", "reward", "policy.preference"):
        wanted |= {f"{section}.{key}": value for key, value in supervised.items()}
    return [f"{key}={json.dumps(value)}" for key, value in wanted.items()]


def write_inputs(folder: Path, run: RunFolder, options: Any, found: dict[str, Any]) -> None:
    """The rows and the reward model, where the stage looks for them."""
    run.data.mkdir(parents=True)
    rows = found["rows"]
    pairs = [
        {"candidate_0": row["output_text"], "candidate_1": row["rejected"], "choice": 0, **row}
        for row in rows
    ]
    for split, count in (("train", len(rows)), ("validation", 2), ("test", 2)):
        task.write_rows(run.data / f"demonstrations.{split}.jsonl", rows[:count])
        task.write_rows(run.data / f"preferences.{split}.jsonl", pairs[:count])
    wanted = work.online_rows(found) if options.algorithm in ("grpo", "rloo") else rows
    task.write_rows(run.data / "prompts.train.jsonl", wanted)
    if options.algorithm == "ppo":
        run.models.mkdir()
        kind = "full" if options.mode == "full" else "lora"
        (run.models / "reward").symlink_to((folder / "reward" / kind).resolve())


def main() -> None:
    options = laps.parser(__doc__).parse_args()
    stage, run_stage = STAGES[options.algorithm]
    timer, sweep = laps.Laps(options.steps), Sweep()
    found = work.read(options.work)
    with tempfile.TemporaryDirectory() as root:
        run = RunFolder(Path(root) / "run")
        write_inputs(options.work, run, options, found)
        ctx = StageContext(
            recipe=load_recipe(None, recipe(options.work, run, options, found["settings"])),
            folder=run,
            stage=stage,
            log=Clock(stage, run.stage(stage), timer),
            progress=sweep,
            deadline=Deadline(None),
        )
        try:
            run_stage(ctx)
        except Enough:
            timer.report(f"Amenable {__version__}", torch.get_num_threads(), sweep.seconds)


if __name__ == "__main__":
    keep_freed_memory()  # as `amenable run` does
    main()
