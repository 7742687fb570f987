"""What a recipe's stages need of each other: who learns from what. One rule each, for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from amenable.algorithms import ALGORITHMS, kl_placement
from amenable.config.policy import PolicyConfig
from amenable.config.recipe import Recipe
from amenable.config.rewards import uses_own_reward


def follows_reward(recipe: Recipe) -> bool:
    """The policy stage samples, and something must score the samples."""
    return recipe.policy.enabled and _learns_from(recipe) == "prompts"


def learns_from_preferences(recipe: Recipe) -> bool:
    """The policy stage reads pairs; a reward model is no more than a judge then."""
    return recipe.policy.enabled and _learns_from(recipe) == "preferences"


def trains_reward(recipe: Recipe) -> bool:
    """The reward stage runs."""
    return recipe.reward.enabled and uses_own_reward(recipe.policy)


def needs_preferences(recipe: Recipe) -> bool:
    """Some stage learns from pairs."""
    return trains_reward(recipe) or learns_from_preferences(recipe)


def collects(recipe: Recipe) -> bool:
    """The collect stage runs: pairs are needed, there is an annotator, and no file has them."""
    annotated = recipe.collect.annotator != "none" and not recipe.data.preferences
    return annotated and needs_preferences(recipe)


def selects_by(recipe: Recipe) -> str:
    """Who chooses among the policy's checkpoints; empty: the last one stays."""
    by = recipe.policy.selection.by
    if by == "auto":
        simulated = recipe.collect.annotator == "simulated"
        by = "annotator" if simulated and collects(recipe) else "last"
    return by if by != "last" and follows_reward(recipe) else ""


def _learns_from(recipe: Recipe) -> str:
    return ALGORITHMS[recipe.policy.algorithm].learns_from


_OF_ONE_ALGORITHM = {"ppo": "ppo", "online_dpo": "online-dpo", "best_of_n": "best-of-n"}
_OF_PAIRS = (
    "enabled",
    "algorithm",
    "reward",
    "rewards",
    "temperature",
    "gate",
    "gate_skip",
    "preference",
)
"""What algorithms that learn from pairs read of [policy]."""


def unread_keys(recipe: Recipe) -> list[str]:
    """Keys of [policy] that the recipe sets to something, and its algorithm does not read."""
    changed = _changed(recipe.policy, Recipe(model=recipe.model).policy, "")
    return [f"policy.{key}" for key in changed if _is_unread(recipe.policy, key)]


def _is_unread(policy: PolicyConfig, key: str) -> bool:
    algorithm, section = ALGORITHMS[policy.algorithm], key.partition(".")[0]
    if algorithm.learns_from == "preferences":
        return section not in _OF_PAIRS
    if section == "preference" or _OF_ONE_ALGORITHM.get(section, policy.algorithm) != (
        policy.algorithm
    ):
        return True
    placement = kl_placement(policy)
    without_kl = placement == "none" and section == "kl" and key != "kl.placement"
    other_estimator = {"loss": "kl.estimator", "reward": "kl.loss_estimator"}.get(placement)
    return key in algorithm.ignores or without_kl or key == other_estimator


def _changed(section: Any, default: Any, prefix: str) -> Iterator[str]:
    for entry in fields(section):
        value, usual = getattr(section, entry.name), getattr(default, entry.name)
        if is_dataclass(value):
            yield from _changed(value, usual, f"{prefix}{entry.name}.")
        elif value != usual:
            yield prefix + entry.name
