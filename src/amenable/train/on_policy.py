"""The loop of every on-policy algorithm: sample, score, measure, learn, log.

The learner decides what an update does with the experience; the loop knows no algorithm.
Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from amenable.data.annotator import SimulatedAnnotator
from amenable.data.collate import GroupBatch, PromptGroup, collate, seeded_epochs, split_groups
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Prompt
from amenable.errors import NumericsError, StageError
from amenable.losses.kl import k1, sequence_kl
from amenable.models.build import Foundation
from amenable.models.export import export_policy, load_reward_head
from amenable.models.logprobs import CompletionStates
from amenable.rollout.headroom import report_headroom
from amenable.rollout.rewards import Reward, RoleReward, ready_reward
from amenable.rollout.transformers_engine import RolloutCopy, TransformersEngine
from amenable.rollout.types import Request, Rollout, Sampling
from amenable.train.loop import Metrics, load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

EXACT = 1e-6  # ratio - 1 and KL at the first update must be below this
_SAMPLES_LOGGED = 8


@dataclass(frozen=True)
class Episode:
    """One sampled completion on its way through an update."""

    prompt: Prompt
    rollout: Rollout
    text: str


@dataclass(frozen=True)
class MicroBatch:
    """Episodes that pass through every model together, in every sweep of the update.

    Keeping the composition fixed keeps old, new and reference log-probabilities comparable to
    the last bit.
    """

    batch: GroupBatch
    episodes: tuple[Episode, ...]
    logprobs: Tensor
    """[N, C] under the policy that sampled."""
    ref_logprobs: Tensor
    """[N, C] under the reference."""
    entropy: Tensor
    """[N, C] nats of the sampling policy."""
    scores: Tensor
    """[N] centred proxy scores, clipped and with the penalty for a missing end applied."""
    states: CompletionStates | None
    """Of the reward model, where it is a role of this run."""

    @property
    def kl(self) -> Tensor:
        """[N, C] k1 estimates, policy against reference."""
        return k1(self.logprobs, self.ref_logprobs)

    @property
    def sequence_kl(self) -> Tensor:
        """[N] nats, summed over real tokens."""
        return sequence_kl(self.kl, self.batch.mask)


Minibatches = list[list[MicroBatch]]


class Learner(Protocol):
    """What an algorithm adds to the loop."""

    minibatches: int
    """Parts of a roll-out batch, each one optimizer step."""

    def learn(self, minibatches: Minibatches, update: int) -> Metrics:
        """Improve the policy on one roll-out batch."""
        ...

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and numbers, that a checkpoint must hold beside the policy."""
        ...

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        ...


@dataclass(frozen=True)
class PolicyRoles:
    """Who takes part."""

    foundation: Foundation
    policy: Role
    reference: Role
    reward: Reward
    reward_role: Role | None
    """The run's own reward model, from which a critic can start."""
    reward_offset: float = 0.0
    """What its raw scores are less by; a critic that starts from it is less by the same."""


def open_roles(ctx: StageContext) -> PolicyRoles:
    """Policy, reference and reward, from the run folder.

    The policy starts as a copy of the reference: the frozen SFT adapter, or the base.
    """
    foundation = Foundation.open(ctx.recipe)
    sft = ctx.folder.models / "sft"
    start = sft if sft.is_dir() else None
    policy = foundation.role("policy", start)
    reference = foundation.role("reference", start, train=False)
    data, source = ctx.recipe.data, ctx.recipe.policy.reward
    if source:
        ready = ready_reward(
            source,
            max_prompt_tokens=data.max_prompt_tokens,
            max_completion_tokens=data.max_completion_tokens,
        )
        return PolicyRoles(foundation, policy, reference, ready, None)
    folder = ctx.folder.models / "reward"
    if not folder.is_dir():
        raise StageError(
            f"{folder} is missing: run the reward stage first, or name a ready reward in "
            "policy.reward"
        )
    head, offset = load_reward_head(folder)
    reward_role = foundation.role("reward", folder, head=head, train=False)
    reward = RoleReward(reward_role, offset)
    return PolicyRoles(foundation, policy, reference, reward, reward_role, offset)


