"""The least time that a step can take: its arithmetic and its memory traffic at measured rates.

    .venv/bin/python benchmarks/peers/floor.py [--dtype bf16|fp32]

prints the two rates as JSON. A pass costs its FLOPs over the matrix rate; a decoded token, for all
sequences together, the larger of its FLOPs over the matrix rate and its bytes over the read rate.
Counted are real tokens alone, every prompt once for all of its completions, the vocabulary for
completion tokens alone; no optimizer, no norms, no sampling. A backward pass costs two forward
passes, of frozen weights one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import work

Groups = list[tuple[int, int]]
"""Tokens of a prompt, and how many completions of it there are."""


@dataclass(frozen=True)
class Rates:
    """Of this machine, in one precision."""

    flops_s: float
    bytes_s: float
    threads: int


@dataclass(frozen=True)
class Shape:
    """What a Llama's weights cost."""

    layers: int
    width: int
    """Of all query heads together."""
    keys: int
    """Of all key heads together."""
    trunk: int
    """Weights of the layers' matrices."""
    head: int
    """Weights of the vocabulary projection."""

    @classmethod
    def read(cls, start: Path) -> Shape:
        """From a model folder."""
        config = json.loads((start / "config.json").read_text(encoding="utf-8"))
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        width = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        layer = 2 * hidden * (width + keys) + 3 * hidden * config["intermediate_size"]
        return cls(layers, width, keys, layers * layer, hidden * config["vocab_size"])

    def forward(self, groups: Groups, *, vocabulary: bool, new: int = work.NEW_TOKENS) -> float:
        """FLOPs of one pass over groups whose completions have `new` tokens."""
        tokens = sum(prompt + count * new for prompt, count in groups)
        seen = sum(prompt**2 / 2 + count * new * (prompt + new / 2) for prompt, count in groups)
        predicted = sum(count * new for _, count in groups) if vocabulary else 0
        return (
            2 * self.trunk * tokens
            + 4 * self.layers * self.width * seen
            + (2 * self.head * predicted)
        )

    def decode_s(self, groups: Groups, rates: Rates, width_bytes: int) -> float:
        """Seconds to read the prompts and to sample every completion."""
        rows = sum(count for _, count in groups)
        seconds = self.forward(groups, vocabulary=False, new=0) / rates.flops_s
        for step in range(work.NEW_TOKENS):
            context = sum(count * (prompt + step) for prompt, count in groups)
            flops = 2 * (self.trunk + self.head) * rows + 4 * self.layers * self.width * context
            numbers = self.trunk + self.head + 2 * self.layers * self.keys * context
            seconds += max(flops / rates.flops_s, numbers * width_bytes / rates.bytes_s)
        return seconds


def floor_s(
    algorithm: str, mode: str, shape: Shape, settings: dict[str, Any], rates: Rates, dtype: str
) -> float:
    """Seconds of one step.

    Args:
        algorithm: of the step.
        mode: `full`, `lora` or `head`.
        shape: of the model.
        settings: of the work folder.
        rates: of the machine.
        dtype: `bf16` or `fp32`.
    """
    lengths = settings["lengths"]
    groups = [(length, 2 if algorithm in ("reward", "dpo") else 1) for length in lengths]
    if algorithm in ("grpo", "rloo"):
        groups = [(lengths[place], settings["samples"]) for place in settings["online"]]
    words = shape.forward(groups, vocabulary=True)
    states = shape.forward(groups, vocabulary=False)
    trained = 3 if mode == "full" else 2
    critic = mode != "head"  # a head reads the states that the reward model has made
    flops = {
        "sft": trained * words,
        "reward": trained * states,
        "dpo": (trained + 1) * words,
        "grpo": (trained + 1) * words,
        "rloo": (trained + 1) * words,
        "ppo": 2 * words
        + (1 + critic) * states
        + work.PPO_EPOCHS * trained * (words + critic * states),
    }[algorithm]
    sampled = algorithm in ("grpo", "rloo", "ppo")
    width_bytes = 2 if dtype == "bf16" else 4
    return flops / rates.flops_s + (shape.decode_s(groups, rates, width_bytes) if sampled else 0.0)


def measure(dtype: str) -> Rates:
    """The best of a few tries each: a matrix product, and a matrix read once (times a vector)."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = (torch.randn(2048, 2048).to(kind) for _ in range(2))
    large, vector = torch.randn(16384, 4096), torch.randn(4096)
    return Rates(
        flops_s=2 * 2048**3 / _best(lambda: left @ right),
        bytes_s=large.nbytes / _best(lambda: large @ vector),
        threads=torch.get_num_threads(),
    )


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    print(json.dumps(vars(measure(parser.parse_args().dtype))))
