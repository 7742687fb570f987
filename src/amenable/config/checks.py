"""Rules that a recipe must keep beyond its types: ranges, and values that must fit together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amenable.config.data import PromptColumns, SourceConfig
from amenable.config.recipe import Recipe
from amenable.errors import RecipeError


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have; both ends belong to it unless `above` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """`low` itself is excluded."""

    def holds(self, value: float) -> bool:
        """True when the value is allowed."""
        low_ok = value > self.low if self.above else value >= self.low
        return low_ok and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"


ANY = Range(0)
POSITIVE = Range(0, above=True)
COUNT = Range(1)
SHARE = Range(0, 1)

RANGES: dict[str, Range] = {
    "seed": Range(0, 2**32 - 1),
    "model.lora.rank": COUNT,
    "model.lora.alpha": POSITIVE,
    "data.max_prompt_tokens": COUNT,
    "data.max_completion_tokens": Range(2),
    "data.max_demonstrations": ANY,
    "data.max_preferences": ANY,
    "data.max_prompts": ANY,
    "data.test_share": SHARE,
    "data.validation_share": Range(0, 1, above=True),
    "data.validation_rows": COUNT,
    "data.evaluation_rows": COUNT,
    "data.max_words": COUNT,
    "sft.epochs": POSITIVE,
    "sft.max_steps": ANY,
    "sft.batch_size": COUNT,
    "sft.learning_rate": POSITIVE,
    "sft.warmup_fraction": SHARE,
    "sft.max_grad_norm": POSITIVE,
    "sft.weight_decay": ANY,
    "sft.micro_batch_tokens": COUNT,
    "sft.evaluations": COUNT,
    "collect.pairs": COUNT,
    "collect.temperature": POSITIVE,
    "collect.noise": Range(0, 0.5),
    "collect.brevity_words": ANY,
    "reward.epochs": POSITIVE,
    "reward.max_steps": ANY,
    "reward.batch_size": COUNT,
    "reward.learning_rate": POSITIVE,
    "reward.warmup_fraction": SHARE,
    "reward.max_grad_norm": POSITIVE,
    "reward.weight_decay": ANY,
    "reward.micro_batch_tokens": COUNT,
    "reward.evaluations": COUNT,
    "policy.updates": COUNT,
    "policy.prompts_per_update": COUNT,
    "policy.samples_per_prompt": COUNT,
    "policy.temperature": POSITIVE,
    "policy.learning_rate": POSITIVE,
    "policy.final_learning_rate_fraction": SHARE,
    "policy.max_grad_norm": POSITIVE,
    "policy.micro_batch_tokens": COUNT,
    "policy.stop_at_kl": ANY,
    "policy.checkpoint_every": COUNT,
    "policy.kl.coef": ANY,
    "policy.kl.target": POSITIVE,
    "policy.kl.horizon": COUNT,
    "policy.ppo.epochs": COUNT,
    "policy.ppo.minibatches": COUNT,
    "policy.ppo.clip_range": Range(0, 1, above=True),
    "policy.ppo.value_clip_range": POSITIVE,
    "policy.ppo.critic_learning_rate": POSITIVE,
    "policy.ppo.critic_epochs": ANY,
    "policy.ppo.gamma": Range(0, 1, above=True),
    "policy.ppo.gae_lambda": SHARE,
    "policy.ppo.missing_eos_penalty": ANY,
    "policy.ppo.score_clip": ANY,
    "policy.ppo.max_approx_kl": POSITIVE,
    "evaluate.temperature": ANY,
    "evaluate.batch_size": COUNT,
    "evaluate.bootstrap_samples": COUNT,
    "evaluate.best_of": ANY,
    "evaluate.best_of_prompts": COUNT,
    "evaluate.diversity_prompts": ANY,
}


def check_recipe(recipe: Recipe, where: str) -> None:
    """Returns when every rule holds.

    Args:
        recipe: well-typed values.
        where: the file to name in the message.

    Raises:
        RecipeError: the first rule that is broken, with its key and a remedy.
    """
    for key, allowed in RANGES.items():
        value = lookup(recipe, key)
        if not allowed.holds(value):
            raise RecipeError(f"{where}: {key}: must be {allowed}, not {value!r}")
    for rule in RULES:
        broken = rule(recipe)
        if broken:
            raise RecipeError(f"{where}: {broken}")


def lookup(recipe: Recipe, key: str) -> Any:
    """The value, or the section, under a dotted key."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _name(recipe: Recipe) -> str:
    usable = recipe.name.strip() == recipe.name and recipe.name not in ("", ".", "..")
    if usable and not any(char in recipe.name for char in '/\\:*?"<>|\0'):
        return ""
    return f"name: {recipe.name!r} cannot name a folder; use letters, digits, - and _"


def _base(recipe: Recipe) -> str:
    if recipe.model.base.strip():
        return ""
    return "model.base: is empty; give a built-in name, a model folder or a hub id"


def _top_p(recipe: Recipe) -> str:
    if recipe.policy.top_p == 1.0:
        return ""
    return (
        f"policy.top_p: must be 1 in training, not {recipe.policy.top_p!r}: a truncated policy"
        " would sample, but the whole one would be differentiated; remove the key"
        " (generation and evaluation may truncate)"
    )