def run_on_policy(
    ctx: StageContext, make_learner: Callable[[StageContext, PolicyRoles], Learner]
) -> dict[str, Any]:
    """Run the policy stage with a learner and export `models/tuned`."""
    roles = open_roles(ctx)
    loop = _OnPolicyLoop(ctx, roles, make_learner(ctx, roles))
    loop.run()
    export_policy(
        roles.policy.model,
        roles.foundation.tokenizer,
        ctx.folder.models / "tuned",
        roles.policy.adapter,
        base=ctx.recipe.model.base,
        dtype=roles.foundation.dtype,
    )
    return loop.summary()


class _OnPolicyLoop:
    def __init__(self, ctx: StageContext, roles: PolicyRoles, learner: Learner) -> None:
        self._ctx, self._roles, self._learner = ctx, roles, learner
        config = ctx.recipe.policy
        self._sampling = Sampling(
            max_new_tokens=ctx.recipe.data.max_completion_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        self._sampling.check_trainable()
        self._prompts = open_prompts(ctx.folder.data / "prompts.train.jsonl")
        count = len(self._prompts)
        epochs = config.updates * config.prompts_per_update / count
        self._order = list(seeded_epochs(count, epochs, ctx.recipe.seed))
        simulated = ctx.recipe.collect.annotator == "simulated"
        self._gold = SimulatedAnnotator(ctx.recipe.collect, ctx.recipe.seed) if simulated else None
        self._copy = RolloutCopy(roles.policy)
        self._engine = TransformersEngine(
            self._copy.model,
            eos_ids=roles.foundation.renderer.eos_ids,
            pad_id=roles.foundation.renderer.pad_id,
            dtype=roles.foundation.dtype,
        )
        self._path = ctx.out / "checkpoints" / "last"
        self._history: list[Metrics] = []

    def run(self) -> None:
        """Every update that is left."""
        ctx, config = self._ctx, self._ctx.recipe.policy
        first = self._resume()
        if first == 0 and self._gold is not None and ctx.recipe.evaluate.best_of:
            self._copy.sync()
            report_headroom(ctx, self._engine, self._roles.foundation.renderer, self._gold)
        with ctx.progress.track(config.updates, "policy") as bar:
            bar.advance(first)
            for update in range(first, first if self._too_far() else config.updates):
                metrics = self._update(update)
                self._history.append(metrics)
                bar.advance(1, reward=metrics["reward"], kl=metrics["kl_loss"])
                done = update + 1
                last = done == config.updates or self._too_far() or ctx.deadline.exceeded()
                if last or done % config.checkpoint_every == 0:
                    self._save(done)
                ctx.refresh_report()
                if last:
                    self._say_why_it_ended(done)
                    break

    def _too_far(self) -> bool:
        """Whether the last update's sequence KL is above the recipe's limit."""
        limit = self._ctx.recipe.policy.stop_at_kl
        return bool(self._history) and 0 < limit < self._history[-1]["kl_loss"]

    def summary(self) -> dict[str, Any]:
        """The `policy` section of `summary.json`: means over first and last fifth of updates."""
        fifth = max(1, len(self._history) // 5)
        first, last = self._history[:fifth], self._history[-fifth:]

        def mean(rows: Sequence[Metrics], key: str) -> float:
            return sum(row[key] for row in rows) / len(rows)

        return {
            "algorithm": self._ctx.recipe.policy.algorithm,
            "updates": len(self._history),
            "episodes": round(self._history[-1]["episodes"]),
            "reward_first": mean(first, "reward"),
            "reward_last": mean(last, "reward"),
            "reward_rise_standard_errors": _rise(first, last),
            "kl_last": mean(last, "kl_loss"),
            "completion_tokens_mean": mean(last, "completion_tokens"),
        }

    def _update(self, update: int) -> Metrics:
        episodes = self._sample(update)
        minibatches = self._measure(episodes, update)
        metrics = _describe(minibatches, self._gold)
        metrics["episodes"] = float((update + 1) * len(episodes))
        if update == 0:
            _check_start(minibatches)
        self._ctx.log.samples(self._sample_rows(minibatches, update))
        metrics |= self._learner.learn(minibatches, update)
        self._ctx.log.write(update, **metrics)
        return metrics

    def _sample(self, update: int) -> list[Episode]:
        """Step 1: completions of this update's prompts, those of a prompt side by side."""
        config, renderer = self._ctx.recipe.policy, self._roles.foundation.renderer
        size = config.prompts_per_update
        chosen = [self._prompts[i] for i in self._order[update * size : (update + 1) * size]]
        prompts = [prompt for prompt in chosen for _ in range(config.samples_per_prompt)]
        requests = [
            Request(
                tuple(renderer.prompt_ids(prompt)),
                (self._ctx.recipe.seed, update, prompt.id, index % config.samples_per_prompt),
            )
            for index, prompt in enumerate(prompts)
        ]
        self._copy.sync()
        rollouts = self._engine.generate(requests, self._sampling)
        return [
            Episode(prompt, rollout, renderer.completion_text(rollout.completion_ids))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]

    def _measure(self, episodes: Sequence[Episode], update: int) -> Minibatches:
        """Step 2: scores and log-probabilities, in the micro-batches of the whole update."""
        config = self._ctx.recipe.policy
        size = config.samples_per_prompt
        grouped = [tuple(episodes[i : i + size]) for i in range(0, len(episodes), size)]
        order = list(seeded_epochs(len(grouped), 1, self._ctx.recipe.seed + update))
        parts = [order[i :: self._learner.minibatches] for i in range(self._learner.minibatches)]
        return [self._micro_batches([grouped[i] for i in part]) for part in parts if part]

    def _micro_batches(self, grouped: Sequence[tuple[Episode, ...]]) -> list[MicroBatch]:
        groups = [
            PromptGroup(own[0].rollout.prompt_ids, [e.rollout.completion_ids for e in own])
            for own in grouped
        ]
        parts = split_groups(groups, self._ctx.recipe.policy.micro_batch_tokens)
        return [
            self._micro_batch([groups[i] for i in part], [e for i in part for e in grouped[i]])
            for part in parts
        ]

    @torch.no_grad()
    def _micro_batch(
        self, groups: Sequence[PromptGroup], episodes: Sequence[Episode]
    ) -> MicroBatch:
        roles, temperature = self._roles, self._ctx.recipe.policy.temperature
        batch = collate(groups, roles.foundation.renderer.pad_id).to(roles.policy.device)
        policy = roles.policy.logprobs(batch, temperature=temperature, with_entropy=True)
        reference = roles.reference.logprobs(batch, temperature=temperature)
        scored = roles.reward.score(batch, [e.prompt for e in episodes], [e.text for e in episodes])
        assert policy.entropy is not None
        return MicroBatch(
            batch=batch,
            episodes=tuple(episodes),
            logprobs=policy.logprobs,
            ref_logprobs=reference.logprobs,
            entropy=policy.entropy,
            scores=self._shaped(scored.scores, episodes),
            states=scored.states,
        )

    def _shaped(self, scores: Tensor, episodes: Sequence[Episode]) -> Tensor:
        """Clip the scores and charge completions that did not end by themselves."""
        config = self._ctx.recipe.policy.ppo
        if config.score_clip:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        missing = scores.new_tensor([not episode.rollout.ended for episode in episodes])
        return scores - config.missing_eos_penalty * missing

    def _sample_rows(self, minibatches: Minibatches, update: int) -> list[dict[str, Any]]:
        rows = []
        for micro in (micro for minibatch in minibatches for micro in minibatch):
            figures = zip(
                micro.episodes, micro.scores.tolist(), micro.sequence_kl.tolist(), strict=True
            )
            for episode, score, kl in figures:
                row = {
                    "step": update,
                    "prompt": episode.prompt.text,
                    "completion": episode.text,
                    "score": score,
                    "kl": kl,
                    "ended": episode.rollout.ended,
                }
                if self._gold is not None:
                    row["gold"] = self._gold.score(episode.prompt, episode.text)
                rows.append(row)
        return rows[:: max(1, len(rows) // _SAMPLES_LOGGED)][:_SAMPLES_LOGGED]

    def _save(self, done: int) -> None:
        tensors, numbers = self._learner.state()
        save_checkpoint(
            self._path,
            {"policy": self._roles.policy.state(), **tensors},
            {"updates": done, "history": self._history, **numbers},
        )

    def _resume(self) -> int:
        saved = load_checkpoint(self._path)
        if saved is None:
            self._ctx.log.truncate(-1)
            return 0
        tensors, numbers = saved
        self._roles.policy.load_state(tensors["policy"])
        self._learner.load_state(tensors, numbers)
        self._history = numbers["history"]
        done = int(numbers["updates"])
        self._ctx.log.truncate(done - 1)
        self._ctx.progress.say(f"policy: resumed after update {done}")
        return done

    def _say_why_it_ended(self, done: int) -> None:
        config = self._ctx.recipe.policy
        if self._too_far():
            self._ctx.progress.say(
                f"policy: stopped after update {done}: sequence KL is above "
                f"policy.stop_at_kl = {config.stop_at_kl}"
            )
        elif done < config.updates:
            self._ctx.progress.say(f"policy: time is up after {done} of {config.updates} updates")


def _check_start(minibatches: Minibatches) -> None:
    """At update 0 policy and reference are the same weights: their log-probabilities must be too.

    Raises:
        NumericsError: they are not.
    """
    worst = max(
        float((micro.logprobs - micro.ref_logprobs).abs().max())
        for minibatch in minibatches
        for micro in minibatch
    )
    if worst > EXACT:
        raise NumericsError(
            "before the first update the policy's log-probabilities differ from the reference's "
            f"by up to {worst:.2g} nats a token (allowed: {EXACT:g}). They must be the same "
            "weights in the same forward pass; is dropout off, and was models/sft changed by hand?"
        )


def _describe(minibatches: Minibatches, gold: SimulatedAnnotator | None) -> Metrics:
    """Metrics of the sampled episodes, before anything is learnt from them."""
    micros = [micro for minibatch in minibatches for micro in minibatch]
    episodes = [episode for micro in micros for episode in micro.episodes]
    scores = torch.cat([micro.scores for micro in micros])
    kl = torch.cat([micro.sequence_kl for micro in micros])
    tokens = sum(int(micro.batch.mask.sum()) for micro in micros)
    count = len(episodes)
    metrics = {
        "reward": float(scores.mean()),
        "reward_se": _clustered_error(scores, [episode.prompt.id for episode in episodes]),
        "kl_loss": float(kl.mean()),
        "entropy": sum(float(micro.entropy.sum()) for micro in micros) / tokens,
        "eos_rate": sum(episode.rollout.ended for episode in episodes) / count,
        "completion_tokens": tokens / count,
    }
    if gold is not None:
        metrics["gold"] = sum(gold.score(e.prompt, e.text) for e in episodes) / count
    return metrics


def _clustered_error(scores: Tensor, prompts: Sequence[str]) -> float:
    """Standard error of the mean score; samples of one prompt are not independent.

    Source: Miller 2024, arXiv:2411.00640, clustered standard errors (equal sizes: the spread of
    the clusters' means).
    """
    own: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        own.setdefault(prompt, []).append(score)
    means = torch.tensor([sum(values) / len(values) for values in own.values()])
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else 0.0


def _rise(first: Sequence[Metrics], last: Sequence[Metrics]) -> float | None:
    """Difference of the mean rewards in standard errors of it."""

    def mean_and_variance(rows: Sequence[Metrics]) -> tuple[float, float]:
        return (
            sum(row["reward"] for row in rows) / len(rows),
            sum(row["reward_se"] ** 2 for row in rows) / len(rows) ** 2,
        )

    (before, var_before), (after, var_after) = mean_and_variance(first), mean_and_variance(last)
    spread = math.sqrt(var_before + var_after)
    return (after - before) / spread if spread else None
