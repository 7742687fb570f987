"""A pipeline of ten-line stages: `upper` <- `letters`, `count` <- `letters`, `page` <- both."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import Json, Progress, StageContext, write_text
from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.pipeline import local
from amenable.pipeline.stages import Stage

MODULE = "fake_stages"


def never_off(recipe: Recipe) -> str:
    return ""


def count_off(recipe: Recipe) -> str:
    return "" if recipe.reward.enabled else "reward.enabled is false"


STAGES = (
    Stage(
        name="letters",
        run=f"{MODULE}:letters",
        config=("seed", "data.instruction"),
        sources=("data.prompts",),
        makes=("data/letters.txt",),
        time_share=1,
        off=never_off,
    ),
    Stage(
        name="upper",
        run=f"{MODULE}:upper",
        config=("sft",),
        needs=("letters",),
        reads=("data/letters.txt",),
        makes=("models/upper",),
        may_make=("stages/upper/metrics.jsonl",),
        time_share=1,
        off=never_off,
    ),
    Stage(
        name="count",
        run=f"{MODULE}:count",
        config=("reward",),
        needs=("letters",),
        reads=("data/letters.txt",),
        makes=("data/count.txt",),
        time_share=2,
        off=count_off,
    ),
    Stage(
        name="page",
        run=f"{MODULE}:page",
        config=("name",),
        needs=("upper", "count"),
        reads=("models/upper/*", "data/count.txt"),
        makes=("page.txt",),
        time_share=1,
        off=never_off,
    ),
)


@dataclass
class Pipeline:
    """Runs the fake stages and remembers which ran."""

    root: Path
    calls: list[str] = field(default_factory=list)
    hooks: dict[str, Callable[[StageContext], None]] = field(default_factory=dict)
    said: io.StringIO = field(default_factory=io.StringIO)

    @property
    def out(self) -> Path:
        return self.root / "run"

    @property
    def source(self) -> Path:
        return self.root / "prompts.jsonl"

    def recipe(self, *overrides: str) -> Recipe:
        base = ["model.base=tiny", f"data.prompts={self.source}", "policy.reward=math:fsum"]
        return load_recipe(None, [*base, *overrides])

    def run(self, *overrides: str, **options: Any) -> Json:
        """Runs and returns the summary; `calls` holds the stages that ran this time."""
        self.calls.clear()
        self.said = io.StringIO()
        return local.run(
            self.recipe(*overrides),
            self.out,
            stages=STAGES,
            progress=Progress(stream=self.said),
            **options,
        )

    def called(self, name: str, ctx: StageContext) -> None:
        self.calls.append(name)
        if name in self.hooks:
            self.hooks[name](ctx)

    def letters(self, ctx: StageContext) -> Json:
        self.called("letters", ctx)
        write_text(ctx.folder.data / "letters.txt", self.source.read_text().strip().lower())
        return {"prompts": 1}

    def upper(self, ctx: StageContext) -> Json:
        self.called("upper", ctx)
        ctx.log.write(0, loss=1.0)
        text = (ctx.folder.data / "letters.txt").read_text()
        write_text(ctx.folder.models / "upper" / "weights", text.upper())
        return {"steps": 1, "health": [{"rule": "r", "stage": "upper", "step": 0}]}

    def count(self, ctx: StageContext) -> Json:
        self.called("count", ctx)
        text = (ctx.folder.data / "letters.txt").read_text()
        write_text(ctx.folder.data / "count.txt", str(len(text)))
        return {}

    def page(self, ctx: StageContext) -> Json:
        self.called("page", ctx)
        write_text(ctx.folder.root / "page.txt", "page")
        return {}


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    made = Pipeline(tmp_path)
    made.source.write_text("Hello\n")
    module = types.ModuleType(MODULE)
    for name in ("letters", "upper", "count", "page"):
        setattr(module, name, getattr(made, name))
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(local, "base_model", lambda recipe, say: tmp_path / "base")
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made
