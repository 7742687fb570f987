"""What both sides of the speed comparison read: start model, reward models, rows and settings.

    .venv/bin/python benchmarks/peers/work.py FOLDER

    FOLDER/start/          the start model; its end-of-sequence token is one that no text has
    FOLDER/reward/MODE/    untrained reward models on it: a random head, for MODE full and lora
    FOLDER/rows.jsonl      prompts, as text and rendered, with two completions each
    FOLDER/work.json       lengths and settings

Sampling ends at the end-of-sequence token, and every completion shall have the same length on both
sides. So the start model is given `END` for it, a special token of the tokenizer that text never
holds: a model samples it about never, and both sides check that every completion has `NEW_TOKENS`.
Texts are the built-in task's docstrings, laid end to end and cut to the wanted numbers of tokens.
No torch at import: the peers' environments read this file too.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import task

BASE = "smollm2-135m"
END = "<gh_stars>"
NEW_TOKENS = 48
"""Of every completion, given or sampled; the end-of-sequence token of a given one included."""

LENGTHS = (44, 50, 56, 64, 72, 80, 90, 102, 116, 132, 150, 170, 200, 236, 300, 380)
"""Tokens of the rendered prompts, 140 in the mean."""

ONLINE = (5, 12)
"""Which of the prompts GRPO and RLOO take: 80 and 200 tokens."""

SAMPLES = 8
"""Of each of them."""

RATE = 1e-6
PPO_EPOCHS = 4
MODES = ("full", "lora")


def make(
    folder: Path,
    base: str = BASE,
    lengths: Sequence[int] = LENGTHS,
    online: Sequence[int] = ONLINE,
    samples: int = SAMPLES,
) -> None:
    """Write all but the reward models; nothing if it is there.

    Args:
        folder: where.
        base: a built-in name or a model folder.
        lengths: tokens of each rendered prompt.
        online: places in `lengths` of the prompts of GRPO and RLOO.
        samples: of each of them.
    """
    settings = {"lengths": list(lengths), "online": list(online), "samples": samples}
    if (folder / "work.json").exists() and read(folder)["settings"] == settings:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _make_start(folder / "start", base)
    task.write_rows(folder / "rows.jsonl", _rows(folder / "start", lengths))
    text = json.dumps({"settings": settings}) + "\n"
    (folder / "work.json").write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Settings and rows."""
    found: dict[str, Any] = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    return {**found, "rows": task.read_rows(folder / "rows.jsonl")}


def online_rows(work: dict[str, Any]) -> list[task.Row]:
    """The rows of GRPO and RLOO."""
    return [work["rows"][place] for place in work["settings"]["online"]]


def make_rewards(folder: Path) -> None:
    """Write the reward models that PPO needs on both sides; nothing if they are there."""
    import torch

    from amenable.config.load import load_recipe
    from amenable.models.build import Foundation
    from amenable.models.export import export_reward
    from amenable.models.heads import ScalarHead

    for mode in MODES:
        out = folder / "reward" / mode
        if out.is_dir():
            continue
        settings = {"model.base": str(folder / "start"), "model.dtype": "fp32"}
        settings |= {"data.task": "docstrings", "reward.enabled": False, "policy.enabled": False}
        settings |= {"model.lora.enabled": mode == "lora"}
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        foundation = Foundation.open(load_recipe(None, words))
        width = json.loads((folder / "start" / "config.json").read_text("utf-8"))["hidden_size"]
        role = foundation.role("reward", head=ScalarHead(width))
        export_reward(
            role.model,
            role.scalar_head,
            foundation.tokenizer,
            out,
            role.adapter,
            base=str(folder / "start"),
            dtype=torch.bfloat16,
        )


def _make_start(folder: Path, base: str) -> None:
    import torch

    from amenable.models.load import load_causal_lm, load_tokenizer
    from amenable.models.pull import resolve_base
    from amenable.models.quiet import without_bars

    source = resolve_base(base)
    tokenizer = load_tokenizer(source)
    tokenizer.eos_token = END
    end = tokenizer.convert_tokens_to_ids(END)
    model = load_causal_lm(source, torch.bfloat16, pad_token_id=tokenizer.pad_token_id)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rows(start: Path, lengths: Sequence[int]) -> list[task.Row]:
    from amenable.data.docstrings import harvest
    from amenable.data.render import Renderer
    from amenable.data.schemas import Message, Prompt, Speaker
    from amenable.models.load import eos_ids, load_tokenizer

    tokenizer = load_tokenizer(start)
    renderer = Renderer(tokenizer, eos_ids(start, tokenizer), max_prompt_tokens=8192)
    pairs = harvest(max_words=60)
    words = cycle(word for pair in pairs for word in pair.prompt.text.split())
    summaries = cycle(word for pair in pairs for word in pair.output_text.split())

    def prompt(text: str) -> Prompt:
        return Prompt(messages=(Message(Speaker.USER, text),), id="", group="")

    rows = []
    for number, length in enumerate(lengths):
        text = _passage(words, lambda text: len(renderer.prompt_ids(prompt(text))), length)
        candidates = [
            _passage(summaries, lambda text: len(renderer.whole_completion_ids(text)), NEW_TOKENS)
            for _ in range(2)
        ]
        rows.append(
            {
                "id": f"r{number}",
                "group": f"r{number}",
                "input_text": text,
                "prompt": renderer.prompt_text(prompt(text)),
                "output_text": candidates[0],
                "rejected": candidates[1],
            }
        )
    return rows


def _passage(words: Iterator[str], tokens: Callable[[str], int], wanted: int) -> str:
    """Running text of exactly as many tokens; the last few are filled up with "a"."""
    drawn = list(islice(words, wanted))
    few = bisect_right(range(wanted), wanted, key=lambda n: tokens(" ".join(drawn[: n + 1])))
    taken = drawn[:few]
    while tokens(" ".join(taken)) < wanted:
        taken.append("a")
    return " ".join(taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make(options.folder)
    make_rewards(options.folder)
