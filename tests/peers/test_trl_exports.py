"""Files that we export, loaded by `datasets` and trained on by TRL's trainers, one step each.

The rows that a trainer holds after its own preparation, decoded, must be ours: prompt, chosen and
rejected texts, margins and labels. The model is tiny and random; its loss must be finite.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="in an environment of its own: make test-peers")

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from amenable.data.reading.convert import convert
from amenable.data.reading.readers import read_preferences
from amenable.data.schemas import Choice, Preference

pytestmark = pytest.mark.peers

PLAIN = [
    {"input_text": "the cat sat on", "candidate_0": " the mat", "candidate_1": " it", "choice": 0},
    {"input_text": "a dog", "candidate_0": " sat", "candidate_1": " ran on", "choice": 1},
    {"input_text": "the mat", "candidate_0": " sat", "candidate_1": " ran", "choice": "tie"},
    {"input_text": "it", "candidate_0": " ran", "candidate_1": " sat", "choice": 0, "margin": 1.5},
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "ran the dog"},
            {"role": "user", "content": "it sat"},
            {"role": "assistant", "content": "on the mat"},
            {"role": "user", "content": "the cat"},
        ],
        "candidate_0": "sat",
        "candidate_1": "ran on a mat",
        "choice": 1,
        "margin": 0.5,
    },
    *PLAIN,
]
WORDS = ["the", "cat", "sat", "on", "mat", "it", "a", "dog", "ran"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "system:", "user:", "assistant:"]
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }} "
    "{% if turn.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def tiny(kind: type) -> Any:
    torch.manual_seed(0)
    return kind(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            num_labels=1,
        )
    )


def settings(folder: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": rows,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def export(
    folder: Path, records: list[dict[str, Any]], to: str
) -> tuple[Dataset, list[Preference]]:
    """What `datasets` makes of our file, and the rows that should be in it."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = convert([source], to, folder / f"{to}.jsonl")
    ours = [row for row in read_preferences([source]) if row.choice is not Choice.TIE]
    assert report["written"] == len(ours) == len(records) - 1
    assert report["not_written"] == {"a tie, which the format cannot say": 1}
    loaded = load_dataset(
        "json",
        data_files=str(folder / f"{to}.jsonl"),
        split="train",
        cache_dir=str(folder / "cache"),
    )
    return loaded, ours


def asked(row: Preference, *, chat: bool) -> str:
    """The prompt in the words of the tokenizer."""
    if not chat:
        return row.prompt.text
    turns = [
        f"{turn.speaker.value}: {turn.content}" + (" <eos>" * (turn.speaker == "assistant"))
        for turn in row.prompt.messages
    ]
    return " ".join([*turns, "assistant:"])


def words(*parts: str) -> list[str]:
    return " ".join(parts).split()


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def one_step(trainer: Any, rows: int) -> None:
    assert len(trainer.train_dataset) == rows
    result = trainer.train()
    assert trainer.state.global_step == 1
    print(f"\n{type(trainer).__name__}: {rows} rows, loss {result.training_loss:.4f}")
    assert math.isfinite(result.training_loss)
    assert result.training_loss > 0


@pytest.mark.parametrize(("to", "records"), [("trl", PLAIN), ("trl-chat", CHATS)])
def test_dpo(
    to: str, records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    loaded, ours = export(tmp_path, records, to)
    trainer = DPOTrainer(
        tiny(LlamaForCausalLM),
        tiny(LlamaForCausalLM),  # the reference
        args=DPOConfig(**settings(tmp_path, len(ours))),
        train_dataset=loaded,
        processing_class=tokenizer,
    )
    for seen, row in zip(trainer.train_dataset, ours, strict=True):
        assert decoded(tokenizer, seen["prompt_ids"]) == words(asked(row, chat=to == "trl-chat"))
        assert decoded(tokenizer, seen["chosen_ids"]) == words(row.chosen, "<eos>")
        assert decoded(tokenizer, seen["rejected_ids"]) == words(row.rejected, "<eos>")
    one_step(trainer, len(ours))


@pytest.mark.parametrize(("to", "records"), [("trl", PLAIN), ("trl-chat", CHATS)])
def test_reward(
    to: str, records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    loaded, ours = export(tmp_path, records, to)
    trainer = RewardTrainer(
        tiny(LlamaForSequenceClassification),
        args=RewardConfig(**settings(tmp_path, len(ours))),
        train_dataset=loaded,
        processing_class=tokenizer,
    )
    for seen, row in zip(trainer.train_dataset, ours, strict=True):
        prompt = asked(row, chat=to == "trl-chat")
        assert decoded(tokenizer, seen["chosen_ids"]) == words(prompt, row.chosen, "<eos>")
        assert decoded(tokenizer, seen["rejected_ids"]) == words(prompt, row.rejected, "<eos>")
        assert seen["margin"] == (row.margin or 0.0)  # in all rows: the trainer needs it so
    one_step(trainer, len(ours))


def test_kto(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loaded, ours = export(tmp_path, CHATS, "kto")
    trainer = KTOTrainer(
        tiny(LlamaForCausalLM),
        tiny(LlamaForCausalLM),  # the reference
        args=KTOConfig(**settings(tmp_path, 2 * len(ours))),
        train_dataset=loaded,
        processing_class=tokenizer,
    )
    expected = [
        (asked(row, chat=True), text, label)
        for row in ours
        for text, label in ((row.chosen, True), (row.rejected, False))
    ]
    for seen, (prompt, text, label) in zip(trainer.train_dataset, expected, strict=True):
        assert decoded(tokenizer, seen["prompt_ids"]) == words(prompt)
        assert decoded(tokenizer, seen["completion_ids"]) == words(text, "<eos>")
        assert seen["label"] is label
    one_step(trainer, 2 * len(ours))
