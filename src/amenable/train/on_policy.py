"""The loop of every on-policy algorithm: sample, score, measure, learn, log.

The learner decides what an update does with the experience; the loop knows no algorithm.
Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from amenable.algorithms import ALGORITHMS, kl_placement
from amenable.artifacts import write_json
from amenable.config.needs import selects_by
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.collate import GroupBatch, PromptGroup, collate, seeded_epochs
from amenable.data.row_file import open_prompts
from amenable.errors import NumericsError, StageError
from amenable.models.export import export_policy
from amenable.models.heads import HeadEnsemble
from amenable.models.logprobs import scatter
from amenable.ranks import group as ranks
from amenable.rollout.copies import open_copy
from amenable.rollout.rewards import score_groups
from amenable.rollout.transformers_engine import RolloutCopy
from amenable.rollout.types import Request, Sampling, uniform_noise
from amenable.train.best_checkpoint import open_best_checkpoint
from amenable.train.checkpoints import Checkpoints, restored
from amenable.train.experience import (
    Episode,
    MicroBatch,
    Minibatches,
    describe,
    episode_groups,
    flat,
    sample_rows,
)
from amenable.train.gate import run_gate
from amenable.train.headroom import report_headroom
from amenable.train.loop import Metrics
from amenable.train.passes import EXACT
from amenable.train.penalty import KLController
from amenable.train.policy_roles import PolicyRoles, open_roles
from amenable.train.scoring import Scorer

if TYPE_CHECKING:
    from torch import Tensor

    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

_SAMPLES_LOGGED = 10
_MOST_GAP = 0.5  # nats a token, root mean square, at temperature 1; bfloat16 has up to 0.1
_ERRORS_BELOW_ZERO = 4.0


class Learner(Protocol):
    """What an algorithm adds to the loop."""

    sampler: str
    """Who samples: "policy", or "reference", which never moves."""
    critic_role: Role | None
    """A critic that the numerics gate checks as well."""

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """Improve the policy on one roll-out batch."""
        ...

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and numbers, that a checkpoint must hold beside the policy."""
        ...

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        ...


