"""Forward and backward passes beside the rate of a matrix product, on real tokens alone.

    .venv/bin/python benchmarks/passes.py [--dtype bf16|fp32] [--modes full lora] [--tokens N ...]

The 16 prompts of the benchmark of peers (44 to 380 tokens, 140 in the mean) with completions of 48
tokens on SmolLM2-135M: a gradient of the mean log-probability, in micro-batches of so many tokens.
FLOPs are those of `peers/floor.py` (a backward pass costs two forward passes, of frozen weights
one); the rate of a product is measured before and after, and the better one counts. Medians of the
repeats after a first. `--profile` prints what a pass spends its time on instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from amenable.config.model import LoraConfig
from amenable.data.collate import PromptGroup, collate
from amenable.models.adapters import add_adapter
from amenable.models.load import load_causal_lm
from amenable.models.packed_layers import shorten
from amenable.models.pull import resolve_base
from amenable.models.roles import Role
from amenable.pipeline.process import keep_freed_memory

sys.path += [str(Path(__file__).parent / part) for part in ("peers", "parity")]
NEW_TOKENS = 48


def make(source: str, mode: str, dtype: torch.dtype) -> Role:
    """A role as a stage makes it."""
    if mode == "full":
        model = load_causal_lm(source, torch.float32)
        shorten(model)
        return Role(model, dtype=dtype)
    base = load_causal_lm(source, dtype)
    base.requires_grad_(False)
    shorten(base)
    return Role(add_adapter(base, "policy", LoraConfig(), seed=0), "policy", dtype=dtype)


def groups() -> list[PromptGroup]:
    """Rows of random tokens, of the lengths of the benchmark of peers."""
    import work

    draw = torch.Generator().manual_seed(0)
    return [
        PromptGroup(ids[:length], [ids[length:]])
        for length in work.LENGTHS
        for ids in [torch.randint(5, 49000, (length + NEW_TOKENS,), generator=draw).tolist()]
    ]


def one_pass(role: Role, rows: list[PromptGroup], tokens: int) -> None:
    """The gradient of all rows."""
    for parameter in role.trainable_parameters():
        parameter.grad = None
    for part in role.split(rows, tokens):
        batch = collate([rows[i] for i in part], 0)
        role.logprobs(batch).logprobs.sum().backward()


def main() -> None:
    import floor

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    source = str(resolve_base("smollm2-135m"))
    shape, rows = floor.Shape.read(Path(source)), groups()
    forward = shape.forward([(len(row.prompt_ids), 1) for row in rows], vocabulary=True)
    for mode in options.modes:
        role = make(source, mode, dtype)
        flops = forward * {"full": 3, "lora": 2}[mode]
        for tokens in options.tokens:
            before, found = floor.measure(options.dtype).flops_s, []
            one_pass(role, rows, tokens)
            if options.profile:
                with torch.profiler.profile() as profile:
                    one_pass(role, rows, tokens)
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
                continue
            for _ in range(options.repeats):
                began = time.perf_counter()
                one_pass(role, rows, tokens)
                found.append(time.perf_counter() - began)
            rate = max(before, floor.measure(options.dtype).flops_s)
            seconds = statistics.median(found)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            report = {
                "mode": mode,
                "micro_batch_tokens": tokens,
                "tokens": sum(row.tokens for row in rows),
                "seconds": round(seconds, 2),
                "gflop_s": round(flops / seconds / 1e9),
                "rate_gflop_s": round(rate / 1e9),
                "share": round(flops / seconds / rate, 3),
                "peak_gb_so_far": round(peak, 2),
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    keep_freed_memory()  # as `amenable run` does
    main()
