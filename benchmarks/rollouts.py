"""Roll-outs beside `transformers.generate`, and a decoding step beside its floor.

    .venv/bin/python benchmarks/rollouts.py [--dtype fp32|bf16] [--repeats 3] [--prompts 64]

64 different docstring prompts of very unequal lengths, 48 new tokens each, pure samples, on
SmolLM2-135M; both sides in turn, medians. `generate` has them in one batch padded on the left. No
sequence may end early on either side. Prefill and decoding are timed apart. The floor of a step is
the larger of its bytes (weights and cache) over the rate at which memory is read and its FLOPs over
the rate of a matrix product, at rates measured in the same run (`peers/floor.py`).

`--vllm` has vLLM (`rollout/vllm_engine.py`) in the place of `generate`, with an empty prefix cache;
it needs the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amenable.data.docstrings import harvest
from amenable.models.load import load_causal_lm, load_tokenizer
from amenable.models.pull import resolve_base
from amenable.pipeline.process import keep_freed_memory
from amenable.rollout.transformers_engine import TransformersEngine
from amenable.rollout.types import Request, Sampling

NEW_TOKENS = 48
sys.path += [str(Path(__file__).parent / part) for part in ("peers", "parity")]


def prompts(source: str, count: int) -> list[tuple[int, ...]]:
    """Token ids of passages of 44 to 380 tokens, lengths as in the benchmark of peers."""
    import work

    tokenizer = load_tokenizer(source)
    words = " ".join(pair.prompt.text for pair in harvest(max_words=60)[:2000])
    ids, found, start = tokenizer(words)["input_ids"], [], 0
    for n in range(count):
        length = work.LENGTHS[n % len(work.LENGTHS)]
        found.append(tuple(ids[start : start + length]))
        start += length
    return found


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def generate(model: Any, rows: list[tuple[int, ...]], tokens: int, dtype: torch.dtype) -> None:
    """Transformers' own sampling of exactly so many tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
    assert out.shape[1] == width + tokens


def vllm(
    rows: list[tuple[int, ...]], dtype: str
) -> tuple[Callable[[int], None], Callable[[], object]]:
    """Samples of exactly so many tokens, and what empties the prefix cache."""
    from amenable.config.load import load_recipe
    from amenable.models.build import Foundation
    from amenable.rollout.copies import open_copy

    settings = ["model.base=smollm2-135m", f"model.dtype={dtype}", "policy.engine=vllm"]
    settings += [f"data.max_prompt_tokens={max(map(len, rows))}", "policy.reward=task:score"]
    settings += [f"data.max_completion_tokens={NEW_TOKENS}", "data.prompts=none.jsonl"]
    foundation = Foundation.open(load_recipe(None, settings))
    copy = open_copy(foundation, foundation.role("policy", train=False))
    copy.sync()
    engine: Any = copy.engine(foundation.renderer)
    engine._eos_ids = frozenset()

    def sample(tokens: int) -> None:
        requests = [Request(row, (n,)) for n, row in enumerate(rows)]
        found = engine.generate(requests, Sampling(max_new_tokens=tokens, temperature=1.0))
        assert {len(rollout.completion_ids) for rollout in found} == {tokens}

    return sample, copy.sync


def floor_of_step(shape: Any, rates: Any, rows: list[tuple[int, ...]], width_bytes: int) -> float:
    """Seconds of a step in the middle of the completion, each row with a prompt of its own."""
    context = sum(len(row) + NEW_TOKENS // 2 for row in rows)
    flops = 2 * (shape.trunk + shape.head) * len(rows) + 4 * shape.layers * shape.width * context
    numbers = shape.trunk + shape.head + 2 * shape.layers * shape.keys * context
    return max(flops / rates.flops_s, numbers * width_bytes / rates.bytes_s)


def main() -> None:
    import floor

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--vllm", action="store_true")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    source = str(resolve_base("smollm2-135m"))
    model = load_causal_lm(source, dtype)
    engine = TransformersEngine(model, eos_ids=frozenset(), pad_id=0, dtype=dtype)
    rates = floor.measure(options.dtype)
    shape = floor.Shape.read(Path(source))
    for count in options.prompts:
        rows = prompts(source, count)
        requests = [Request(row, (n,)) for n, row in enumerate(rows)]
        found: dict[str, list[float]] = {}
        other, fresh = partial(generate, model, rows, dtype=dtype), lambda: None
        if options.vllm:
            other, fresh = vllm(rows, options.dtype)
        for repeat in range(options.repeats + 1):
            for tokens in (1, NEW_TOKENS):
                sampling = Sampling(max_new_tokens=tokens, temperature=1.0)
                own = seconds(partial(engine.generate, requests, sampling))
                fresh()
                theirs = seconds(partial(other, tokens))
                if repeat:  # the first warms up
                    found.setdefault(f"ours_{tokens}", []).append(own)
                    found.setdefault(f"theirs_{tokens}", []).append(theirs)
        middle = {key: statistics.median(values) for key, values in found.items()}
        step = (middle[f"ours_{NEW_TOKENS}"] - middle["ours_1"]) / (NEW_TOKENS - 1)
        least = floor_of_step(shape, rates, rows, dtype.itemsize)
        report = {
            "prompts": count,
            "ours_s": middle[f"ours_{NEW_TOKENS}"],
            "other_s": middle[f"theirs_{NEW_TOKENS}"],
            "ratio": middle[f"theirs_{NEW_TOKENS}"] / middle[f"ours_{NEW_TOKENS}"],
            "prefill_s": middle["ours_1"],
            "other_prefill_s": middle["theirs_1"],
            "step_ms": 1e3 * step,
            "floor_ms": 1e3 * least,
            "share_of_floor": least / step,
            "gflop_s": rates.flops_s / 1e9,
            "gb_s": rates.bytes_s / 1e9,
        }
        print(json.dumps({k: round(v, 3) for k, v in report.items()}), flush=True)


if __name__ == "__main__":
    keep_freed_memory()  # as `amenable run` does
    main()
