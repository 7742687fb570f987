"""Our bfloat16 against plain transformers' bfloat16: which is nearer to plain float32?

    .venv/bin/python benchmarks/same_numbers.py [--base smollm2-135m]

Rows of docstrings with their authors' lines, several completions a prompt. `exact` is plain
transformers in float32, one row a completion, whole logits. Errors are the root mean square of the
completions' log-probabilities, and the norm of the whole gradient's difference over that of the
exact gradient, of the mean log-probability. `fast` is the path that every stage takes: prompts
encoded once, projection in pieces, fused adapters. With adapters the frozen base is bfloat16 on
both sides, and `exact` is float32 on those rounded weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amenable.config.model import LoraConfig
from amenable.data.collate import PromptGroup, collate
from amenable.data.docstrings import harvest
from amenable.losses.likelihood import token_logprobs
from amenable.models.adapters import adapter_parameters, add_adapter
from amenable.models.load import load_causal_lm, load_tokenizer
from amenable.models.packed_layers import shorten
from amenable.models.pull import resolve_base
from amenable.models.roles import Role

PROMPTS, SAMPLES, TOKENS = 48, 3, 1024
Measured = tuple[Tensor, Tensor]
"""Log-probabilities of all completion tokens, and the gradient of their mean."""


def rows(base: str) -> list[PromptGroup]:
    """Prompts with authors' lines of their own and of others."""
    tokenizer = load_tokenizer(base)
    pairs = harvest(max_words=60)[: PROMPTS * SAMPLES]
    lines = [tokenizer(pair.output_text)["input_ids"][:48] for pair in pairs]
    return [
        PromptGroup(tokenizer(pair.prompt.text)["input_ids"], lines[n::PROMPTS])
        for n, pair in enumerate(pairs[:PROMPTS])
    ]


def plain(groups: list[PromptGroup]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Ids [1, T], targets [1, C] and where the completion begins, of every completion."""
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt_ids, *completion]])
            yield ids, torch.tensor([list(completion)]), len(group.prompt_ids)


def of_plain(role: Role, groups: list[PromptGroup], total: int) -> Measured:
    """Plain transformers: no code of ours but the choice of positions."""
    found = []
    for ids, targets, start in plain(groups):
        with role.active() as model:
            logits = model(input_ids=ids, use_cache=False).logits[:, start - 1 : -1]
            logprobs = token_logprobs(logits, targets)[0]
        (logprobs.sum() / total).backward()
        found.append(logprobs.detach())
    return torch.cat(found), gradient(role)


def of_stages(role: Role, groups: list[PromptGroup], total: int) -> Measured:
    """The path that the stages take."""
    found: dict[int, list[Tensor]] = {}
    for part in role.split(groups, TOKENS):
        batch = collate([groups[i] for i in part], 0)
        logprobs = role.logprobs(batch).logprobs
        (logprobs.sum() / total).backward()
        values = iter([row[mask] for row, mask in zip(logprobs.detach(), batch.mask, strict=True)])
        for i in part:
            found[i] = [next(values) for _ in groups[i].completions]
    return torch.cat([row for i in sorted(found) for row in found[i]]), gradient(role)


def gradient(role: Role) -> Tensor:
    """[D] of all that is trained; leaves none behind."""
    parts = [p.grad for p in role.trainable_parameters()]
    for parameter in role.trainable_parameters():
        parameter.grad = None
    return torch.cat([part.flatten() for part in parts if part is not None])


def make(base: str, mode: str, way: str) -> Role:
    """A role in float32 or bfloat16, fused or plain."""
    exact = way in ("exact", "fast32")
    dtype = torch.float32 if exact else torch.bfloat16
    fast = way.startswith("fast")
    if mode == "full":
        whole = load_causal_lm(base, torch.float32)
        if fast:
            shorten(whole)
        return Role(whole, dtype=dtype)
    model = load_causal_lm(base, torch.bfloat16)
    if fast:
        shorten(model)
    if exact:
        nn.Module.float(model)
    model.requires_grad_(False)
    adapted = add_adapter(model, "policy", LoraConfig(), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted, "policy"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    if not fast:
        unfuse(adapted)
    return Role(adapted, "policy", dtype=dtype)


def unfuse(model: nn.Module) -> None:
    """Peft's own layers again."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    from amenable.models.lora_linear import LoraLinear

    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = PeftLinear


def compare(base: str, mode: str) -> dict[str, Any]:
    """Errors against the exact numbers, and their ratios."""
    groups = rows(base)
    total = sum(len(ids) for group in groups for ids in group.completions)
    ways: dict[str, Callable[[Role, list[PromptGroup], int], Measured]] = {
        "exact": of_plain,
        "plain": of_plain,
        "fast": of_stages,
        "fast32": of_stages,
    }
    found = {way: measure(make(base, mode, way), groups, total) for way, measure in ways.items()}
    exact = found["exact"]
    errors = {
        way: {
            "logprobs_rms": float((values - exact[0]).square().mean().sqrt()),
            "gradient": float((grad - exact[1]).norm() / exact[1].norm()),
        }
        for way, (values, grad) in found.items()
        if way != "exact"
    }
    ratios = {key: errors["fast"][key] / errors["plain"][key] for key in errors["plain"]}
    worst = float((found["fast32"][0] - exact[0]).abs().max())
    return {"mode": mode, "tokens": total, **errors, "fast32_worst": worst, "ratio": ratios}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    source = str(resolve_base(parser.parse_args().base))
    for mode in ("full", "lora"):
        print(json.dumps(compare(source, mode)), flush=True)
