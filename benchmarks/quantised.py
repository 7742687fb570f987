"""Quantised bases: bytes, time and error by scheme and library, and PPO updates on one.

    .venv/bin/python benchmarks/quantised.py schemes [--dtype fp32|bf16] [--torchao]
    .venv/bin/python benchmarks/quantised.py updates [--dtype fp32|bf16] [--updates 3]

`schemes`: SmolLM2-135M's 210 linear layers in each scheme, through the same LoRA layers: bytes,
processor seconds of writing all of them out, and of a gradient of 6 rows (of those of `passes.py`),
the weights' relative error, and by how much the log-probabilities of 12 passages of docstrings
differ from float32's (root mean square and mean, nats). Then how far bitsandbytes' own product in
training is from its own in evaluation. `--torchao` adds that library, where it is installed.

`updates`: the policy stage itself (PPO, four roles, 64 + 32 tokens, 8 prompts of 2 samples, two
passes) on the whole and on the quantised base, a process each: processor seconds of each update
(the first with loading) and peak resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amenable.artifacts import RunFolder, StageContext
from amenable.config.load import load_recipe
from amenable.config.model import LoraConfig
from amenable.data.collate import PromptGroup, collate
from amenable.models.adapters import add_adapter
from amenable.models.load import load_causal_lm, load_tokenizer
from amenable.models.packed_layers import shorten
from amenable.models.pull import resolve_base
from amenable.models.quantised import SCHEMES, QuantisedLinear, Stored, load_quantised
from amenable.models.roles import Role
from amenable.pipeline.process import keep_freed_memory
from amenable.progress import Deadline, Progress

sys.path += [str(Path(__file__).parent / part) for part in ("", "peers", "parity")]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("none", "int8", "nf4")


def blocks_of_64(weight: Tensor, dtype: torch.dtype) -> Stored:
    """Numbers of 8 bits in unequal steps, by bitsandbytes; a scale for 64 of them."""
    import bitsandbytes.functional as functional

    codes, state = functional.quantize_blockwise(weight.contiguous(), blocksize=64)
    state.dtype = dtype
    return Stored((codes, state.absmax), lambda: functional.dequantize_blockwise(codes, state))


def torchao_int8(weight: Tensor, dtype: torch.dtype) -> Stored:
    """A scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=dtype)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    kept: Any = layer.weight
    return Stored((kept.qdata, kept.scale), lambda: kept.dequantize().to(dtype))


def torchao_nf4(weight: Tensor, dtype: torch.dtype) -> Stored:
    """Blocks of 64, whose scales are kept in blocks as large as the layer's size allows."""
    from torchao.quantization import NF4Tensor

    blocks = weight.numel() // 64
    together = next(size for size in (256, 128, 64, 32) if blocks % size == 0)
    kept = NF4Tensor.from_tensor(weight.to(dtype), 64, together)
    parts = (kept.quantized_data, kept.quantized_scalers, kept.quantization_factor)
    return Stored(parts, kept.get_original_weight)


def make(source: str, kind: str, dtype: torch.dtype) -> Role:
    """A role as a stage makes it."""
    if kind == "none":
        base = load_causal_lm(source, dtype).requires_grad_(False)
    else:
        base = load_quantised(source, kind, dtype, torch.device("cpu"))
    shorten(base)
    return Role(add_adapter(base, "policy", LoraConfig(), seed=0), "policy", dtype=dtype)


def layers(role: Role) -> dict[str, Any]:
    """The trunk's linear layers under their adapters."""
    return {
        name: module.get_base_layer()
        for name, module in role.plain.named_modules()
        if hasattr(module, "get_base_layer")
    }


def stored_bytes(role: Role) -> int:
    """Of those layers' weights."""
    return sum(
        sum(t.nbytes for t in layer.stored.tensors)
        if isinstance(layer, QuantisedLinear)
        else layer.weight.nbytes
        for layer in layers(role).values()
    )


def passages(source: str) -> list[PromptGroup]:
    """Texts of docstrings; the last 32 tokens count."""
    from rollouts import prompts

    rows = [list(row[:160]) for row in prompts(source, 12)]
    return [PromptGroup(row[:-32], [row[-32:]]) for row in rows]


