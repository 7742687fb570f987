"""`summary.json`: the result of a run in numbers, every key always there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amenable.artifacts import Json
from amenable.config.recipe import Recipe
from amenable.pipeline.stages import Stage
from amenable.pipeline.state import StageState

SCHEMA_VERSION = 1

SECTIONS: dict[str, tuple[str, ...]] = {
    "data": ("demonstrations", "preferences", "prompts", "dropped"),
    "sft": ("steps", "loss_first", "loss_last"),
    "collect": (),
    "reward": (
        "pairs_train",
        "pairs_eval",
        "accuracy",
        "accuracy_ci95",
        "longest_wins_accuracy",
        "shortest_wins_accuracy",
        "bag_of_words_accuracy",
        "ece",
        "temperature",
    ),
    "policy": (
        "algorithm",
        "episodes",
        "updates",
        "reward_first",
        "reward_last",
        "kl_last",
        "completion_tokens_mean",
    ),
}
"""Keys that each section has at least; a figure that was not computed is null."""

COMPARISON = (
    "a",
    "b",
    "judge",
    "prompts",
    "wins",
    "ties",
    "losses",
    "win_rate",
    "win_rate_ci95",
    "length_controlled_win_rate",
    "length_controlled_ci95",
    "p_value",
)
"""Keys of one row of `evaluate`."""


def summary(
    recipe: Recipe,
    stages: Sequence[Stage],
    states: Mapping[str, StageState],
    statuses: Mapping[str, str],
    *,
    device: str | None,
    wall_s: float,
) -> Json:
    """The content of summary.json.

    Args:
        recipe: the resolved recipe.
        stages: the table.
        states: of the stages whose outputs are whole and up to date.
        statuses: of every stage: done, shortened, off, running, failed or pending.
        device: where models ran.
        wall_s: seconds of all stages together.
    """
    peaks = [state.peak_rss_gb for state in states.values() if state.peak_rss_gb is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": recipe.name,
        "seed": recipe.seed,
        "base_model": recipe.model.base,
        "device": device,
        "wall_s": round(wall_s, 1),
        "peak_rss_gb": max(peaks, default=None),
        **{name: _section(states.get(name), keys) for name, keys in SECTIONS.items()},
        "evaluate": _comparisons(states.get("evaluate")),
        "health": [row for state in states.values() for row in state.health],
        "stages": {stage.name: _stage(stage.name, states, statuses) for stage in stages},
    }


def split_result(result: Any) -> tuple[Any, list[Json]]:
    """(section, health rows) of what a stage returned; it may carry rows under `health`."""
    if not isinstance(result, dict) or "health" not in result:
        return result, []
    return {key: value for key, value in result.items() if key != "health"}, result["health"]


def _section(state: StageState | None, keys: Sequence[str]) -> Json | None:
    if state is None:
        return None
    return {**dict.fromkeys(keys), **(state.summary or {})}


def _comparisons(state: StageState | None) -> list[Json] | None:
    """The rows of the evaluate stage, which returns them under `comparisons`, or as a list."""
    if state is None:
        return None
    found = state.summary
    rows = found.get("comparisons", found.get("evaluate")) if isinstance(found, dict) else found
    return [{**dict.fromkeys(COMPARISON), **row} for row in rows or []]


def _stage(name: str, states: Mapping[str, StageState], statuses: Mapping[str, str]) -> Json:
    state = states.get(name)
    return {
        "status": statuses[name],
        "wall_s": state.wall_s if state else None,
        "peak_rss_gb": state.peak_rss_gb if state else None,
    }
