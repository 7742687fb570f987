"""Prompts, completions and reward-model folders for the tests of rewards."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from amenable.data.schemas import Message, Prompt, Speaker

TEXTS = ["Yes.", "The river", "It is wet, very wet.", "No"]
EXAMPLES = Path(__file__).parents[4] / "examples"

FUNCTIONS = __file__
"""Names the functions below in a recipe: `{FUNCTIONS}:vowels`."""

QUESTIONS = ("Is it?", "Is it?", "What of the rain?", "Open the file.")


def prompt(text: str, **meta: Any) -> Prompt:
    return Prompt(messages=(Message(Speaker.USER, text),), id=text, group=text, meta=meta)


PROMPTS = [prompt(text, length=len(text)) for text in QUESTIONS]


def ends_of_letters(texts: Sequence[str]) -> list[list[int]]:
    """As if each token were a letter, with an end-of-sequence token behind."""
    return [[*range(1, len(text) + 1), len(text)] for text in texts]


def vowels(completions: list[str], **_: Any) -> list[int]:
    return [sum(text.count(vowel) for vowel in "aeiou") for text in completions]


def all_but_first(completions: list[str], **_: Any) -> list[float | None]:
    return [None, *[1.0] * (len(completions) - 1)]


def write_gpt2(out: Path, vocabulary: int = 300, **changes: Any) -> Path:
    """A random GPT-2 with one label, whose tokenizer has no chat template and no pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    from amenable.models.tiny import TEXT

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(
        out
    )
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, **changes}
    config = GPT2Config(vocab_size=vocabulary, num_labels=1, eos_token_id=0, **sizes)
    _save(GPT2ForSequenceClassification, config, out)
    return out


def write_bert(out: Path) -> Path:
    """The example's random BERT: one label, and a lower-casing WordPiece tokenizer."""
    runpy.run_path(str(EXAMPLES / "rewards" / "make_reward_model.py"))["main"](out)
    return out


def _save(cls: Any, config: Any, out: Path) -> None:
    """Weights ten times as large as usual, so that texts get scores that differ."""
    from amenable.models.quiet import without_bars

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    with without_bars():
        model.save_pretrained(out)
