"""What each stage computes: passes over tokens, decoding steps, copies and files.

The counting follows the stages' own code: rows are grouped by `data.collate.micro_batches`, and a
batch that is decoded shrinks as `rollout.transformers_engine` lets it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from amenable.config.needs import learns_from_preferences, trains_reward
from amenable.config.preference import PreferenceConfig
from amenable.config.recipe import Recipe
from amenable.config.reward import RewardConfig
from amenable.config.sft import SFTConfig
from amenable.data.collate import packs
from amenable.plan.rows import Lengths, Rows

Supervised = SFTConfig | RewardConfig | PreferenceConfig
"""Settings of a stage that learns from rows that exist."""

_DRAWS = 8  # batches that are laid out, of which the mean is taken
_DECODED_TOGETHER = 128  # by the engine, unless a stage says otherwise
_KEEP = 0.75
_SCORING_TOKENS = 2048
_OFFSET_ROWS = 64
_TUNED_SAMPLES = 64
_GATE = (60, 60 * 250)  # passes of the numerics gate, and their tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sums over a stage; tokens count padding."""

    forward_passes: float = 0
    forward_tokens: float = 0
    train_passes: float = 0
    train_tokens: float = 0
    decode_steps: float = 0
    decode_tokens: float = 0
    """Sequences in the batch, summed over the steps."""
    optimizer_steps: float = 0
    merges: float = 0
    """How often the roll-out copy takes over the policy's weights."""
    models_read: float = 0
    models_written: float = 0
    fixed_s: float = 0
    """Seconds that no model computes in."""

    def __add__(self, other: Work) -> Work:
        names = [entry.name for entry in fields(self)]
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __mul__(self, times: float) -> Work:
        names = [entry.name for entry in fields(self)]
        return Work(**{name: getattr(self, name) * times for name in names})

    @property
    def tokens(self) -> float:
        """Tokens that went through a model, in whatever way."""
        return self.forward_tokens + self.train_tokens + self.decode_tokens


def stage_work(stage: str, recipe: Recipe, rows: Rows) -> Work:
    """The work of a stage that is on."""
    count: Callable[[Recipe, Rows], Work] = {
        "data": _data,
        "sft": _sft,
        "collect": _collect,
        "reward": _reward,
        "policy": _off_policy if learns_from_preferences(recipe) else _on_policy,
        "evaluate": _evaluate,
    }.get(stage, lambda *_: Work(fixed_s=0.2))
    return count(recipe, rows)


def longest_micro_batch(rows: Sequence[Lengths], budget: int, batch: int) -> tuple[int, int]:
    """Rows and mean length of the micro-batch with the most tokens among batches of a sample.

    Padding is not counted: on a CPU there is none, elsewhere rows of like length stand together.
    """
    shapes = []
    for draw in _drawn(rows, batch):
        lengths = [sum(row) for row in draw]
        for part in packs(lengths, budget):
            tokens = sum(lengths[i] for i in part)
            shapes.append((len(part), math.ceil(tokens / len(part))))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def grouped(recipe: Recipe, rows: Rows) -> list[Lengths]:
    """Prompts with as many completions as an update samples of each."""
    draw, answers = random.Random(0), rows.completions or [recipe.data.max_completion_tokens]
    count = recipe.policy.samples_per_prompt
    return [(row[0], *draw.choices(answers, k=count)) for row in rows.lengths["prompts"]]


def token_means(recipe: Recipe, rows: Rows) -> tuple[float, float]:
    """Tokens that a token attends to, and the share that the output projection reads."""
    groups = grouped(recipe, rows)
    total = sum(map(sum, groups))
    return total / len(groups) / 2, sum(sum(row[1:]) for row in groups) / total


def decoding(completions: Sequence[int]) -> tuple[int, int]:
    """Steps after the first token of a batch, and sequences in it summed over these steps."""
    active, total, longest = len(completions), 0, max(completions)
    for step in range(1, longest):
        alive = sum(length > step for length in completions)
        active = alive if alive <= _KEEP * active else active
        total += active
    return longest - 1, total


def _drawn(rows: Sequence[Lengths], count: int) -> list[list[Lengths]]:
    """A few batches of rows, drawn with a fixed seed."""
    draw = random.Random(0)
    return [draw.choices(rows, k=max(1, count)) for _ in range(_DRAWS)]


