"""Runs of TRL 1.12's PPO on the shared task.

    .venv-peers-trl112/bin/python benchmarks/parity/trl_ppo.py TASK OUT --algorithm ppo

A run's folder holds the policy at `task.save_points` as step-N, and run.json.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import task
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_common import SavePoints, common, prompts, run_seeds


class FunctionReward(nn.Module):
    """`task.score` in the shape in which this trainer calls a reward model.

    It passes ids and reads a score a position; every position holds the completion's score.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, rows: list[task.Row]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._rows = {tuple(tokenizer(row["prompt"])["input_ids"]): row for row in rows}
        self._tail = len(tokenizer("\n<|im_start|>assistant\n")["input_ids"])

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Scores [N, T, 1] in the place of hidden states."""
        texts, rows = [], []
        eos = self._tokenizer.eos_token_id
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            real = [token for token, here in zip(ids, mask, strict=True) if here]
            end = real.index(eos) + 1 + self._tail
            rows.append(self._rows[tuple(real[:end])])
            texts.append(self._tokenizer.decode(real[end:], skip_special_tokens=True).strip())
        scores = torch.tensor(task.score([], texts, rows))
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, states: Tensor) -> Tensor:
        """The head: nothing left to do."""
        return states


def ppo(folder: Path, out: Path, seed: int) -> PPOTrainer:
    """A trainer of one run."""
    own, start = task.PPO, str(folder / "start")
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    rows = prompts(folder)
    ids = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2)
    )
    value = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, dtype=torch.float32
    )
    nn.init.zeros_(value.score.weight)
    batch = own["prompts"] * own["samples"]
    config = PPOConfig(
        **common(out, seed),
        per_device_train_batch_size=batch,
        num_mini_batches=1,
        local_rollout_forward_batch_size=batch,
        total_episodes=own["updates"] * batch,
        num_ppo_epochs=own["epochs"],
        learning_rate=own["rate"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        adam_epsilon=task.ADAM_EPS,
        weight_decay=0.0,
        kl_coef=own["kl_coef"],
        kl_estimator="k1",
        whiten_rewards=False,
        missing_eos_penalty=None,
        cliprange=own["clip"],
        cliprange_value=own["clip"],
        vf_coef=1.0,
        gamma=1.0,
        lam=own["gae_lambda"],
        temperature=1.0,
        response_length=task.COMPLETION_TOKENS,
        stop_token="eos",
        num_sample_generations=0,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=FunctionReward(tokenizer, rows),
        value_model=value,
        train_dataset=Dataset.from_list(ids),
        eval_dataset=Dataset.from_list(ids[:2]),
        callbacks=[SavePoints(out, own["updates"], policy=policy)],
    )


if __name__ == "__main__":
    run_seeds(__doc__, f"TRL {trl.__version__}", {"ppo": ppo})
