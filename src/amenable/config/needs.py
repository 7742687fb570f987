"""What a recipe's stages need of each other: who learns from what. One rule each, for all."""

from __future__ import annotations

from amenable.algorithms import ALGORITHMS
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


def _learns_from(recipe: Recipe) -> str:
    return ALGORITHMS[recipe.policy.algorithm].learns_from
