"""Our losses against what TRL's trainers compute on a batch that their own collators made.

The trainer's `compute_loss` sees the model that it was given; ours is computed from the plain
logits or scores of an untouched copy of it. Loss and gradients must agree to 1e-5.
"""

from __future__ import annotations

import copy
import os
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
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from amenable.losses.advantages import group_relative, leave_one_out
from amenable.losses.aggregation import token_weights
from amenable.losses.direct_preference import dpo_loss, ipo_loss, robust_dpo_loss
from amenable.losses.kl import k3, kl_loss
from amenable.losses.kto import kto_loss, kto_reference_point
from amenable.losses.likelihood import (
    cross_entropy,
    mean_logprobs,
    sequence_logprobs,
    token_logprobs,
)
from amenable.losses.masked import masked_mean
from amenable.losses.policy import clipped_tokens, gspo_policy_loss, ppo_policy_loss
from amenable.losses.preference import bradley_terry_loss, centring_loss
from amenable.losses.reference_free import odds_ratio_loss, simpo_loss

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


def preference_rows() -> Dataset:
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS])


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo"])
def test_dpo(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loss_type: str) -> None:
    """IPO: theirs divides each log-ratio by its completion's length, ours does where it is given
    mean log-probabilities; the paper's sum differs.
    """
    model, reference = tiny(LlamaForCausalLM, 2), tiny(LlamaForCausalLM, 3)
    own, own_reference = copy.deepcopy(model), copy.deepcopy(reference)
    smoothing = 0.1 if loss_type == "robust" else 0.0
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(**arguments(tmp_path), beta=0.3, loss_type=loss_type, label_smoothing=smoothing),
        train_dataset=preference_rows(),
        processing_class=tokenizer,
    )
    batch = their_batch(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    mask = batch["completion_mask"][:, 1:].bool()
    assert int(mask.sum()) == sum(len(c.split()) + len(r.split()) + 2 for _, c, r in ROWS)
    sums = sequence_logprobs(completion_logprobs(own, batch), mask)
    with torch.no_grad():
        ref_sums = sequence_logprobs(completion_logprobs(own_reference, batch), mask)
    if loss_type == "sigmoid":
        ours = dpo_loss(*sums.chunk(2), *ref_sums.chunk(2), beta=0.3)
    elif loss_type == "robust":
        ours = robust_dpo_loss(*sums.chunk(2), *ref_sums.chunk(2), beta=0.3, flip_rate=0.1)
    else:
        counts = mask.sum(dim=1)
        means = [mean_logprobs(x, counts).chunk(2) for x in (sums, ref_sums)]
        ours = ipo_loss(*means[0], *means[1], beta=0.3)
        summed = ipo_loss(*sums.chunk(2), *ref_sums.chunk(2), beta=0.3).mean()
        assert abs(summed.item() - theirs.item()) > 0.1
    assert_same(f"DPO, {loss_type}", ours.mean(), theirs, own, model)


def test_kto(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Theirs shows the mismatched completions to the policy as well; ours takes their
    log-probabilities.
    """
    model, reference = tiny(LlamaForCausalLM, 2), tiny(LlamaForCausalLM, 3)
    own, own_reference = copy.deepcopy(model), copy.deepcopy(reference)
    rows = [
        {"prompt": prompt, "completion": text, "label": label}
        for prompt, chosen, rejected in ROWS
        for text, label in ((chosen, True), (rejected, False))
    ][:-1]
    settings = {**arguments(tmp_path), "per_device_train_batch_size": len(rows)}
    trainer = KTOTrainer(
        model,
        reference,
        KTOConfig(**settings, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = their_batch(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))

    def sums(net: Any, prefix: str) -> Tensor:
        part = {key: batch[prefix + key] for key in ("input_ids", "attention_mask")}
        mask = batch[prefix + "completion_mask"][:, 1:].bool()
        return sequence_logprobs(completion_logprobs(net, part), mask)

    with torch.no_grad():
        point = kto_reference_point(sums(own, "KL_"), sums(own_reference, "KL_"))
        ref = sums(own_reference, "")
    assert point.item() > 0.1
    desirable = torch.as_tensor(batch["label"]).bool()
    assert 0 < int(desirable.sum()) < len(desirable)
    ours = kto_loss(sums(own, ""), ref, desirable, point, 0.3, 1.2, 0.7).mean()
    assert_same("KTO", ours, theirs, own, model)


def pair_sums(own: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums and counts, chosen and rejected each, of a batch of the experimental collator."""
    sums, counts = [], []
    for side in ("chosen", "rejected"):
        part = {key: batch[f"{side}_{key}"] for key in ("input_ids", "attention_mask")}
        mask = batch[f"{side}_labels"][:, 1:] != -100
        sums.append(sequence_logprobs(completion_logprobs(own, part), mask))
        counts.append(mask.sum(dim=1))
    return sums, counts


def test_simpo(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny(LlamaForCausalLM, 4)
    own = copy.deepcopy(model)
    config = CPOConfig(
        **arguments(tmp_path), loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0
    )
    trainer = CPOTrainer(model, config, train_dataset=preference_rows(), processing_class=tokenizer)
    batch = their_batch(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    sums, counts = pair_sums(own, batch)
    ours = simpo_loss(*sums, *counts, beta=2.0, margin=0.5).mean()
    assert_same("SimPO", ours, theirs, own, model)


def test_orpo(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Their likelihood term is the mean over tokens of prompt and completion; the paper's is over
    the completion.
    """
    model = tiny(LlamaForCausalLM, 5)
    own = copy.deepcopy(model)
    trainer = ORPOTrainer(
        model,
        ORPOConfig(**arguments(tmp_path), beta=0.7),
        train_dataset=preference_rows(),
        processing_class=tokenizer,
    )
    batch = their_batch(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    sums, counts = pair_sums(own, batch)
    chosen = {key: batch[f"chosen_{key}"] for key in ("input_ids", "attention_mask")}
    whole = chosen["attention_mask"][:, 1:].bool()
    likelihood = masked_mean(cross_entropy(completion_logprobs(own, chosen), whole), whole)
    ours = likelihood + 0.7 * odds_ratio_loss(*sums, *counts).mean()
    assert_same("ORPO", ours, theirs, own, model)


def roll_out(seed: int) -> dict[str, Tensor]:
    """A made-up batch of four completions, of lengths 5, 1, 3 and 4, after prompts of 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4]).unsqueeze(1)
    ids = torch.randint(3, len(WORDS) + 3, (4, 8), generator=generator)
    return {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones(4, 3, dtype=torch.int64),
        "completion_ids": torch.where(mask, ids[:, 3:], PAD),
        "completion_mask": mask.long(),
        "advantages": torch.randn(4, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


def completion_part(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, 2:-1]
    return token_logprobs(logits, batch["completion_ids"])


GRPO_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("sequence", {"loss_type": "grpo"}),
    ("token", {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("token", {"loss_type": "bnpo"}),
    ("constant", {"loss_type": "dr_grpo"}),
    ("sequence", {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False}),
    ("sequence", {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True}),
    ("sequence", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
]


@pytest.mark.parametrize(("aggregation", "settings"), GRPO_KINDS)
def test_grpo(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, aggregation: Any, settings: dict[str, Any]
) -> None:
    model, old, ref = (tiny(LlamaForCausalLM, seed) for seed in (6, 6, 7))
    own = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    beta = settings.get("beta", 0.0)
    config = GRPOConfig(
        **arguments(tmp_path), num_generations=4, max_completion_length=6, **settings | {"beta": 0}
    )
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        config,
        train_dataset=Dataset.from_list([{"prompt": p} for p, _, _ in ROWS]),
        processing_class=tokenizer,
    )
    trainer.beta = beta  # set in the config, it would load a reference from the hub
    batch = roll_out(0)
    with torch.no_grad():
        batch["old_per_token_logps"] = old_logprobs = completion_part(old, batch)
        batch["ref_per_token_logps"] = ref_logprobs = completion_part(ref, batch)
    trainer.model.eval()  # no accumulation to divide by; there is no dropout
    theirs = trainer._compute_loss(trainer.model, batch)
    logprobs, mask = completion_part(own, batch), batch["completion_mask"].bool()
    advantages = batch["advantages"].unsqueeze(1).expand(mask.shape)
    clip = (0.2, settings.get("epsilon_high", 0.2))
    if settings.get("importance_sampling_level") == "sequence":
        losses = gspo_policy_loss(logprobs, old_logprobs, advantages, mask, clip)
    else:
        losses = ppo_policy_loss(logprobs, old_logprobs, advantages, clip)
    if settings.get("use_bias_correction_kl"):
        losses = losses + beta * kl_loss(logprobs, old_logprobs, ref_logprobs)
    elif beta:
        losses = losses + beta * k3(logprobs, ref_logprobs)
    clipped = clipped_tokens(logprobs, old_logprobs, advantages, clip)[mask]
    assert 0 < int(clipped.sum()) < clipped.numel()
    weights = token_weights(mask, aggregation, length=6)
    assert_same(f"GRPO, {settings}", (losses * weights)[mask].sum(), theirs, own, model)


@pytest.mark.parametrize("scale", ["group", "none", "leave-one-out"])
def test_group_advantages(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, scale: str) -> None:
    """What their trainers make of eight scores, of two prompts with four completions each."""
    scores = [0.5, 2.0, -1.0, 0.0, 3.0, 3.0, 3.0, 2.5]
    settings: dict[str, Any] = {
        **arguments(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
    }
    common = {
        "reward_funcs": lambda completions, **_: scores[: len(completions)],
        "train_dataset": Dataset.from_list([{"prompt": p} for p, _, _ in ROWS]),
        "processing_class": tokenizer,
    }
    model = tiny(LlamaForCausalLM, 8)
    trainer: Any
    if scale == "leave-one-out":
        trainer = RLOOTrainer(model, args=RLOOConfig(**settings, beta=0.0), **common)
        ours = leave_one_out(torch.tensor(scores).reshape(2, 4))
    else:
        trainer = GRPOTrainer(model, args=GRPOConfig(**settings, scale_rewards=scale), **common)
        kind = "std" if scale == "group" else None
        ours = group_relative(torch.tensor(scores).reshape(2, 4), kind)
    rows = [{"prompt": ROWS[i // 4][0]} for i in range(8)]
    theirs = trainer._generate_and_score_completions(rows)["advantages"]
    difference = (ours.flatten() - theirs).abs().max().item()
    print(f"\nadvantages, {scale}: differ by {difference:.1e}")
    assert difference < TOLERANCE