def run_on_policy(
    ctx: StageContext, make_learner: Callable[[StageContext, PolicyRoles], Learner]
) -> dict[str, Any]:
    """Run the policy stage with a learner and export `models/tuned`."""
    roles = open_roles(ctx)
    loop = _OnPolicyLoop(ctx, roles, make_learner(ctx, roles))
    try:
        loop.run()
    finally:
        loop.close()
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
        self._copy = open_copy(
            roles.foundation,
            roles.reference if learner.sampler == "reference" else roles.policy,
        )
        self._engine = self._copy.engine(roles.foundation.renderer)
        self._scorer = Scorer(ctx, roles)
        self._best = open_best_checkpoint(ctx, roles, self._copy, self._gold)
        self._chosen: int | None = None
        self._kl = KLController(config)
        self._checkpoints = Checkpoints(ctx)
        self._history: list[Metrics] = []
        self._measured = 0
        """Updates of the last candidate."""
        self._warned = False

    def run(self) -> None:
        """Every update that is left.

        Raises:
            KeyboardInterrupt: `ctx.stop` was asked; a checkpoint of the last update is written.
        """
        ctx, config = self._ctx, self._ctx.recipe.policy
        first = self._resume()
        if first is None:
            self._prepare()
            first = 0
            if self._checkpoints.due():
                self._save(first)
        with ctx.stop.held_up(), ctx.progress.track(config.updates, "policy", first) as bar:
            for update in range(first, first if self._ended(first) else config.updates):
                metrics = self._update(update)
                self._history.append(metrics)
                bar.advance(1, reward=metrics["reward"], kl=metrics["kl_loss"])
                done = update + 1
                if ctx.stop.asked:
                    self._save(done)
                    ctx.stop.obey()
                late = not self._ended(done) and ctx.deadline.exceeded()
                if late or self._is_candidate(done):
                    self._measure_candidate(done)
                    self._save(done)
                elif self._checkpoints.due():
                    self._save(done)
                ctx.refresh_report()
                if late or self._ended(done):
                    self._say_why_it_ended(done)
                    break
        if self._best is not None:
            self._chosen = self._best.finish()

    def close(self) -> None:
        """Give back what only roll-outs need."""
        self._copy.close()

    def _ended(self, done: int) -> bool:
        return done == self._ctx.recipe.policy.updates or self._too_far()

    def _is_candidate(self, done: int) -> bool:
        """Whether the policy after so many updates may be the one that stays."""
        return self._ended(done) or done % self._ctx.recipe.policy.checkpoint_every == 0

    def _measure_candidate(self, done: int) -> None:
        self._seed_rewards("candidate", done)
        if self._best is not None:
            self._best.measure(done)
        self._measured = done

    def _seed_rewards(self, what: str, number: int) -> None:
        """The generators that all code shares, which nothing here draws from but rewards may.

        Seeded anew each time, they need no place in a checkpoint.
        """
        noise = uniform_noise((self._ctx.recipe.seed, "rewards", what, number), 1)
        seed = int(noise[0] * 2**32)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what rewards draw from
        torch.manual_seed(seed)

    def _prepare(self) -> None:
        """Before anything is learnt: the plan, the numerics gate, and what can be gained."""
        self._ctx.progress.say(_plan(self._ctx))
        self._copy.sync()
        if self._ctx.recipe.policy.gate:
            write_json(self._ctx.out / "gate.json", self._run_gate())
        if self._gold is not None and self._ctx.recipe.evaluate.best_of:
            renderer, role = self._roles.foundation.renderer, self._roles.reward_role
            report_headroom(
                self._ctx,
                self._engine,
                renderer,
                self._gold,
                None if role is None else self._centred,
            )
        self._measure_candidate(0)

    def _run_gate(self) -> dict[str, Any]:
        """On the own engine; another one is held against the trainer as well."""
        copy = self._copy
        if not isinstance(copy, RolloutCopy):
            copy = RolloutCopy(copy.role, merged=False)
        return run_gate(
            self._ctx,
            self._roles,
            copy.engine(self._roles.foundation.renderer),
            self._prompts,
            copy=copy,
            critic=self._learner.critic_role,
            served=None if copy is self._copy else self._copy,
        )

    def _centred(self, groups: Sequence[PromptGroup]) -> Tensor:
        """The own reward model's scores, 0 at its offset."""
        role, pad_id = self._roles.reward_role, self._roles.foundation.renderer.pad_id
        assert role is not None
        budget = self._ctx.recipe.policy.micro_batch_tokens
        return score_groups(role, groups, pad_id, budget) - self._roles.reward_offset

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
            "chosen_update": len(self._history) if self._chosen is None else self._chosen,
            "episodes": round(self._history[-1]["episodes"]),
            "reward_first": mean(first, "reward"),
            "reward_last": mean(last, "reward"),
            "reward_rise_standard_errors": _rise(first, last),
            "kl_last": mean(last, "kl_loss"),
            "completion_tokens_mean": mean(last, "completion_tokens"),
        }

    def _update(self, update: int) -> Metrics:
        self._seed_rewards("update", update)
        sampled = self._sample(update)
        kept, failed = self._scorer.judge(sampled, update)
        minibatches = self._measure(self._usable(kept, update), update)
        learnt = [episode for micro in flat(minibatches) for episode in micro.episodes]
        of_reference = self._learner.sampler == "reference"
        metrics = describe(minibatches, self._gold, of_reference) | self._scorer.metrics()
        chooser = f"reward_{selects_by(self._ctx.recipe)}"
        if chooser in metrics:
            metrics["gold"] = metrics[chooser]
        metrics["eos_rate"] = sum(e.rollout.ended for e in sampled) / len(sampled)
        metrics["left_out"] = 1 - len(learnt) / len(sampled)
        metrics["episodes"] = float((update + 1) * len(sampled))
        metrics["kl_coef"] = self._kl.coef
        penalised = kl_placement(self._ctx.recipe.policy) != "none"
        penalty = self._kl.coef * metrics["kl_loss"] if penalised else 0.0
        metrics["objective"] = metrics["reward"] - penalty
        _check_engine(update, metrics, self._sampling.temperature)
        if update == 0 and "reference" not in self._ctx.recipe.policy.gate_skip:
            _check_start(minibatches)
        rows = sample_rows(minibatches, update, self._gold, _SAMPLES_LOGGED)
        self._ctx.log.samples(rows + failed[:_SAMPLES_LOGGED])
        metrics |= self._learner.learn(minibatches, update, self._kl.coef)
        self._kl.observe(metrics["kl_loss"], len(learnt))
        self._ctx.log.write(update, **metrics)
        if metrics["kl_loss"] < -_ERRORS_BELOW_ZERO * metrics["kl_se"] < 0 and not self._warned:
            self._ctx.progress.say(_negative_kl(update, metrics))
            self._warned = True
        return metrics

    def _sample(self, update: int) -> list[Episode]:
        """Step 1: completions of this update's prompts, those of a prompt side by side.

        A prompt that comes twice in an update gets other noise the second time.
        """
        config, renderer = self._ctx.recipe.policy, self._roles.foundation.renderer
        size, samples = config.prompts_per_update, config.samples_per_prompt
        prompts = [self._prompts[i] for i in self._order[update * size : (update + 1) * size]]
        seen: Counter[str] = Counter()
        requests = []
        for prompt in prompts:
            ids, start = tuple(renderer.prompt_ids(prompt)), seen[prompt.id] * samples
            seen[prompt.id] += 1
            requests += [
                Request(ids, (self._ctx.recipe.seed, update, prompt.id, start + k))
                for k in range(samples)
            ]
        self._copy.sync()
        rollouts = self._engine.generate(requests, self._sampling)
        return [
            Episode(
                prompt=prompts[index // samples],
                group=index // samples,
                sample=int(requests[index].key[-1]),
                rollout=rollout,
                text=renderer.completion_text(rollout.completion_ids),
            )
            for index, rollout in enumerate(rollouts)
        ]

    def _usable(self, episodes: Sequence[Episode], update: int) -> list[tuple[Episode, ...]]:
        """The completions that the algorithm can learn from, by prompt.

        Raises:
            StageError: there are none.
        """
        least = 2 if ALGORITHMS[self._ctx.recipe.policy.algorithm].needs_groups else 1
        groups = [group for group in episode_groups(episodes) if len(group) >= least]
        if not groups:
            raise StageError(
                f"no completion of update {update} can be learnt from: all were cut off "
                '(policy.missing_eos = "filter") or their rewards failed; raise '
                'data.max_completion_tokens, set policy.missing_eos = "subtract", or mend the '
                "reward"
            )
        return groups

    def _measure(self, grouped: Sequence[tuple[Episode, ...]], update: int) -> Minibatches:
        """Step 2: scores and log-probabilities, in the micro-batches of the whole update."""
        wanted = self._ctx.recipe.policy.minibatches
        order = list(seeded_epochs(len(grouped), 1, self._ctx.recipe.seed + update))
        parts = [order[i::wanted] for i in range(wanted)]
        minibatches = [self._micro_batches([grouped[i] for i in part]) for part in parts if part]
        return self._scorer.scored(minibatches)

    def _micro_batches(self, grouped: Sequence[tuple[Episode, ...]]) -> list[MicroBatch]:
        groups = [
            PromptGroup(own[0].rollout.prompt_ids, [e.rollout.completion_ids for e in own])
            for own in grouped
        ]
        roles, reward = self._roles, self._roles.reward_role
        ensemble = reward is not None and isinstance(reward.head, HeadEnsemble)
        micros = [
            _unmeasured(
                collate([groups[i] for i in part], roles.foundation.renderer.pad_id),
                [e for i in part for e in grouped[i]],
                roles.policy,
                ensemble=ensemble,
                owner=number % ranks.size(),
            )
            for number, part in enumerate(
                roles.policy.split(groups, self._ctx.recipe.policy.micro_batch_tokens)
            )
        ]
        places = range(len(micros))
        for place, counts in roles.policy.turns(places, [micro.owner for micro in micros]):
            swept = self._swept(micros[place])
            if counts:
                micros[place] = swept
        ranks.add_up([tensor for micro in micros for tensor in micro.measured])
        return micros

    @torch.no_grad()
    def _swept(self, micro: MicroBatch) -> MicroBatch:
        roles, temperature = self._roles, self._ctx.recipe.policy.temperature
        policy = roles.policy.logprobs(micro.batch, temperature=temperature, with_entropy=True)
        reference = roles.reference.logprobs(micro.batch, temperature=temperature)
        assert policy.entropy is not None
        raw = self._scorer.raw(micro.batch)
        return replace(
            micro,
            logprobs=policy.logprobs,
            ref_logprobs=reference.logprobs,
            entropy=policy.entropy,
            scores=raw.scores.to(micro.scores.dtype),  # zeros, where rewards read texts
            disagreement=raw.disagreement,
            states=raw.states,
        )

    def _save(self, done: int) -> None:
        tensors, numbers = self._learner.state()
        own = {
            "updates": done,
            "measured": self._measured,
            "history": self._history,
            "kl_coef": self._kl.coef,
        }
        best, measured = ({}, []) if self._best is None else self._best.state()
        self._checkpoints.write(
            done,
            {"policy": self._roles.policy.state(), **best, **tensors},
            {**own, "rewards": self._scorer.state(), "selection": measured, **numbers},
        )

    def _resume(self) -> int | None:
        """Updates that are done; None: the stage begins."""
        saved = self._checkpoints.read()
        if saved is None:
            self._ctx.log.truncate(-1)
            return None
        tensors, numbers = saved
        self._roles.policy.load_state(tensors["policy"])
        self._learner.load_state(tensors, numbers)
        self._scorer.load_state(numbers["rewards"])
        if self._best is not None:
            self._best.load_state(tensors, numbers["selection"])
        self._history = [_with_nan(row) for row in numbers["history"]]
        self._kl.coef, self._measured = float(numbers["kl_coef"]), int(numbers["measured"])
        done = int(numbers["updates"])
        self._ctx.log.truncate(done - 1)
        where = f"policy: update {done} of {self._ctx.recipe.policy.updates}"
        others = "KL weight, running statistics, figures, logs"
        self._ctx.progress.say(restored(where, tensors, others, self._ended(done)))
        if self._measured < done and self._is_candidate(done):  # stopped before it was measured
            self._measure_candidate(done)
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


def _with_nan(row: dict[str, float | None]) -> Metrics:
    """JSON has no NaN: a checkpoint keeps it as null."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _unmeasured(
    batch: GroupBatch, episodes: Sequence[Episode], policy: Role, *, ensemble: bool, owner: int
) -> MicroBatch:
    """A micro-batch with zeros for what its owner will find."""
    batch = batch.to(policy.device)
    tokens = torch.zeros(batch.mask.shape, dtype=policy.wide, device=policy.device)
    scores = tokens.new_zeros(len(batch.rows))
    return MicroBatch(
        batch=batch,
        episodes=tuple(episodes),
        logprobs=tokens,
        ref_logprobs=tokens.clone(),
        entropy=tokens.clone(),
        scores=scores,
        token_scores=None,
        states=None,
        disagreement=scores.clone() if ensemble else None,
        sampler_logprobs=_told(batch, episodes),
        owner=owner,
    )


def _told(batch: GroupBatch, episodes: Sequence[Episode]) -> Tensor | None:
    """[N, C] what the engine said of its tokens, if it said anything."""
    told = [logprob for episode in episodes for logprob in episode.rollout.logprobs]
    if not told:
        return None
    return scatter(torch.tensor(told, device=batch.mask.device), batch.mask)


def _check_engine(update: int, metrics: Metrics, temperature: float) -> None:
    """Raises NumericsError: trainer and engine are so far apart that weights cannot be the same."""
    gap, most = metrics.get("engine_gap", 0.0), _MOST_GAP / min(1.0, temperature)
    if not gap <= most:
        raise NumericsError(
            f"update {update}: the trainer's log-probabilities of the sampled tokens are "
            f"{gap:.2g} nats from those of the engine that drew them (root mean square; allowed: "
            f"{most:g}): it samples with other weights. Set policy.engine = "
            '"own", and report the model\'s architecture'
        )


def _plan(ctx: StageContext) -> str:
    """The batch plan in the words of the documentation."""
    policy = ctx.recipe.policy
    episodes = policy.prompts_per_update * policy.samples_per_prompt
    return (
        f"policy: {policy.algorithm}: {policy.updates} updates of {policy.prompts_per_update} "
        f"prompts × {policy.samples_per_prompt} samples = {episodes} episodes; {policy.epochs} "
        f"passes × {policy.minibatches} minibatches of {episodes / policy.minibatches:g} episodes "
        f"= {policy.epochs * policy.minibatches} steps an update; micro-batches of up to "
        f"{policy.micro_batch_tokens} tokens"
    )


def _negative_kl(update: int, metrics: Metrics) -> str:
    return (
        f"policy: warning: update {update} has a sequence KL of {metrics['kl_loss']:.3g} ± "
        f"{metrics['kl_se']:.2g} nats. It cannot be negative but by chance: the samples are not "
        "the policy's own. Were they drawn with other weights, another temperature, or truncated?"
    )


def _check_start(minibatches: Minibatches) -> None:
    """At update 0 policy and reference are the same weights: their log-probabilities must be too.

    Raises:
        NumericsError: they are not.
    """
    apart = [(micro.logprobs - micro.ref_logprobs).abs().max() for micro in flat(minibatches)]
    worst = float(torch.stack(apart).max())  # keeps NaN, which Python's max may lose
    if not worst <= EXACT:
        raise NumericsError(
            "before the first update the policy's log-probabilities differ from the reference's "
            f"by up to {worst:.2g} nats a token (allowed: {EXACT:g}). They must be the same "
            "weights in the same forward pass; is dropout off, and was models/sft changed by hand?"
        )


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
