"""Rules that a recipe must keep beyond its types: ranges, and values that must fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amenable.algorithms import ALGORITHMS, kl_placement
from amenable.config.data import PromptColumns, SourceConfig
from amenable.config.needs import (
    follows_reward,
    learns_from_preferences,
    needs_preferences,
)
from amenable.config.policy import GATE_CHECKS
from amenable.config.ray import RAY_STAGES
from amenable.config.recipe import Recipe
from amenable.config.rewards import broken_rewards, uses_own_reward
from amenable.errors import RecipeError
from amenable.health.rules import RULES as HEALTH_RULES


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have; both ends belong to it unless `above` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """`low` itself is excluded."""
    below: bool = False
    """`high` itself is excluded."""

    def holds(self, value: float) -> bool:
        """True when the value is allowed."""
        low_ok = value > self.low if self.above else value >= self.low
        return low_ok and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


TRACKERS = ("wandb", "mlflow", "trackio")
"""Rows of `amenable/trackers.py`."""

VLLM_HEAT = Range(0.01, 2.0)
"""Temperatures that vLLM takes as they are."""

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
    "sft.micro_batch_tokens": ANY,
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
    "reward.micro_batch_tokens": ANY,
    "reward.evaluations": COUNT,
    "reward.label_smoothing": Range(0, 0.499),
    "reward.centring_coef": ANY,
    "reward.heads": Range(1, 64),
    "policy.updates": COUNT,
    "policy.max_reward_failures": SHARE,
    "policy.prompts_per_update": COUNT,
    "policy.samples_per_prompt": COUNT,
    "policy.temperature": POSITIVE,
    "policy.learning_rate": POSITIVE,
    "policy.final_learning_rate_fraction": SHARE,
    "policy.max_grad_norm": POSITIVE,
    "policy.micro_batch_tokens": ANY,
    "policy.stop_at_kl": ANY,
    "policy.checkpoint_every": COUNT,
    "checkpoint.every_minutes": ANY,
    "checkpoint.keep_last": COUNT,
    "policy.kl.coef": ANY,
    "policy.kl.target": POSITIVE,
    "policy.kl.horizon": COUNT,
    "policy.epochs": COUNT,
    "policy.minibatches": COUNT,
    "policy.clip_range": SHARE,
    "policy.clip_range_high": ANY,
    "policy.dual_clip": ANY,
    "policy.entropy_coef": ANY,
    "policy.ppo.value_clip_range": POSITIVE,
    "policy.ppo.critic_learning_rate": POSITIVE,
    "policy.ppo.critic_epochs": ANY,
    "policy.ppo.critic_warmup_updates": ANY,
    "policy.ppo.gamma": Range(0, 1, above=True),
    "policy.ppo.gae_lambda": SHARE,
    "policy.vllm.cache_gb": POSITIVE,
    "policy.vllm.ratio_cap": ANY,
    "policy.missing_eos_penalty": ANY,
    "policy.score_clip": ANY,
    "policy.disagreement_coef": ANY,
    "policy.max_approx_kl": POSITIVE,
    "policy.preference.beta": POSITIVE,
    "policy.preference.label_smoothing": Range(0, 0.5, below=True),
    "policy.preference.flip_rate": Range(0, 0.5, below=True),
    "policy.preference.simpo_beta": POSITIVE,
    "policy.preference.simpo_margin": ANY,
    "policy.preference.orpo_weight": ANY,
    "policy.preference.desirable_weight": POSITIVE,
    "policy.preference.undesirable_weight": POSITIVE,
    "policy.preference.sft_coef": ANY,
    "policy.preference.epochs": POSITIVE,
    "policy.preference.max_steps": ANY,
    "policy.preference.batch_size": COUNT,
    "policy.preference.learning_rate": POSITIVE,
    "policy.preference.warmup_fraction": SHARE,
    "policy.preference.max_grad_norm": POSITIVE,
    "policy.preference.weight_decay": ANY,
    "policy.preference.micro_batch_tokens": ANY,
    "policy.preference.evaluations": COUNT,
    "kfp.gpus": ANY,
    "kfp.retries": ANY,
    "evaluate.temperature": ANY,
    "evaluate.batch_size": COUNT,
    "evaluate.bootstrap_samples": COUNT,
    "evaluate.best_of": ANY,
    "evaluate.best_of_prompts": COUNT,
    "evaluate.diversity_prompts": ANY,
    "ray.workers": COUNT,
    "ray.cpus_per_worker": POSITIVE,
    "ray.gpus_per_worker": ANY,
    "ray.max_failures": Range(-1),
    **{f"ray.{stage}.workers": ANY for stage in RAY_STAGES},
    **{f"ray.{stage}.cpus_per_worker": ANY for stage in RAY_STAGES},
    **{f"ray.{stage}.gpus_per_worker": Range(-1) for stage in RAY_STAGES},
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


def lookup(section: Any, key: str) -> Any:
    """The value, or the section, under a dotted key of the recipe or of a section."""
    value: Any = section
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


def _shard(recipe: Recipe) -> str:
    """Why weights cannot be spread over processes."""
    model = recipe.model
    if model.shard == "none" or not model.lora.enabled:
        return ""
    return (
        f'model.shard: "{model.shard}" spreads weights that are trained, and with LoRA the base is '
        'frozen and every process holds it; set model.lora.enabled = false, or model.shard = "none"'
    )


def _quantise(recipe: Recipe) -> str:
    model = recipe.model
    if model.quantise == "none" or model.lora.enabled:
        return ""
    return (
        f'model.quantise: "{model.quantise}" freezes the base, and model.lora.enabled = false'
        ' trains every weight; set model.lora.enabled = true, or model.quantise = "none"'
    )


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
    needs = follows_reward(recipe) and uses_own_reward(recipe.policy)
    if needs and not recipe.reward.enabled:
        return (
            "reward.enabled: is false, and policy.reward names no ready reward, so that the policy"
            " stage has nothing to follow; set reward.enabled = true, policy.reward or"
            " policy.enabled = false"
        )
    return ""


def _preference_source(recipe: Recipe) -> str:
    if recipe.data.preferences or recipe.collect.annotator != "none":
        return ""
    if not needs_preferences(recipe):
        return ""
    if learns_from_preferences(recipe):
        return (
            f"data.preferences: is empty, so that {recipe.policy.algorithm} has nothing to learn"
            ' from; name a file of preferences, set collect.annotator = "simulated", or choose a'
            " policy.algorithm that samples"
        )
    return (
        "data.preferences: is empty, so that the reward model has nothing to learn from; name a"
        ' file of preferences, set collect.annotator = "simulated", give a ready policy.reward,'
        " or set reward.enabled = false and policy.enabled = false"
    )


def _kto_batch(recipe: Recipe) -> str:
    policy = recipe.policy
    if policy.algorithm != "kto" or policy.preference.batch_size > 1:
        return ""
    return (
        "policy.preference.batch_size: 1 leaves kto without a second prompt for its reference"
        " point; set at least 2"
    )


def _minibatches(recipe: Recipe) -> str:
    policy = recipe.policy
    if policy.prompts_per_update % policy.minibatches == 0 or not follows_reward(recipe):
        return ""
    return (
        f"policy.minibatches: {policy.minibatches} does not divide the"
        f" {policy.prompts_per_update} prompts of an update (policy.prompts_per_update);"
        " change one of them"
    )


def _adaptive_kl(recipe: Recipe) -> str:
    kl, policy = recipe.policy.kl, recipe.policy
    if kl.controller == "fixed":
        return ""
    if kl.coef == 0:
        return "policy.kl.coef: 0 cannot be steered; start the penalty above 0"
    if kl_placement(policy) == "none" and ALGORITHMS[policy.algorithm].learns_from == "prompts":
        return (
            f"policy.kl.controller: {policy.algorithm} has no KL penalty to steer; set"
            " policy.kl.placement, or remove the key"
        )
    episodes = policy.prompts_per_update * policy.samples_per_prompt
    if kl.controller == "adaptive" and kl.horizon <= episodes / 5:
        return (
            f"policy.kl.horizon: {kl.horizon} is too short for {episodes} episodes an update;"
            f" set more than {episodes // 5}"
        )
    return ""


def _groups(recipe: Recipe) -> str:
    policy = recipe.policy
    if policy.samples_per_prompt >= 2 or not ALGORITHMS[policy.algorithm].needs_groups:
        return ""
    return (
        f"policy.samples_per_prompt: {policy.algorithm} compares the completions of a prompt; set"
        " at least 2"
    )


def _online_beta(recipe: Recipe) -> str:
    policy = recipe.policy
    if policy.algorithm != "online-dpo":
        return ""
    if policy.kl.coef == 0:
        return "policy.kl.coef: is online-dpo's beta, and must be above 0"
    if policy.kl.controller == "target":
        return (
            'policy.kl.controller: "target" may let the weight fall to 0, which online-dpo\'s beta'
            ' must not be; set "fixed" or "adaptive"'
        )
    return ""


def _disagreement(recipe: Recipe) -> str:
    own = uses_own_reward(recipe.policy)
    if not recipe.policy.disagreement_coef or (own and recipe.reward.heads > 1):
        return ""
    return (
        "policy.disagreement_coef: needs the run's own reward model with several heads; set"
        " reward.heads to at least 2, or remove the key"
    )


def _head_critic(recipe: Recipe) -> str:
    policy = recipe.policy
    wanted = policy.algorithm == "ppo" and policy.ppo.critic == "head"
    if not wanted or not follows_reward(recipe) or uses_own_reward(policy):
        return ""
    return (
        'policy.ppo.critic: "head" reads the states of the run\'s own reward model, and the policy'
        ' follows another; set "adapter"'
    )


def _selection(recipe: Recipe) -> str:
    by = recipe.policy.selection.by
    watched = [part.label for part in recipe.policy.rewards if part.kind != "own"]
    if by in ("auto", "last", *watched):
        return ""
    if by == "annotator":
        if recipe.collect.annotator == "simulated":
            return ""
        return (
            'policy.selection.by: "annotator" needs collect.annotator = "simulated"; name one of'
            ' policy.rewards, or set "last"'
        )
    choices = ", ".join(["auto", "annotator", *watched, "last"])
    return f"policy.selection.by: {by!r} scores nothing here; choose from {choices}"


def _health(recipe: Recipe) -> str:
    known = [rule.id for rule in HEALTH_RULES]
    for key, extra in (("stop_on", ["errors"]), ("off", [])):
        for name in getattr(recipe.health, key):
            if name not in known + extra:
                return f"health.{key}: {name!r} is no rule; choose from {', '.join(extra + known)}"
    return ""


def _trackers(recipe: Recipe) -> str:
    for name in recipe.trackers:
        if name not in TRACKERS:
            return f"trackers: {name!r} is no tracker; choose from {', '.join(TRACKERS)}"
    return ""


def _vllm(recipe: Recipe) -> str:
    policy, model = recipe.policy, recipe.model
    if policy.engine != "vllm" or not policy.enabled:
        return ""
    if not follows_reward(recipe):
        return (
            f"policy.engine: {policy.algorithm} learns from preferences and rolls nothing out;"
            " remove the key"
        )
    if model.quantise != "none":
        return (
            f'policy.engine: "vllm" samples with whole weights, which a base in {model.quantise}'
            ' does not have; set policy.engine = "own" or model.quantise = "none"'
        )
    if model.dtype == "fp64":
        return 'policy.engine: "vllm" has no fp64; set policy.engine = "own" or another model.dtype'
    for key, heat in (
        ("policy.temperature", policy.temperature),
        ("evaluate.temperature", recipe.evaluate.temperature),
    ):
        if not (VLLM_HEAT.holds(heat) or (key != "policy.temperature" and heat == 0)):
            return f"{key}: {heat:g} is out of what vLLM samples at; set {VLLM_HEAT}"
    if 0 < policy.vllm.ratio_cap < 1:
        return (
            f"policy.vllm.ratio_cap: {policy.vllm.ratio_cap:g} would hold every token's weight"
            " below 1; set at least 1, or 0 to leave the weight out"
        )
    return ""


def _gate_skip(recipe: Recipe) -> str:
    unknown = [name for name in recipe.policy.gate_skip if name not in GATE_CHECKS]
    if not unknown:
        return ""
    return f"policy.gate_skip: {unknown[0]!r} is no check; choose from {', '.join(GATE_CHECKS)}"


def _dual_clip(recipe: Recipe) -> str:
    if recipe.policy.dual_clip == 0 or recipe.policy.dual_clip > 1:
        return ""
    return (
        f"policy.dual_clip: must be above 1, or 0 to leave it out, not {recipe.policy.dual_clip:g}"
    )


def _one_source_of_preferences(recipe: Recipe) -> str:
    if not recipe.data.preferences or recipe.collect.annotator == "none":
        return ""
    return (
        f'collect.annotator: "{recipe.collect.annotator}" would collect nothing, because'
        ' data.preferences names a file; set collect.annotator = "none", or remove the file'
    )


def _judge(recipe: Recipe) -> str:
    collect = recipe.collect
    if collect.annotator != "judge":
        named = next((key for key in ("judge", "judge_audit") if getattr(collect, key)), "")
        wanted = 'set collect.annotator = "judge", or remove the key'
        return f"collect.{named}: would not be asked; {wanted}" if named else ""
    if not collect.judge:
        return (
            "collect.judge: is empty; name who chooses: a service's URL, a model, a reward model's"
            " folder or a function"
        )
    if collect.judge.startswith(("http://", "https://")) and not collect.judge_model:
        return "collect.judge_model: is empty; name the model that the service shall ask"
    return ""


def _best_of(recipe: Recipe) -> str:
    if recipe.evaluate.best_of != 1:
        return ""
    return "evaluate.best_of: best of 1 is no headroom check; set 0 to leave it out, or at least 2"


def _kfp(recipe: Recipe) -> str:
    kfp = recipe.kfp
    if not kfp.image.strip():
        return "kfp.image: is empty; name the container image that the cluster shall pull"
    if not kfp.mount.startswith("/"):
        return f"kfp.mount: {kfp.mount!r} is no place in a container; give a path from / on"
    if kfp.memory and not re.fullmatch(r"\d+([KMGTPE]i?)?", kfp.memory):
        return f"kfp.memory: {kfp.memory!r} is no amount of memory; write for example 16G"
    if kfp.cpu and not re.fullmatch(r"(\d*\.)?\d+m?", kfp.cpu):
        return f"kfp.cpu: {kfp.cpu!r} is no number of CPUs; write for example 4"
    return ""


RULES: tuple[Callable[[Recipe], str], ...] = (
    _name,
    _base,
    _quantise,
    _shard,
    _top_p,
    _top_k,
    _some_data,
    _built_in_task_has_no_files,
    _shares,
    lambda recipe: broken_rewards(recipe.policy),
    _reward_source,
    _preference_source,
    _sources,
    _minibatches,
    _adaptive_kl,
    _groups,
    _dual_clip,
    _online_beta,
    _disagreement,
    _head_critic,
    _gate_skip,
    _vllm,
    _selection,
    _health,
    _trackers,
    _kto_batch,
    _one_source_of_preferences,
    _judge,
    _best_of,
    _kfp,
)
"""Each returns what is wrong, starting with the key, or an empty text."""
