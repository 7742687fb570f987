"""The task that both sides of the parity learn: one-line summaries by a model of 0.15 M parameters.

    .venv/bin/python benchmarks/parity/task.py FOLDER

writes into FOLDER what every run of either side reads: the start model `start/` (a small Llama with
a tokenizer of its own, fine-tuned on real docstring summaries), the prompts, and preference pairs
sampled from the start model. Settings and reward stand here once. No torch at import: the peers'
environments read this file too.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# The model and its data ---------------------------------------------------------------------------

VOCAB_SIZE = 1024
HIDDEN, LAYERS, HEADS = 64, 2, 4
PROMPT_TOKENS, COMPLETION_TOKENS = 64, 20
TRAIN_PROMPTS, EVAL_PROMPTS = 512, 256
SFT_EPOCHS, SFT_BATCH, SFT_RATE = 5, 32, 5e-3
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What both sides are told -------------------------------------------------------------------------

ADAM_EPS, DPO_ADAM_EPS = 1e-5, 1e-8
POINTS = 4
"""How often a run saves its policy."""

PPO: Row = {
    "updates": 20,
    "prompts": 64,
    "samples": 1,
    "epochs": 2,
    "rate": 1e-3,
    "kl_coef": 0.02,
    "clip": 0.2,
    "gae_lambda": 0.95,
    "grad_norm": 1e9,
}
GRPO: Row = {
    "updates": 20,
    "prompts": 16,
    "samples": 4,
    "epochs": 2,
    "rate": 5e-4,
    "kl_coef": 0.02,
    "clip": 0.2,
    "grad_norm": 1.0,
}
RLOO: Row = {**GRPO, "epochs": 1, "rate": 1e-3}
DPO: Row = {
    "pairs": 1280,
    "batch": 32,
    "epochs": 1,
    "rate": 1e-3,
    "beta": 0.1,
    "grad_norm": 1.0,
    "strength": 20.0,
}
SETTINGS = {"ppo": PPO, "grpo": GRPO, "rloo": RLOO, "dpo": DPO}


def linear_decay(done: int, total: int) -> float:
    """Share of the learning rate in update `done` (from 0) of `total`."""
    return 1.0 - done / total


def save_points(total: int) -> list[int]:
    """Updates after which a run saves its policy."""
    return [round(total * (i + 1) / POINTS) for i in range(POINTS)]


# Reward -------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"[a-z]+", text.lower())


def overlap(completion: str, summary: str) -> float:
    """F1 of the distinct words of two lines, in [0, 1]; 0 without words."""
    ours, theirs = set(words(completion)), set(words(summary))
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0


def score(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row] = (), **_: Any
) -> list[float]:
    """Word F1 of each completion with the line that the docstring's author wrote."""
    return [overlap(text, row["output_text"]) for text, row in zip(completions, rows, strict=True)]


def read_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def render(text: str) -> str:
    """A prompt as the model reads it."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# Making it ----------------------------------------------------------------------------------------


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE of the task's own text; ids 0, 1, 2 are pad, start and end of turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any) -> Any:
    """Random weights."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def fine_tune(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Supervised fine-tuning on completions alone; returns the loss of each epoch."""
    import torch

    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_RATE, weight_decay=0.1)
    total, done, losses = SFT_EPOCHS * math.ceil(len(rows) / SFT_BATCH), 0, []
    for _ in range(SFT_EPOCHS):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + draw.random())
        batches = [order[i : i + SFT_BATCH] for i in range(0, len(order), SFT_BATCH)]
        draw.shuffle(batches)
        sums, count = 0.0, 0
        for batch in batches:
            ids, labels = padded([rows[i] for i in batch])
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = SFT_RATE * min(1.0, (done + 1) / 50) * linear_decay(done, total)
            optimizer.step()
            optimizer.zero_grad()
            sums, count, done = sums + loss.item(), count + 1, done + 1
        losses.append(sums / count)
    return losses


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
    """Ids and labels, padded on the right (causal attention needs no mask there)."""
    import torch

    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def sampled_pairs(
    model: Any, tokenizer: Any, rows: Sequence[Row], count: int, strength: float
) -> Iterator[Row]:
    """Pairs of ended samples; P(choice = a) = sigmoid(strength (score(a) - score(b)))."""
    from measure import sample

    draw = random.Random(7)
    prompts = [tokenizer(render(row["input_text"]))["input_ids"] for row in rows]
    found = 0
    for wave in range(100):
        texts: list[list[str]] = [[] for _ in rows]
        samples = sample(model, prompts, copies=2, seed=100 + wave, new_tokens=COMPLETION_TOKENS)
        for index, ids in samples:
            if ids[-1] == tokenizer.eos_token_id:
                texts[index].append(tokenizer.decode(ids, skip_special_tokens=True).strip())
        for row, own in zip(rows, texts, strict=True):
            if len(own) < 2 or own[0] == own[1] or not all(own):
                continue
            a, b = score([], own, [row, row])
            chosen = draw.random() < 1 / (1 + math.exp(-strength * (a - b)))
            yield {
                "id": f"{row['id']}#{wave}",
                "group": row["group"],
                "input_text": row["input_text"],
                "candidate_0": own[0],
                "candidate_1": own[1],
                "choice": 0 if chosen else 1,
            }
            found += 1
            if found == count:
                return


def make(folder: Path) -> Row:
    """Write the whole task; returns figures of it."""
    from amenable.data.docstrings import harvest

    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    pairs = harvest(max_words=40)
    random.Random(0).shuffle(pairs)
    texts = [text for p in pairs for text in (p.prompt.text, p.output_text)]
    tokenizer = make_tokenizer(texts)
    demonstrations: list[tuple[list[int], list[int]]] = []
    rows: list[Row] = []
    for number, pair in enumerate(pairs):
        prompt = tokenizer(render(pair.prompt.text))["input_ids"]
        completion = [*tokenizer(pair.output_text)["input_ids"], tokenizer.eos_token_id]
        short = len(prompt) <= PROMPT_TOKENS and len(completion) <= COMPLETION_TOKENS
        if short and len(rows) < EVAL_PROMPTS + TRAIN_PROMPTS:
            own = {"id": f"d{number}", "group": f"d{number}"}
            rows.append({**own, "input_text": pair.prompt.text, "output_text": pair.output_text})
        if not short or len(rows) > EVAL_PROMPTS:
            demonstrations.append((prompt, completion))
    model = make_model(tokenizer)
    losses = fine_tune(model, demonstrations)
    model.eval()
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    held_out, train = rows[:EVAL_PROMPTS], rows[EVAL_PROMPTS:]
    write_rows(folder / "prompts.eval.jsonl", held_out)
    write_rows(folder / "prompts.train.jsonl", train)
    chosen = list(sampled_pairs(model, tokenizer, train, DPO["pairs"], DPO["strength"]))
    write_rows(folder / "preferences.jsonl", chosen)
    figures = {
        "demonstrations": len(demonstrations),
        "prompts": len(train),
        "held_out_prompts": len(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sft_losses": [round(x, 3) for x in losses],
        "pairs": len(chosen),
        "settings": SETTINGS,
        "seconds": round(time.monotonic() - began, 1),
    }
    (folder / "task.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(json.dumps(make(parser.parse_args().folder)))
