"""The stages of a run, in order: one literal table that every runner renders.

Stages are named by dotted path, so that reading this table imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amenable.artifacts import Json, StageContext
from amenable.config.needs import collects, needs_preferences, trains_reward
from amenable.config.recipe import Recipe
from amenable.masking import shown_name

RunFunction = Callable[[StageContext], Json | list[Json]]
"""Returns its section of summary.json."""

RENDERING = (
    "model",
    "data.instruction",
    "data.system_message",
    "data.max_prompt_tokens",
    "data.max_completion_tokens",
)
"""Recipe keys that decide which tokens a row becomes."""

LOGS = ("metrics.jsonl", "samples.jsonl")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table."""

    name: str
    """Also its folder under `stages/` and its section of `summary.json`."""

    run: str
    """`module:function` of type RunFunction."""

    config: tuple[str, ...]
    """Recipe keys and sections that it depends on."""

    sources: tuple[str, ...] = ()
    """Recipe keys whose values name files, folders or code outside the run folder."""

    needs: tuple[str, ...] = ()
    """Earlier stages that must have finished, as far as they are on."""

    reads: tuple[str, ...] = ()
    """Artifacts of those stages that it depends on, as patterns in the run folder."""

    makes: tuple[str, ...] = ()
    """Artifacts that it must leave behind, as patterns in the run folder; a folder counts whole."""

    may_make: tuple[str, ...] = ()
    """Artifacts that it leaves behind for some recipes."""

    together: bool = False
    """Several ranks compute it together; else rank 0 does alone."""

    time_share: float
    """Its part of a time budget, relative to the other stages."""

    off: Callable[[Recipe], str]
    """Why the recipe does not want it; empty: it does."""

    def load(self) -> RunFunction:
        """Imports and returns its function."""
        module, _, name = self.run.partition(":")
        function: RunFunction = getattr(importlib.import_module(module), name)
        return function


def _never_off(recipe: Recipe) -> str:
    return ""


def _sft_off(recipe: Recipe) -> str:
    if not recipe.sft.enabled:
        return "sft.enabled is false"
    has_rows = recipe.data.task != "files" or bool(recipe.data.demonstrations)
    return "" if has_rows else "no demonstrations"


def _collect_off(recipe: Recipe) -> str:
    if not needs_preferences(recipe):
        return "no stage learns from preferences"
    if recipe.data.preferences:
        return "data.preferences has them"
    return "" if collects(recipe) else 'collect.annotator is "none"'


def _reward_off(recipe: Recipe) -> str:
    if trains_reward(recipe):
        return ""
    if not recipe.reward.enabled:
        return "reward.enabled is false"
    if recipe.policy.reward:
        return f"policy.reward is {shown_name(recipe.policy.reward)}"
    return "policy.rewards does without the run's own"


def _policy_off(recipe: Recipe) -> str:
    return "" if recipe.policy.enabled else "policy.enabled is false"


def _evaluate_off(recipe: Recipe) -> str:
    return "" if recipe.evaluate.enabled else "evaluate.enabled is false"


def _logs(stage: str) -> tuple[str, ...]:
    return tuple(f"stages/{stage}/{name}" for name in LOGS)


STAGES: tuple[Stage, ...] = (
    Stage(
        name="data",
        run="amenable.data.stage:run",
        config=(
            "seed",
            "data",
            "model.base",
            "model.chat_template",
            "collect.annotator",
            "collect.pairs",
            "reward.enabled",
            "policy.enabled",
            "policy.algorithm",
            "policy.reward",
            "policy.rewards",
            "policy.selection",
        ),
        sources=(
            "data.demonstrations",
            "data.preferences",
            "data.prompts",
            "data.evaluation_prompts",
            "model.base",
        ),
        may_make=("data/*.jsonl", "data/*.json", "stages/data/*.json"),
        time_share=2,
        off=_never_off,
    ),
    Stage(
        name="sft",
        run="amenable.train.sft:run",
        config=("seed", *RENDERING, "sft"),
        sources=("model.base",),
        needs=("data",),
        reads=("data/demonstrations.*.jsonl",),
        makes=("models/sft",),
        may_make=_logs("sft"),
        together=True,
        time_share=12,
        off=_sft_off,
    ),
    Stage(
        name="collect",
        run="amenable.rollout.collect:run",
        config=("seed", *RENDERING, "collect", "data.evaluation_rows", "data.validation_rows"),
        sources=("model.base",),
        needs=("data", "sft"),
        reads=("data/prompts.*.jsonl", "models/sft/*"),
        makes=("data/preferences.*.jsonl",),
        may_make=(*_logs("collect"), "stages/collect/*.json"),
        together=True,
        time_share=10,
        off=_collect_off,
    ),
    Stage(
        name="reward",
        run="amenable.train.reward:run",
        config=("seed", *RENDERING, "reward"),
        sources=("model.base",),
        needs=("data", "sft", "collect"),
        reads=("data/preferences.*.jsonl", "data/demonstrations.*.jsonl", "models/sft/*"),
        makes=("models/reward", "stages/reward/report.json"),
        may_make=_logs("reward"),
        together=True,
        time_share=12,
        off=_reward_off,
    ),
    Stage(
        name="policy",
        run="amenable.train.registry:run_policy",
        config=(
            "seed",
            *RENDERING,
            "policy",
            "collect",
            "evaluate.best_of",
            "evaluate.best_of_prompts",
            "evaluate.temperature",
        ),
        sources=("model.base", "policy.reward"),
        needs=("data", "sft", "collect", "reward"),
        reads=(
            "data/prompts.*.jsonl",
            "data/preferences.train.jsonl",
            "data/preferences.validation.jsonl",
            "models/sft/*",
            "models/reward/*",
        ),
        makes=("models/tuned",),
        may_make=(*_logs("policy"), "stages/policy/*.json"),
        together=True,
        time_share=44,
        off=_policy_off,
    ),
    Stage(
        name="evaluate",
        run="amenable.evaluate.stage:run",
        config=("seed", *RENDERING, "evaluate", "collect", "policy.reward", "policy.rewards"),
        sources=("model.base", "policy.reward"),
        needs=("data", "sft", "reward", "policy"),
        reads=("data/*.test.jsonl", "models/*"),
        makes=("stages/evaluate/completions.jsonl",),
        may_make=(*_logs("evaluate"), "stages/evaluate/*.json"),
        together=True,
        time_share=18,
        off=_evaluate_off,
    ),
    Stage(
        name="report",
        run="amenable.evaluate.report:run",
        config=("name", "seed", "model", "data", "sft", "collect", "reward", "policy", "evaluate"),
        needs=("data", "sft", "collect", "reward", "policy", "evaluate"),
        reads=("*",),
        makes=("report.html",),
        time_share=2,
        off=_never_off,
    ),
)


def stage_names() -> list[str]:
    """The names, in order."""
    return [stage.name for stage in STAGES]


def config_values(stage: Stage, recipe_values: dict[str, Any]) -> dict[str, Any]:
    """The flattened recipe values that `stage` depends on, by dotted key."""
    return {
        key: value
        for key, value in recipe_values.items()
        if any(key == wanted or key.startswith(f"{wanted}.") for wanted in stage.config)
    }