@torch.no_grad()
def logprobs(role: Role, groups: list[PromptGroup]) -> Tensor:
    """Of the tokens that count."""
    found = []
    for part in role.split(groups, 1024):
        batch = collate([groups[i] for i in part], 0)
        found.append(role.logprobs(batch).logprobs[batch.mask])
    return torch.cat(found)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, so that what else runs counts less; of the second time."""
    work()
    began = time.process_time()
    work()
    return time.process_time() - began


def schemes(dtype: torch.dtype, torchao: bool) -> None:
    """Prints a line of JSON for each."""
    from passes import groups, one_pass

    source, tokens = str(resolve_base("smollm2-135m")), 2048
    SCHEMES["8 bits in blocks of 64"] = blocks_of_64
    more = ["8 bits in blocks of 64"]
    if torchao:
        SCHEMES.update({"torchao int8": torchao_int8, "torchao nf4": torchao_nf4})
        more += ["torchao int8", "torchao nf4"]
    rows, texts = groups()[::3], passages(source)
    whole = make(source, "none", torch.float32)
    exact = {name: layer.weight for name, layer in layers(whole).items()}
    said = logprobs(whole, texts)
    for kind in (*KINDS, *more):
        role = make(source, kind, dtype)
        own = layers(role)
        off = sum(float((own[n].weight.float() - w).square().sum()) for n, w in exact.items())
        size = sum(float(w.square().sum()) for w in exact.values())
        gap = logprobs(role, texts) - said
        report = {
            "scheme": kind,
            "mb": round(stored_bytes(role) / 1e6, 1),
            "write_out_s": round(seconds(lambda own=own: [x.weight for x in own.values()]), 3),
            "gradient_s": round(seconds(lambda role=role: one_pass(role, rows, tokens)), 2),
            "weights_relative_error": round((off / size) ** 0.5, 5),
            "logprobs_rms": round(float(gap.square().mean().sqrt()), 4),
            "logprobs_mean": round(float(gap.mean()), 4),
        }
        print(json.dumps(report), flush=True)
    print(json.dumps({"own_products_differ": own_products(exact)}))


def own_products(weights: dict[str, Tensor]) -> float:
    """Largest difference of bitsandbytes' 4-bit layer between training and evaluation, relative."""
    import bitsandbytes

    weight = next(iter(weights.values()))
    layer = bitsandbytes.nn.Linear4bit(
        *weight.shape[::-1], bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.detach().clone(), requires_grad=False, quant_type="nf4"
    )
    layer = layer.to("cpu")
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0))
    trained = layer.train()(x.requires_grad_()).detach()
    with torch.no_grad():
        evaluated = layer.eval()(x.detach())
    return float((trained - evaluated).abs().max() / trained.abs().max())


def updates(kind: str, dtype: str, count: int) -> None:
    """The policy stage, left after its last update."""
    from large_shape import Clock, Enough, write_prompts, write_reward

    from amenable.train.registry import run_policy

    class Ticks(Clock):
        """Processor time, so that what else runs counts less."""

        def write(self, step: int, **figures: float) -> None:
            ticks.append(time.process_time())
            super().write(step, **figures)

    ticks: list[float] = []
    source = str(resolve_base("smollm2-135m"))
    with tempfile.TemporaryDirectory() as temporary:
        run = RunFolder(Path(temporary) / "run")
        path = run.data / "prompts.train.jsonl"
        settings = {
            "model.dtype": dtype,
            "model.quantise": kind,
            "data.preferences": str(path),
            "data.prompts": str(path),
            "data.max_prompt_tokens": 64,
            "data.max_completion_tokens": 32,
            "policy.prompts_per_update": 8,
            "policy.samples_per_prompt": 2,
            "sft.enabled": False,
            "policy.updates": count + 1,
            "policy.gate": False,
            "policy.checkpoint_every": 1000,
            "evaluate.best_of": 0,
        }
        texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        recipe = load_recipe(None, texts)
        write_prompts(path, load_tokenizer(source), 8 * count)
        write_reward(run.models / "reward", load_causal_lm(source, None).config, recipe)
        clock = Ticks(run.stage("policy"), count)
        ctx = StageContext(
            recipe=recipe,
            folder=run,
            stage="policy",
            log=clock,
            progress=Progress(quiet=True),
            deadline=Deadline(None),
        )
        ticks.append(time.process_time())
        with contextlib.suppress(Enough):
            run_policy(ctx)
    report = {
        "quantise": kind,
        "seconds": [round(b - a, 1) for a, b in itertools.pairwise(ticks)],
        "completion_tokens": [round(f["completion_tokens"], 1) for f in clock.figures],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    print(json.dumps(report), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("schemes", "updates"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--torchao", action="store_true")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help="of `updates`: this one, in this process")
    options = parser.parse_args()
    if options.what == "schemes":
        schemes(DTYPES[options.dtype], options.torchao)
    elif options.kind:
        updates(options.kind, options.dtype, options.updates)
    else:
        for kind in KINDS:
            subprocess.run([sys.executable, *sys.argv, "--kind", kind], check=True)


if __name__ == "__main__":
    keep_freed_memory()  # as `amenable run` does
    main()
