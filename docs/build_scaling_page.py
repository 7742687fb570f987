"""Writes the tables of docs/scaling.md from the planner's model.

python docs/build_scaling_page.py            writes the tables
python docs/build_scaling_page.py --check    exit code 1 where the page is out of date
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.plan.hardware import hardware
from amenable.plan.layouts import Layout, Spread, spread
from amenable.plan.rows import Rows
from amenable.plan.shape import ModelShape, config_of, shape_of

PAGE = Path(__file__).parent / "scaling.md"
START, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

RANKS = (1, 8, 64, 256, 1024)
UPDATE = (
    "model.dtype=bf16",
    "data.preferences=preferences.jsonl",
    "policy.prompts_per_update=1024",
    "policy.samples_per_prompt=1",
    "policy.epochs=4",
    "policy.minibatches=4",
    "policy.micro_batch_tokens=2048",
)
PROMPT, ANSWER = 512, 256
LORA, WHOLE = "model.lora.enabled=true", "model.lora.enabled=false"

TABLES = (
    ("llama-2-7b", LORA, Layout(name="replicated")),
    ("llama-2-7b", WHOLE, Layout(name="FSDP2 over all cards", shards=0)),
    ("llama-2-7b", WHOLE, Layout(name="FSDP2 in each host of 8", shards=8)),
    ("llama-2-7b", WHOLE, Layout(name="the same, roll-outs by an engine", shards=8, engine=8)),
    ("llama-2-70b", LORA, Layout(name="replicated")),
    ("llama-2-70b", LORA, Layout(name="base cut in each host, engine", shards=8, engine=8)),
    ("llama-2-70b", WHOLE, Layout(name="FSDP2 over all cards, engine", shards=0, engine=8)),
    ("llama-2-70b", WHOLE, Layout(name="FSDP2 over 64 cards, engine", shards=64, engine=8)),
)


@cache
def shape(base: str) -> ModelShape:
    """Of a model that the planner knows."""
    return shape_of(config_of(base), base)


def recipe(base: str, way: str) -> Recipe:
    """Of the page's update."""
    return load_recipe(None, [f"model.base={base}", way, *UPDATE])


def rows() -> Rows:
    """Prompts and completions of one length each."""
    lengths = {"prompts": [(PROMPT,)], "preferences": [(PROMPT, ANSWER, ANSWER)]}
    return Rows(lengths, {"prompts.train": 10_000, "preferences.train": 1_000}, "as stated")


def table(base: str, way: str, layout: Layout) -> str:
    """One layout over numbers of cards."""
    cells = [
        "| cards | GB of a card | GB sent by a card | sampling, s | measuring, s | learning, s "
        "| waiting, s | update, s | card-hours a million episodes |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ranks in RANKS:
        if ranks < max(layout.engine, layout.shards):
            continue
        found = spread(recipe(base, way), shape(base), rows(), hardware("h100"), layout, ranks)
        cells.append(row(found))
    trained = "LoRA" if way == LORA else "every weight"
    return f"### {base}, {trained}: {layout.name}\n\n" + "\n".join(cells)


def row(found: Spread) -> str:
    """A number of cards; memory above the card's is marked."""
    memory = f"{found.memory_bytes / 1e9:.0f}"
    if found.memory_bytes > hardware("h100").memory_bytes:
        memory = f"~~{memory}~~"
    phases = " | ".join(f"{value:,.1f}" for value in found.seconds.values())
    sent = sum(found.sent.values()) / 1e9
    return (
        f"| {found.ranks:,} | {memory} | {sent:,.1f} | {phases} | {found.update_s:,.0f} "
        f"| {found.card_hours:,.0f} |"
    )


def page(now: str) -> str:
    """The whole page with tables of today."""
    before, rest = now.split(START, 1)
    after = rest.split(END, 1)[1]
    tables = "\n\n".join(table(*cell) for cell in TABLES)
    return f"{before}{START}\n{tables}\n\n{END}{after}"


if __name__ == "__main__":
    now = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(page(now) != now and "docs/scaling.md is out of date: run this script")
    PAGE.write_text(page(now), encoding="utf-8")
