"""Reward and sequence KL of saved policies, by one code for both sides.

    .venv/bin/python benchmarks/parity/measure.py TASK OUT

Of every policy that a run in OUT saved: samples of the held-out prompts at temperature 1, the mean
reward of their texts, and the mean sequence KL to the start model in nats. The KL of a sequence is
the sum over its tokens of the exact KL between the two next-token distributions: the same
expectation as the k1 sum log p(y) - log p_ref(y), which is written beside it, and less noise.
Writes RUN/points.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import task
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

COPIES, SEED, BATCH = 2, 4242, 128


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[list[int]], *, copies: int, seed: int, new_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Index of the prompt and sampled ids, end included; prompts of like length together."""
    generator = torch.Generator().manual_seed(seed)
    eos = model.config.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    rows = [i for i in order for _ in range(copies)]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        width = max(len(prompts[i]) for i in part)
        ids = torch.zeros((len(part), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        noise = torch.rand((len(part), new_tokens), generator=generator, dtype=torch.float64)
        tokens = _decode(model, ids, mask, noise, eos)
        for row, i in enumerate(part):
            own = tokens[row].tolist()
            yield i, own[: own.index(eos) + 1] if eos in own else own


def _decode(model: Any, ids: Tensor, mask: Tensor, noise: Tensor, eos: int) -> Tensor:
    cache, drawn = DynamicCache(config=model.config), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for step in range(noise.shape[1]):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        cumulative = logits.double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(cumulative, noise[:, [step]], right=True)
        token = token.clamp(max=logits.shape[-1] - 1)
        drawn.append(token)
        ended |= token[:, 0] == eos
        if bool(ended.all()):
            break
        ids, positions = token, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(token)], 1)
    return torch.cat(drawn, 1)


@torch.no_grad()
def point(model: Any, reference: Any, tokenizer: Any, rows: Sequence[task.Row]) -> task.Row:
    """Reward, KL and how samples end, of one policy."""
    prompts = [tokenizer(task.render(row["input_text"]))["input_ids"] for row in rows]
    found = list(
        sample(model, prompts, copies=COPIES, seed=SEED, new_tokens=task.COMPLETION_TOKENS)
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for _, ids in found]
    rewards = torch.tensor(task.score([], texts, [rows[i] for i, _ in found]))
    exact = k1 = 0.0
    for start in range(0, len(found), BATCH):
        part = found[start : start + BATCH]
        ids, labels = task.padded([(prompts[i], own) for i, own in part])
        mask = labels[:, 1:] >= 0
        targets = labels[:, 1:][mask][:, None]
        logp, ref = (_token_logprobs(one, ids, mask) for one in (model, reference))
        exact += float((logp.exp() * (logp - ref)).sum())
        k1 += float((logp.gather(1, targets) - ref.gather(1, targets)).sum())
    return {
        "reward": float(rewards.mean()),
        "kl": exact / len(found),
        "kl_k1": k1 / len(found),
        "tokens": sum(len(ids) for _, ids in found) / len(found),
        "eos_rate": sum(ids[-1] == tokenizer.eos_token_id for _, ids in found) / len(found),
        "example": texts[0],
    }


def _token_logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[tokens, V] of the next token, where `mask` [N, T - 1] is True."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits: Tensor = model.lm_head(states[mask])
    return logits.log_softmax(-1)


def measure(folder: Path, run: Path, start: tuple[Any, Any, task.Row]) -> None:
    """Points of every `step-N` folder of a run, the start model first."""
    reference, tokenizer, first = start
    rows = task.read_rows(folder / "prompts.eval.jsonl")
    points = [{"step": 0, **first}]
    for path in sorted(run.glob("step-*"), key=lambda p: int(p.name.split("-")[1])):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        step = int(path.name.split("-")[1])
        points.append({"step": step, **point(model, reference, tokenizer, rows)})
    (run / "points.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")


def open_start(folder: Path) -> tuple[Any, Any, task.Row]:
    """The start model, its tokenizer and its own point."""
    reference = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    rows = task.read_rows(folder / "prompts.eval.jsonl")
    return reference, tokenizer, point(reference, reference, tokenizer, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    waiting = [
        path.parent
        for path in sorted(arguments.out.glob("*/run.json"))
        if not (path.parent / "points.json").exists()
    ]
    if not waiting:
        raise SystemExit
    opened = open_start(arguments.task)
    for one in waiting:
        began = time.monotonic()
        measure(arguments.task, one, opened)
        print(f"{one.name}: measured in {time.monotonic() - began:.1f} s", flush=True)