def _top_k(recipe: Recipe) -> str:
    if recipe.policy.top_k == 0:
        return ""
    return (
        f"policy.top_k: must be 0 in training, not {recipe.policy.top_k!r}: a truncated policy"
        " would sample, but the whole one would be differentiated; remove the key"
        " (generation and evaluation may truncate)"
    )


def _some_data(recipe: Recipe) -> str:
    data = recipe.data
    if data.task != "files" or data.prompts or data.preferences or data.demonstrations:
        return ""
    return (
        'data.task: is "files", but data.prompts, data.preferences and data.demonstrations are'
        ' all empty; name at least one file, or set data.task = "docstrings" for the built-in task'
    )


def _built_in_task_has_no_files(recipe: Recipe) -> str:
    data = recipe.data
    if data.task == "files":
        return ""
    for key in ("demonstrations", "prompts", "evaluation_prompts"):
        if getattr(data, key):
            return (
                f'data.{key}: would be ignored, because data.task is "{data.task}"; remove it,'
                ' or set data.task = "files"'
            )
    return ""


def _shares(recipe: Recipe) -> str:
    data = recipe.data
    if data.test_share + data.validation_share >= 1:
        return (
            f"data.test_share: {data.test_share:g} and data.validation_share"
            f" {data.validation_share:g} leave nothing to train on; set less than 1 together"
        )
    if data.test_share == 0 and not data.evaluation_prompts:
        return (
            "data.test_share: 0 holds nothing out; set a share above 0, or name"
            " data.evaluation_prompts"
        )
    return ""


def broken_source(source: SourceConfig) -> str:
    """What is wrong with a section of files, starting with its key; empty if nothing is."""
    columns: PromptColumns = getattr(source, "columns", PromptColumns())
    named = {
        "format": source.format != "auto",
        "reader": bool(source.reader),
        "columns": columns != type(columns)(),
    }
    ways = [key for key, is_named in named.items() if is_named]
    if len(ways) > 1:
        return f"{ways[1]}: {ways[0]} is named as well, and one of them says it all; remove one"
    verdicts = getattr(columns, "choice_values", ())
    if verdicts and (len(verdicts) not in (2, 3) or len(set(verdicts)) < len(verdicts)):
        return (
            f"columns.choice_values: found {list(verdicts)}; expected two or three different"
            " texts: what stands for candidate_0, for candidate_1 and, if it can, for a tie"
        )
    return ""


def _sources(recipe: Recipe) -> str:
    for key in ("demonstrations", "preferences", "prompts", "evaluation_prompts"):
        if broken := broken_source(getattr(recipe.data, key)):
            return f"data.{key}.{broken}"
    return ""


def _reward_source(recipe: Recipe) -> str:
    needs = recipe.policy.enabled and not recipe.policy.reward
    if needs and not recipe.reward.enabled:
        return (
            "reward.enabled: is false, and policy.reward names no ready reward, so that the policy"
            " stage has nothing to follow; set reward.enabled = true, policy.reward or"
            " policy.enabled = false"
        )
    return ""


def _preference_source(recipe: Recipe) -> str:
    trains_reward = recipe.reward.enabled and not recipe.policy.reward
    if not trains_reward or recipe.data.preferences or recipe.collect.annotator != "none":
        return ""
    return (
        "data.preferences: is empty, so that the reward model has nothing to learn from; name a"
        ' file of preferences, set collect.annotator = "simulated", give a ready policy.reward,'
        " or set reward.enabled = false and policy.enabled = false"
    )


def _minibatches(recipe: Recipe) -> str:
    policy = recipe.policy
    if policy.prompts_per_update % policy.ppo.minibatches == 0:
        return ""
    return (
        f"policy.ppo.minibatches: {policy.ppo.minibatches} does not divide the"
        f" {policy.prompts_per_update} prompts of an update (policy.prompts_per_update);"
        " change one of them"
    )


def _adaptive_kl(recipe: Recipe) -> str:
    kl, policy = recipe.policy.kl, recipe.policy
    if not kl.adaptive:
        return ""
    if kl.coef == 0:
        return "policy.kl.coef: 0 cannot be steered; start an adaptive penalty above 0"
    episodes = policy.prompts_per_update * policy.samples_per_prompt
    if kl.horizon <= episodes / 5:
        return (
            f"policy.kl.horizon: {kl.horizon} is too short for {episodes} episodes an update;"
            f" set more than {episodes // 5}"
        )
    return ""


def _one_source_of_preferences(recipe: Recipe) -> str:
    if not recipe.data.preferences or recipe.collect.annotator == "none":
        return ""
    return (
        f'collect.annotator: "{recipe.collect.annotator}" would collect nothing, because'
        ' data.preferences names a file; set collect.annotator = "none", or remove the file'
    )


def _best_of(recipe: Recipe) -> str:
    if recipe.evaluate.best_of != 1:
        return ""
    return "evaluate.best_of: best of 1 is no headroom check; set 0 to leave it out, or at least 2"


RULES: tuple[Callable[[Recipe], str], ...] = (
    _name,
    _base,
    _top_p,
    _top_k,
    _some_data,
    _built_in_task_has_no_files,
    _shares,
    _reward_source,
    _preference_source,
    _sources,
    _minibatches,
    _adaptive_kl,
    _one_source_of_preferences,
    _best_of,
)
"""Each returns what is wrong, starting with the key, or an empty text."""
