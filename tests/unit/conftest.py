"""A run folder, a recipe and a stage context on the tiny model, for tests of single stages."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import MetricsLog, RunFolder, StageContext, write_jsonl
from amenable.config.checkpoint import CheckpointConfig
from amenable.config.collect import CollectConfig
from amenable.config.data import DataConfig
from amenable.config.evaluate import EvaluateConfig
from amenable.config.model import LoraConfig, ModelConfig
from amenable.config.policy import (
    BestOfNConfig,
    KLConfig,
    OnlineDPOConfig,
    PolicyConfig,
    PPOConfig,
    SelectionConfig,
    VllmConfig,
)
from amenable.config.preference import PreferenceConfig
from amenable.config.recipe import Recipe
from amenable.config.reward import RewardConfig
from amenable.config.sft import SFTConfig
from amenable.progress import Deadline, Progress


class StopAfter(Deadline):
    """A deadline that is exceeded when it is asked for the n-th time."""

    def __init__(self, times: int) -> None:
        super().__init__(None)
        self._left = times

    def exceeded(self) -> bool:
        self._left -= 1
        return self._left <= 0


def tiny_recipe(base: Path, **changes: Any) -> Recipe:
    """A recipe of small sections; `section__field=value` changes a field, `seed=1` the recipe."""
    sections: dict[str, Any] = {
        "model": ModelConfig(base=str(base), dtype="fp32"),
        "lora": LoraConfig(rank=4, alpha=8.0),
        "data": DataConfig(max_prompt_tokens=64, max_completion_tokens=8, validation_rows=2),
        "sft": SFTConfig(batch_size=5, evaluations=2),
        "collect": CollectConfig(),
        "reward": RewardConfig(batch_size=5, evaluations=2),
        "policy": PolicyConfig(updates=3, prompts_per_update=4, samples_per_prompt=2),
        "kl": KLConfig(),
        "selection": SelectionConfig(),
        "ppo": PPOConfig(),
        "online_dpo": OnlineDPOConfig(),
        "best_of_n": BestOfNConfig(),
        "vllm": VllmConfig(),
        "preference": PreferenceConfig(),
        "checkpoint": CheckpointConfig(),
        "evaluate": EvaluateConfig(bootstrap_samples=50, best_of=0, diversity_prompts=0),
    }
    top: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            sections[section] = dataclasses.replace(sections[section], **{field: value})
        else:
            top[name] = value
    inner = {
        "policy": ("kl", "selection", "ppo", "online_dpo", "best_of_n", "vllm", "preference"),
        "model": ("lora",),
    }
    for outer, names in inner.items():
        own = {name: sections.pop(name) for name in names}
        sections[outer] = dataclasses.replace(sections[outer], **own)
    return Recipe(**sections, **top)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model; not to be changed."""
    from amenable.models.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def lively(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with embeddings six times as long: frozen, they allow confident answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path_factory.mktemp("lively") / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6.0)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(out)
    return out


MakeContext = Callable[..., StageContext]


@pytest.fixture
def make_context(tiny: Path, tmp_path: Path) -> MakeContext:
    """Contexts of stages; without `root` they share one run folder."""

    def make(
        stage: str, *, root: Path | None = None, stop_after: int | None = None, **changes: Any
    ) -> StageContext:
        folder = RunFolder(root or tmp_path / "run")
        return StageContext(
            recipe=tiny_recipe(changes.pop("base", tiny), **changes),
            folder=folder,
            stage=stage,
            log=MetricsLog(stage, folder.stage(stage), tensorboard=False),
            progress=Progress(stream=io.StringIO()),
            deadline=StopAfter(stop_after) if stop_after else Deadline(None),
        )

    return make


def said(ctx: StageContext) -> str:
    """What the user has read so far."""
    stream = ctx.progress._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


QUESTIONS = (
    "Return the sum of the values in the list.",
    "What is the name of the longest river?",
    "Open the file and read every line.",
    "Water boils at 100 degrees.",
    "Close what you have opened.",
    "Raise an error.",
    "Who asked the keeper of the first library, and what did the keeper say?",
    "A bowl of apples",
    "Two trains leave the city at 6:15.",
    "Compute the mean of each column.",
)
ANSWERS = ("Sum.", "A river", "Lines", "Hot", "Shut", "No", "Ask", "Red", "Go", "Mean")


def write_rows(ctx: StageContext, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of `data/NAME.jsonl`, with ids and groups."""
    full = [{"id": f"{name}-{i}", "group": f"{name}-{i}", **row} for i, row in enumerate(rows)]
    write_jsonl(ctx.folder.data / f"{name}.jsonl", full)


@pytest.fixture
def ten_rows() -> list[dict[str, str]]:
    """Ten questions with an answer each."""
    return [
        {"input_text": question, "output_text": answer}
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