def _passes(rows: Sequence[Lengths], count: int, budget: int) -> tuple[float, float]:
    """Forward passes over `count` rows drawn from a sample, and their tokens."""
    passes, tokens = 0, 0
    for draw in _drawn(rows, min(count, 512)):
        lengths = [sum(row) for row in draw]
        passes += len(packs(lengths, budget))
        tokens += sum(lengths)
    scale = count / max(1, min(count, 512)) / _DRAWS
    return passes * scale, tokens * scale


def _forward(rows: Sequence[Lengths], count: int, budget: int) -> Work:
    passes, tokens = _passes(rows, count, budget) if count and rows else (0, 0)
    return Work(forward_passes=passes, forward_tokens=tokens)


def _train(rows: Sequence[Lengths], count: int, budget: int) -> Work:
    passes, tokens = _passes(rows, count, budget) if count and rows else (0, 0)
    return Work(train_passes=passes, train_tokens=tokens, optimizer_steps=1)


def _decode(
    prompts: Sequence[Lengths],
    asked: int,
    samples: int,
    completions: Sequence[int],
    together: int = _DECODED_TOGETHER,
) -> Work:
    """Sampling `samples` completions of each of `asked` prompts in sorted batches."""
    if not asked:
        return Work()
    draw = random.Random(0)
    lengths = sorted((draw.choice(prompts)[0] for _ in range(asked)), reverse=True)
    size = max(1, together // samples)
    work = Work()
    for start in range(0, asked, size):
        part = lengths[start : start + size]
        steps, total = decoding(draw.choices(completions, k=len(part) * samples))
        work += Work(
            forward_passes=1,
            forward_tokens=len(part) * part[0],
            decode_steps=steps,
            decode_tokens=total,
        )
    return work


def _data(recipe: Recipe, rows: Rows) -> Work:
    harvest = 20.0 if recipe.data.task == "docstrings" else 0.0
    return Work(fixed_s=harvest + 0.2 + 1e-4 * sum(rows.counts.values()))


def _supervised(config: Supervised, rows: Rows, kind: str) -> Work:
    """Optimizer steps and evaluations of `train.loop.train_supervised`."""
    count, sample = rows[f"{kind}.train"], rows.lengths[kind]
    steps = math.ceil(round(count * config.epochs) / config.batch_size)
    steps = min(steps, config.max_steps or steps)
    step = _train(sample, min(count, config.batch_size), config.micro_batch_tokens)
    check = _forward(sample, rows[f"{kind}.validation"], config.micro_batch_tokens)
    return step * steps + check * config.evaluations


_STAGE = Work(models_read=1, models_written=1, fixed_s=0.6)


def _sft(recipe: Recipe, rows: Rows) -> Work:
    return _supervised(recipe.sft, rows, "demonstrations") + _STAGE


def _collect(recipe: Recipe, rows: Rows) -> Work:
    asked = rows["prompts.collect"] + rows["prompts.test"]
    sampled = _decode(rows.lengths["prompts"], asked, 2, _completions(recipe, rows))
    return sampled + Work(models_read=1, fixed_s=0.1)


def _reward(recipe: Recipe, rows: Rows) -> Work:
    budget, pairs = recipe.reward.micro_batch_tokens, rows.lengths["preferences"]
    judged = _forward(pairs, rows["preferences.test"], budget)
    kind = "demonstrations" if "demonstrations" in rows.lengths else "preferences"
    offset = _forward(rows.lengths[kind], min(_OFFSET_ROWS, rows[f"{kind}.train"]), budget)
    return _supervised(recipe.reward, rows, "preferences") + judged + offset + _STAGE


@dataclass(frozen=True, kw_only=True)
class UpdateWork:
    """One update of an on-policy algorithm."""

    sampling: Work
    """Roll-outs, the reading of prompts included."""
    measuring: Work
    """Sweeps without a gradient: policy, reference, reward model, critic."""
    learning: Work
    """Passes of policy and critic."""

    @property
    def total(self) -> Work:
        """All of it."""
        return self.sampling + self.measuring + self.learning


def on_policy_update(recipe: Recipe, rows: Rows) -> UpdateWork:
    """What an update of `train.on_policy` computes."""
    policy, prompts = recipe.policy, rows.lengths["prompts"]
    completions, budget = _completions(recipe, rows), policy.micro_batch_tokens
    each = max(1, round(policy.prompts_per_update / policy.minibatches))
    groups = grouped(recipe, rows)
    sampled = _decode(prompts, policy.prompts_per_update, policy.samples_per_prompt, completions)
    critic = has_critic(recipe)
    sweeps = 2 + trains_reward(recipe) + critic
    step = _train(groups, each, budget) * policy.minibatches
    learnt = step * policy.epochs
    if critic:
        learnt += step * (policy.ppo.critic_epochs or policy.epochs)
    return UpdateWork(
        sampling=sampled + Work(merges=1),
        measuring=_forward(groups, each, budget) * (policy.minibatches * sweeps),
        learning=learnt,
    )


def has_critic(recipe: Recipe) -> bool:
    """A critic with weights of its own."""
    return recipe.policy.algorithm == "ppo" and recipe.policy.ppo.critic == "adapter"


def _on_policy(recipe: Recipe, rows: Rows) -> Work:
    policy, prompts = recipe.policy, rows.lengths["prompts"]
    completions = _completions(recipe, rows)
    work = on_policy_update(recipe, rows).total * policy.updates
    work += _STAGE + Work(models_read=1, fixed_s=0.3)
    if policy.gate:
        work += Work(forward_passes=_GATE[0], forward_tokens=_GATE[1], merges=2)
    if asked := rows["prompts.validation"]:
        checkpoints = 1 + math.ceil(policy.updates / policy.checkpoint_every)
        work += (_decode(prompts, asked, 1, completions) + Work(merges=1)) * checkpoints
    if recipe.collect.annotator == "simulated" and recipe.evaluate.best_of:
        asked = min(recipe.evaluate.best_of_prompts, rows["prompts.train"])
        work += _decode(prompts, asked, 1, completions)
        work += _decode(prompts, asked, recipe.evaluate.best_of, completions)
    return work


def _off_policy(recipe: Recipe, rows: Rows) -> Work:
    policy, pairs = recipe.policy, rows.lengths["preferences"]
    config, algorithm = policy.preference, policy.algorithm
    work = _supervised(config, rows, "preferences") + _STAGE + Work(models_read=1, fixed_s=0.3)
    compared = algorithm not in ("simpo", "orpo")
    everything = rows["preferences.train"] + rows["preferences.validation"]
    reference = _forward(pairs, everything, config.micro_batch_tokens)
    twice = algorithm == "kto"  # mismatched completions, under the reference and the policy
    work += reference * (compared + 2 * twice)
    if policy.gate:
        work += Work(forward_passes=_GATE[0], forward_tokens=_GATE[1], merges=2)
    asked = min(_TUNED_SAMPLES, rows["prompts.train"])
    sampled = _decode(rows.lengths["prompts"], asked, 1, _completions(recipe, rows))
    return work + sampled + _forward(pairs, asked, config.micro_batch_tokens) * 2


def _evaluate(recipe: Recipe, rows: Rows) -> Work:
    config, prompts, asked = recipe.evaluate, rows.lengths["prompts"], rows["prompts.test"]
    tuned = _completions(recipe, rows)
    untuned = [recipe.data.max_completion_tokens]
    systems = [untuned, *([tuned] if rows["demonstrations.train"] and recipe.sft.enabled else [])]
    systems += [tuned] if recipe.policy.enabled else []
    work = Work(models_read=1, fixed_s=0.3 + 5e-4 * config.bootstrap_samples * len(systems))
    for number, completions in enumerate(systems):
        work += _decode(prompts, asked, 1, completions, config.batch_size) + Work(models_read=1)
        if number:
            diverse = min(asked, config.diversity_prompts)
            work += _decode(prompts, diverse, 1, completions, config.batch_size)
    if trains_reward(recipe):
        answered = [(row[0], *(_mean(of) for of in systems)) for row in prompts]
        work += _forward(answered, asked, _SCORING_TOKENS)
    return work


def _completions(recipe: Recipe, rows: Rows) -> list[int]:
    """Tokens of sampled completions: as long as the data's, after training on them."""
    return rows.completions or [recipe.data.max_completion_tokens]


def _mean(numbers: Sequence[int]) -> int:
    return round(sum(numbers) / len(numbers))
