"""Amenable's runs on the shared task: the policy stage of a run folder, from a recipe.

    .venv/bin/python benchmarks/parity/ours.py TASK OUT --algorithm ppo --seeds 0 1 2

A run's folder holds the policy at `task.save_points` as step-N, and run.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import task
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from amenable import __version__
from amenable.artifacts import MetricsLog, RunFolder, StageContext, read_json
from amenable.config.load import load_recipe
from amenable.progress import Deadline, Progress
from amenable.train.checkpoints import newest_folder
from amenable.train.registry import run_policy

VALIDATION_PAIRS = 8
"""DPO's validation rows, some of the training pairs: only the recipe's form asks for them."""


def recipe(folder: Path, algorithm: str) -> list[str]:
    """Settings as `--set` would give them."""
    own = task.SETTINGS[algorithm]
    common = {
        "model.base": str(folder / "start"),
        "model.dtype": "fp32",
        "model.lora.enabled": False,
        "data.prompts": str(folder / "prompts.train.jsonl"),
        "data.preferences": str(folder / "preferences.jsonl"),
        "data.max_prompt_tokens": 256,
        "data.max_completion_tokens": task.COMPLETION_TOKENS,
        "evaluate.best_of": 0,
        "policy.algorithm": algorithm,
        "policy.reward": f"{Path(task.__file__).resolve()}:score",
    }
    wanted = common | (_dpo(own) if algorithm == "dpo" else _on_policy(own))
    return [f"{key}={json.dumps(value)}" for key, value in wanted.items()]


def _on_policy(own: task.Row) -> dict[str, Any]:
    return {
        "policy.updates": own["updates"],
        "policy.prompts_per_update": own["prompts"],
        "policy.samples_per_prompt": own["samples"],
        "policy.epochs": own["epochs"],
        "policy.minibatches": 1,
        "policy.learning_rate": own["rate"],
        "policy.final_learning_rate_fraction": 0.0,
        "policy.max_grad_norm": own["grad_norm"],
        "policy.clip_range": own["clip"],
        "policy.max_approx_kl": 1e9,
        "policy.missing_eos_penalty": 0.0,
        "policy.micro_batch_tokens": 16384,
        "policy.checkpoint_every": own["updates"] // task.POINTS,
        "policy.gate": False,
        "policy.kl.coef": own["kl_coef"],
        "policy.kl.loss_estimator": "k3",
        "policy.ppo.critic_learning_rate": own["rate"],
        "policy.ppo.value_clip_range": own["clip"],
        "policy.ppo.gae_lambda": own.get("gae_lambda", 1.0),
    }


def _dpo(own: task.Row) -> dict[str, Any]:
    return {
        "policy.preference.beta": own["beta"],
        "policy.preference.epochs": float(own["epochs"]),
        "policy.preference.batch_size": own["batch"],
        "policy.preference.learning_rate": own["rate"],
        "policy.preference.warmup_fraction": 0.0,
        "policy.preference.weight_decay": 0.0,
        "policy.preference.max_grad_norm": own["grad_norm"],
        "policy.preference.micro_batch_tokens": 16384,
        "policy.preference.evaluations": task.POINTS,
    }


class PointLog(MetricsLog):
    """The stage's log; each time it is written to, it looks for a new checkpoint to keep."""

    def __init__(self, stage: str, folder: Path, out: Path, start: Path, updates: int) -> None:
        super().__init__(stage, folder, tensorboard=False)
        self._checkpoints, self._out = folder / "checkpoints", out
        self._start_model = start
        self._left = set(task.save_points(updates))

    def write(self, step: int, **figures: float) -> None:
        """Log a step."""
        self.keep()
        super().write(step, **figures)

    def keep(self) -> None:
        """Export the checkpoint as a model folder, if it is of a wanted update."""
        last = newest_folder(self._checkpoints)
        if last is None:
            return
        numbers = read_json(last / "numbers.json")
        done = numbers.get("updates", numbers.get("step"))
        if done not in self._left:
            return
        self._left.remove(done)
        name = "policy" if "updates" in numbers else "weights"
        model = AutoModelForCausalLM.from_pretrained(self._start_model, dtype=torch.float32)
        weights = load_file(last / f"{name}.safetensors")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(weights[key])
        model.save_pretrained(self._out / f"step-{done}")


def write_inputs(folder: Path, run: RunFolder) -> None:
    """The shared rows, where the policy stage looks for them."""
    run.data.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "prompts.train.jsonl", run.data / "prompts.train.jsonl")
    pairs = task.read_rows(folder / "preferences.jsonl")
    task.write_rows(run.data / "preferences.train.jsonl", pairs)
    task.write_rows(run.data / "preferences.validation.jsonl", pairs[:VALIDATION_PAIRS])


def train(
    folder: Path,
    out: Path,
    algorithm: str,
    seed: int,
    settings: Sequence[str] = (),
    run_stage: Callable[[StageContext], object] = run_policy,
) -> task.Row:
    """One run; only the policy stage is timed, as only `trainer.train()` is on the other side."""
    own, run = task.SETTINGS[algorithm], RunFolder(out / "run")
    steps = own.get("updates") or own["epochs"] * own["pairs"] // own["batch"]
    write_inputs(folder, run)
    log = PointLog("policy", run.stage("policy"), out, folder / "start", steps)
    ctx = StageContext(
        recipe=load_recipe(None, [*recipe(folder, algorithm), *settings, f"seed={seed}"]),
        folder=run,
        stage="policy",
        log=log,
        progress=Progress(quiet=True),
        deadline=Deadline(None),
    )
    began, cpu = time.monotonic(), time.process_time()
    run_stage(ctx)
    log.keep()
    found = {
        "algorithm": algorithm,
        "side": f"Amenable {__version__}",
        "seed": seed,
        "wall_s": round(time.monotonic() - began, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }
    (out / "run.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path, help="runs go to OUT/ALGORITHM-ours-SEED")
    parser.add_argument("--algorithm", choices=sorted(task.SETTINGS), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    for seed in options.seeds:
        out = options.out / f"{options.algorithm}-ours-{seed}"
        if (out / "run.json").exists():
            continue
        shutil.rmtree(out, ignore_errors=True)
        found = train(options.task, out, options.algorithm, seed)
        print(json.dumps(found), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
