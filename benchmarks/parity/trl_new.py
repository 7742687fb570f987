"""Runs of TRL 1.16's GRPO, RLOO and DPO on the shared task.

    .venv-peers-trl/bin/python benchmarks/parity/trl_new.py TASK OUT --algorithm grpo --seeds 0 1 2

A run's folder holds the policy at `task.save_points` as step-N, and run.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import task
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl_common import SavePoints, common, optimizers, prompts, run_seeds


def reward(completions: list[str], output_text: list[str], **_: Any) -> list[float]:
    """`task.score` as these trainers call it."""
    texts = [text.strip() for text in completions]
    return task.score([], texts, [{"output_text": text} for text in output_text])


def online(folder: Path, out: Path, seed: int, own: task.Row) -> dict[str, Any]:
    """Settings that GRPO and RLOO share."""
    return {
        **common(out, seed),
        "per_device_train_batch_size": own["prompts"] * own["samples"],
        "num_generations": own["samples"],
        "steps_per_generation": 1,
        "num_iterations": own["epochs"],
        "max_steps": own["updates"] * own["epochs"],
        "learning_rate": own["rate"],
        "max_grad_norm": own["grad_norm"],
        "beta": own["kl_coef"],
        "epsilon": own["clip"],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_completion_length": task.COMPLETION_TOKENS,
        "mask_truncated_completions": False,
        "logging_steps": 10,
    }


def build(trainer: Any, config: Any, folder: Path, out: Path, own: task.Row) -> Any:
    """A GRPO or RLOO trainer of one run."""
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    columns = ("prompt", "output_text")
    return trainer(
        model=model,
        args=config,
        reward_funcs=reward,
        processing_class=AutoTokenizer.from_pretrained(folder / "start", padding_side="left"),
        train_dataset=Dataset.from_list([{c: r[c] for c in columns} for r in prompts(folder)]),
        optimizers=optimizers(model, own["rate"], own["updates"], own["epochs"]),
        callbacks=[SavePoints(out, own["updates"], own["epochs"])],
    )


def grpo(folder: Path, out: Path, seed: int) -> GRPOTrainer:
    """The loss as published: a mean over a sequence's tokens, then over sequences; k3 in it."""
    config = GRPOConfig(
        **online(folder, out, seed, task.GRPO),
        loss_type="grpo",
        scale_rewards="group",
        importance_sampling_level="token",
        use_bias_correction_kl=False,
    )
    return build(GRPOTrainer, config, folder, out, task.GRPO)


def rloo(folder: Path, out: Path, seed: int) -> RLOOTrainer:
    """The KL sum in the reward; one step a roll-out batch, so that every ratio is 1."""
    config = RLOOConfig(**online(folder, out, seed, task.RLOO), normalize_advantages=False)
    return build(RLOOTrainer, config, folder, out, task.RLOO)


def dpo(folder: Path, out: Path, seed: int) -> DPOTrainer:
    """On the pairs of the task folder."""
    own = task.DPO
    rows = [
        {
            "prompt": task.render(row["input_text"]),
            "chosen": row[f"candidate_{row['choice']}"],
            "rejected": row[f"candidate_{1 - row['choice']}"],
        }
        for row in task.read_rows(folder / "preferences.jsonl")
    ]
    steps = own["epochs"] * own["pairs"] // own["batch"]
    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
        for _ in range(2)
    )
    config = DPOConfig(
        **common(out, seed),
        per_device_train_batch_size=own["batch"],
        max_steps=steps,
        learning_rate=own["rate"],
        max_grad_norm=own["grad_norm"],
        beta=own["beta"],
        loss_type=["sigmoid"],
        label_smoothing=0.0,
        max_length=None,
        logging_steps=20,
    )
    return DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
        train_dataset=Dataset.from_list(rows),
        optimizers=optimizers(model, own["rate"], steps, eps=task.DPO_ADAM_EPS),
        callbacks=[SavePoints(out, steps)],
    )


if __name__ == "__main__":
    run_seeds(__doc__, f"TRL {trl.__version__}", {"grpo": grpo, "rloo": rloo, "dpo": dpo})
