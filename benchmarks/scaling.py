"""Seconds and peak memory of a step of ours against batch, prompt length, samples and model size.

    .venv/bin/python benchmarks/scaling.py [--axes batch prompt samples model] [--mode full|lora]

Writes OUT/scaling.json and OUT/scaling.svg. One thing varies at a time; every point is a process of
its own, timed like a run of `peers/peers.py` (its docstring says what counts), with completions of
48 tokens. The model is SmolLM2-135M, or a Llama of random weights with its vocabulary.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROMPT = 140
ROWS = 8

LLAMAS = {
    "192x6": (192, 6, 512),
    "384x12": (384, 12, 1024),
    "576x30": (576, 30, 1536),
    "768x32": (768, 32, 2048),
    "960x32": (960, 32, 2560),
}
"""Hidden size, layers and width of the feed-forward layer; heads of 64, one key head for three."""


@dataclass(frozen=True)
class Point:
    """One process."""

    value: int
    """On the axis."""

    algorithm: str = "sft"
    lengths: tuple[int, ...] = (PROMPT,) * ROWS
    samples: int = 1
    llama: str = ""
    """A row of `LLAMAS`; empty: SmolLM2-135M."""


@dataclass(frozen=True)
class Axis:
    """What varies."""

    label: str
    points: tuple[Point, ...]


AXES = {
    "batch": Axis(
        f"rows of an SFT step, prompts of {PROMPT} tokens",
        tuple(Point(rows, lengths=(PROMPT,) * rows) for rows in (2, 4, 8, 16, 32)),
    ),
    "prompt": Axis(
        f"tokens of a prompt, SFT of {ROWS} rows",
        tuple(Point(tokens, lengths=(tokens,) * ROWS) for tokens in (64, 128, 256, 512, 1024)),
    ),
    "samples": Axis(
        f"samples a prompt, GRPO with 2 prompts of {PROMPT} tokens",
        tuple(Point(k, "grpo", (PROMPT, PROMPT), k) for k in (2, 4, 8, 16, 32)),
    ),
    "model": Axis(
        f"million weights, SFT of {ROWS} rows of {PROMPT} tokens",
        tuple(Point(0, llama=name) for name in LLAMAS),
    ),
}


def make(folder: Path, point: Point) -> None:
    """Write the work folder of a point."""
    import work

    base = work.BASE
    if point.llama:
        base = str(folder / "base")
        make_llama(folder / "base", point.llama)
    work.make(folder, base, point.lengths, (0, 1), point.samples)


def make_llama(folder: Path, name: str) -> None:
    """Write a model of random weights with the tokenizer of SmolLM2."""
    import torch
    import work
    from transformers import LlamaConfig, LlamaForCausalLM

    from amenable.models.load import load_tokenizer
    from amenable.models.pull import resolve_base

    tokenizer = load_tokenizer(resolve_base(work.BASE))
    hidden, layers, feed_forward = LLAMAS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=feed_forward,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(point: Point, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and GB of a point."""
    from peers import Run, call

    # In a process of its own: a parent's memory counts as its children's at their start.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, point))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"{folder} could not be made")
    run = Run("ours", point.algorithm, options.mode)
    found = call(run.command(folder, options.dtype, options.steps), options.out / "log.txt")
    value = point.value or round(weights(folder / "start") / 1e6)
    return {"value": value, **found}


def weights(start: Path) -> int:
    """How many a model has, embeddings included."""
    from floor import Shape

    shape = Shape.read(start)
    return shape.trunk + shape.head


def picture(found: dict[str, list[dict[str, Any]]]) -> str:
    """SVG: of each axis a chart of seconds and one of memory."""
    from amenable.evaluate.curves import HEIGHT, WIDTH, Series, line_chart

    parts = []
    for place, (name, points) in enumerate(found.items()):
        values = [float(point["value"]) for point in points]
        for column, (key, unit) in enumerate((("step_s", "s a step"), ("peak_gb", "GB at most"))):
            ys = [float(point[key]) for point in points]
            chart = line_chart(
                f"{unit} against {AXES[name].label}",
                [Series(unit, values, ys)],
                x_label=AXES[name].label,
                y_label=unit,
                y_range=(0.0, 1.1 * max(ys)),
                x_range=(0.0, max(values)),
            )
            place_at = f'x="{column * WIDTH}" y="{place * HEIGHT}" width="{WIDTH}"'
            parts.append(str(chart).replace("<svg ", f'<svg {place_at} height="{HEIGHT}" ', 1))
    width, height = 2 * WIDTH, HEIGHT * len(found)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


STYLE = (
    "text{font:12px sans-serif;fill:#59616b}.grid{stroke:#e2ded5}.axis{stroke:#7a7f87}"
    ".line{fill:none;stroke:#0b6b60;stroke-width:2}"
)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The points for people."""
    lines = ["| axis | value | s a step | GB |", "| --- | ---: | ---: | ---: |"]
    for name, points in found.items():
        for point in points:
            figures = f"{point['value']} | {point['step_s']:.1f} | {point['peak_gb']:.2f}"
            lines.append(f"| {AXES[name].label} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "scaling")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--steps", type=int, default=2, help="timed in a process, after the first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    sys.path[:0] = [str(HERE / "peers"), str(HERE / "parity")]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.axes:
        for place, point in enumerate(AXES[name].points):
            folder = options.out / f"{name}-{place}"
            folder.mkdir(parents=True, exist_ok=True)
            found.setdefault(name, []).append(measure(point, folder, options))
            print(json.dumps({"axis": name, **found[name][-1]}), file=sys.stderr, flush=True)
    head = {
        "mode": options.mode,
        "dtype": options.dtype,
        "labels": {n: AXES[n].label for n in found},
    }
    text = json.dumps({**head, "axes": found}, indent=1)
    (options.out / "scaling.json").write_text(text + "\n", encoding="utf-8")
    (options.out / "scaling.svg").write_text(picture(found), encoding="utf-8")
    print(text if options.json else table(found))


if __name__ == "__main__":
    main()
