"""One process of TRL's side (1.16): a few steps of SFT, reward model, DPO, GRPO or RLOO.

    .venv-peers-trl/bin/python benchmarks/peers/trl_side.py WORK ALGORITHM [--dtype bf16|fp32]

Losses and their settings are those of `make parity`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import task
import torch
import trl_driver
import trl_new
import work
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

Settings = dict[str, Any]


def causal_lm(folder: Path) -> Any:
    """The start model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)


def pairs(found: Settings) -> Dataset:
    """Prompts with a chosen and a rejected completion."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["output_text"], "rejected": row["rejected"]}
            for row in found["rows"]
        ]
    )


def sft(options: Any, found: Settings, own: Settings) -> SFTTrainer:
    """Loss on the completions alone, as TRL has it for rows of prompt and completion."""
    rows = [{"prompt": row["prompt"], "completion": row["output_text"]} for row in found["rows"]]
    return SFTTrainer(
        model=causal_lm(options.work),
        args=SFTConfig(**own, max_length=None),
        processing_class=AutoTokenizer.from_pretrained(options.work / "start"),
        train_dataset=Dataset.from_list(rows),
    )


def reward(options: Any, found: Settings, own: Settings) -> RewardTrainer:
    """A random head on the start model."""
    model = AutoModelForSequenceClassification.from_pretrained(
        options.work / "start", num_labels=1, dtype=torch.float32
    )
    return RewardTrainer(
        model=model,
        args=RewardConfig(**own, max_length=None),
        processing_class=AutoTokenizer.from_pretrained(options.work / "start"),
        train_dataset=pairs(found),
    )


def dpo(options: Any, found: Settings, own: Settings) -> DPOTrainer:
    """The reference is asked in every step, as TRL does by default."""
    return DPOTrainer(
        model=causal_lm(options.work),
        ref_model=causal_lm(options.work),
        args=DPOConfig(**own, max_length=None),
        processing_class=AutoTokenizer.from_pretrained(options.work / "start"),
        train_dataset=pairs(found),
    )


def online(found: Settings, own: Settings, losses: task.Row) -> Settings:
    """Settings that GRPO and RLOO share."""
    sizes = found["settings"]
    wanted = {**losses, "epochs": 1, "rate": work.RATE, "updates": own["max_steps"]}
    wanted |= {"prompts": len(sizes["online"]), "samples": sizes["samples"]}
    return {
        **trl_new.online(Path(), Path(own["output_dir"]), 0, wanted),
        **own,
        "steps_per_generation": own["gradient_accumulation_steps"],
        "max_completion_length": work.NEW_TOKENS,
    }


def trainer(kind: Any, config: Any, options: Any, found: Settings) -> Any:
    """A GRPO or RLOO trainer; the reward is a function of the text."""
    rows = [
        {"prompt": row["prompt"], "output_text": row["output_text"]}
        for row in work.online_rows(found)
    ]
    return kind(
        model=causal_lm(options.work),
        args=config,
        reward_funcs=trl_new.reward,
        processing_class=AutoTokenizer.from_pretrained(options.work / "start", padding_side="left"),
        train_dataset=Dataset.from_list(rows),
    )


def grpo(options: Any, found: Settings, own: Settings) -> GRPOTrainer:
    """The KL in the loss."""
    config = GRPOConfig(
        **online(found, own, task.GRPO), loss_type="grpo", use_bias_correction_kl=False
    )
    return trainer(GRPOTrainer, config, options, found)


def rloo(options: Any, found: Settings, own: Settings) -> RLOOTrainer:
    """The KL in the reward."""
    return trainer(RLOOTrainer, RLOOConfig(**online(found, own, task.RLOO)), options, found)


if __name__ == "__main__":
    trl_driver.main(__doc__, {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "rloo": rloo})
