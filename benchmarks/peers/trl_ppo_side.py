"""One process of TRL's side (1.12, the last with PPO): a few updates of PPO.

    .venv-peers-trl112/bin/python benchmarks/peers/trl_ppo_side.py WORK ppo [--mode full|lora]

The reward model is a model on both sides, and the critic starts from it. `--mode lora` is TRL's own
option: adapters on the policy, no reference model beside it, and a critic of which every weight is
trained.
"""

from __future__ import annotations

from typing import Any

import task
import torch
import trl_driver
import work
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def ppo(options: Any, found: dict[str, Any], own: dict[str, Any]) -> PPOTrainer:
    """A trainer."""
    start, lora = str(options.work / "start"), options.mode == "lora"
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    ids = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in found["rows"]]
    policy, reference = (
        None if absent else AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        for absent in (False, lora)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(
            options.work / "reward" / "full", num_labels=1, dtype=torch.float32
        )
        for _ in range(2)
    )
    steps = own.pop("max_steps")
    config = PPOConfig(
        **own,
        total_episodes=steps * len(ids),
        num_ppo_epochs=work.PPO_EPOCHS,
        num_mini_batches=1,
        local_rollout_forward_batch_size=len(ids),
        kl_coef=task.PPO["kl_coef"],
        missing_eos_penalty=None,
        cliprange=task.PPO["clip"],
        cliprange_value=task.PPO["clip"],
        gamma=1.0,
        lam=task.PPO["gae_lambda"],
        temperature=1.0,
        response_length=work.NEW_TOKENS,
        stop_token="eos",
        num_sample_generations=0,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(ids),
        eval_dataset=Dataset.from_list(ids[:2]),
        peft_config=LORA if lora else None,
    )


if __name__ == "__main__":
    trl_driver.main(__doc__, {"ppo": ppo})
