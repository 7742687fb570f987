"""Our losses against what TRL's trainers compute on a batch that their own collators made.

The trainer's `compute_loss` sees the model that it was given; ours is computed from the plain
logits or scores of an untouched copy of it. Loss and gradients must agree to 1e-5.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="in an environment of its own: make test-peers")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from amenable.losses.likelihood import cross_entropy, sequence_logprobs, token_logprobs
from amenable.losses.masked import masked_mean
from amenable.losses.preference import bradley_terry_loss, centring_loss, dpo_loss

TOLERANCE = 1e-5
ROWS = [
    ("the cat sat on", " the mat", " the dog and the cat and the mat"),
    ("a dog", " ran on and on and on", " sat"),
    ("the mat and the dog and a cat", " sat", " ran on the mat"),
    ("cat", " and dog", " and"),
]
WORDS = sorted({word for row in ROWS for text in row for word in text.split()})
PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
    )


def tiny(kind: type, seed: int) -> Any:
    torch.manual_seed(seed)
    return kind(tiny_config())


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(ROWS),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def their_batch(trainer: Any) -> dict[str, Tensor]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def assert_same(name: str, ours: Tensor, theirs: Tensor, our_model: Any, their_model: Any) -> None:
    """Compare the losses and all gradients, and print the largest differences."""
    ours.backward()
    theirs.backward()
    loss = abs(ours.item() - theirs.item())
    pairs = zip(our_model.named_parameters(), their_model.named_parameters(), strict=True)
    differences = []
    for (our_name, mine), (their_name, other) in pairs:
        assert our_name == their_name
        assert (mine.grad is None) == (other.grad is None), our_name
        if mine.grad is not None:
            differences.append((mine.grad - other.grad).abs().max().item())
    grad = max(differences)
    print(f"\n{name}: loss {ours.item():.6f}, differs by {loss:.1e}, gradients by {grad:.1e}")
    assert loss < TOLERANCE
    assert grad < TOLERANCE


def completion_logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_logprobs(logits[:, :-1], batch["input_ids"][:, 1:])


def test_sft(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny(LlamaForCausalLM, 0)
    own = copy.deepcopy(model)
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in ROWS])
    trainer = SFTTrainer(
        model, SFTConfig(**arguments(tmp_path)), train_dataset=rows, processing_class=tokenizer
    )
    batch = their_batch(trainer)
    mask = batch["labels"][:, 1:] != -100
    assert int(mask.sum()) == sum(len(c.split()) + 1 for _, c, _ in ROWS)  # EOS is trained
    theirs = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=mask.sum())
    losses = cross_entropy(completion_logprobs(own, batch), mask)
    assert_same("SFT", masked_mean(losses, mask), theirs, own, model)


@pytest.mark.parametrize(("margins", "centring"), [(False, None), (True, None), (True, 0.01)])
def test_reward(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, margins: bool, centring: float | None
) -> None:
    model = tiny(LlamaForSequenceClassification, 1)
    own = copy.deepcopy(model)
    margin = torch.tensor([0.5, 0.0, 1.5, 1.0]) if margins else None
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS]
    rows = Dataset.from_list(pairs)
    if margin is not None:
        rows = rows.add_column("margin", margin.tolist())
    config = RewardConfig(**arguments(tmp_path), center_rewards_coefficient=centring)
    trainer = RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    batch = their_batch(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    # One row at a time, without padding: the score is read at the last real token.
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    single = [ids[:n].unsqueeze(0) for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    chosen, rejected = torch.cat([own(ids).logits.squeeze(1) for ids in single]).chunk(2)
    if margin is not None:  # the loader shuffles: take the margins as batched, check them as a set
        assert sorted(batch["margin"].tolist()) == sorted(margin.tolist())
    ours = bradley_terry_loss(chosen, rejected, batch.get("margin")).mean()
    if centring is not None:
        ours = ours + centring * centring_loss(chosen, rejected).mean()
    assert_same(f"reward, margins {margins}, centring {centring}", ours, theirs, own, model)


def test_dpo(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, reference = tiny(LlamaForCausalLM, 2), tiny(LlamaForCausalLM, 3)
    own, own_reference = copy.deepcopy(model), copy.deepcopy(reference)
    rows = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS])
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(**arguments(tmp_path), beta=0.3),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = their_batch(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    mask = batch["completion_mask"][:, 1:].bool()
    assert int(mask.sum()) == sum(len(c.split()) + len(r.split()) + 2 for _, c, r in ROWS)
    chosen, rejected = sequence_logprobs(completion_logprobs(own, batch), mask).chunk(2)
    with torch.no_grad():
        sums = sequence_logprobs(completion_logprobs(own_reference, batch), mask)
    ours = dpo_loss(chosen, rejected, *sums.chunk(2), beta=0.3).mean()
    assert_same("DPO", ours, theirs, own, model)
