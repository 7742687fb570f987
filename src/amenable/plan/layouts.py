"""One update of an on-policy algorithm spread over many cards: memory, traffic and time of one.

On paper: rates of `plan.rates`, links of data sheets, collectives as rings. Every rank makes the
same plan and does its share of each sweep (docs/several-processes.md), so that what is sent is
gradients, weights where they are sharded, and a few numbers for each sampled token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from amenable.config.needs import trains_reward
from amenable.config.recipe import Recipe
from amenable.plan.hardware import Hardware
from amenable.plan.memory import Budget, Parts
from amenable.plan.rates import BANDWIDTH_SHARE, Rates, rates_of_table
from amenable.plan.rows import Rows
from amenable.plan.shape import ModelShape
from amenable.plan.work import UpdateWork, Work, has_critic, on_policy_update, token_means

_GRADIENT = 4  # bytes of a number that is summed over ranks
_ID, _NUMBERS = 8, 4 * 4  # bytes of a sampled token: two log-probabilities, entropy, value
_SCORE = 4  # bytes of an episode's
_SHARDED = (
    "weights",
    "gradients",
    "Adam's moments",
    "copies of trained weights",
    "best checkpoint",
)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What carries bytes from card to card.

    Sources: NVIDIA's data sheet of H100 SXM (NVLink, 900 GB/s in both directions together) and of
    DGX H100 (eight network cards of 400 Gb/s). Share and latency are assumed.
    """

    inside: float = 450e9
    """Bytes a second of a card to the others of its host."""
    between: float = 50e9
    """And to other hosts."""
    host: int = 8
    """Cards of a host."""
    share: float = 0.7
    """Of these rates, that a collective reaches."""
    hop_s: float = 15e-6
    """Each time that the number of ranks doubles."""

    def seconds(self, sent: float, collectives: float, span: int) -> float:
        """Of so many bytes that a rank sends in so many collectives.

        Args:
            sent: bytes.
            collectives: each costs its latency.
            span: ranks from the first that takes part to the last.
        """
        if span == 1:
            return 0.0
        rate = self.inside if span <= self.host else self.between
        return sent / (rate * self.share) + collectives * self.hop_s * math.log2(span)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How models lie on the cards."""

    name: str
    shards: int = 1
    """Ranks over which weights, gradients and moments are cut (FSDP2): 1: each has all of them; 0:
    all ranks; else groups of so many, whose gradients are summed once a step."""
    engine: int = 0
    """Cards that share one roll-out copy, by tensor parallelism and with captured graphs (vLLM);
    0: each rank has a copy of its own, in our engine."""

    def group(self, ranks: int) -> int:
        """Ranks that the weights are cut over."""
        return min(self.shards or ranks, ranks)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One update on one of the cards."""

    ranks: int
    episodes: int
    phase: str
    """That takes most memory."""
    memory: Parts
    """Bytes of it by part."""
    sent: Parts
    """Bytes that a rank sends, by what they are."""
    seconds: Parts
    """By phase: sampling, measuring, learning, waiting for others."""

    @property
    def memory_bytes(self) -> float:
        """At most."""
        return sum(self.memory.values())

    @property
    def update_s(self) -> float:
        """Of the whole update."""
        return sum(self.seconds.values())

    @property
    def card_hours(self) -> float:
        """Of a thousand updates' worth of 1,000 episodes each: a million episodes."""
        return self.ranks * self.update_s / self.episodes * 1e6 / 3600


def spread(
    recipe: Recipe,
    shape: ModelShape,
    rows: Rows,
    machine: Hardware,
    layout: Layout,
    ranks: int,
    links: Links | None = None,
) -> Spread:
    """One update of the recipe on `ranks` cards.

    Args:
        recipe: its `policy.prompts_per_update` prompts are shared out among the ranks.
        shape: of the base model.
        rows: how long they are.
        machine: one card.
        layout: how the models lie.
        ranks: cards.
        links: between them; None: those of hosts with eight H100.
    """
    own, links = _share(recipe, ranks), links or Links()
    budget, work = Budget(own, shape, rows, machine), on_policy_update(own, rows)
    rates = rates_of_table(own, shape, machine, *token_means(own, rows))
    group = layout.group(ranks)
    phase, memory = max(
        _memory(budget, layout, group).items(), key=lambda found: sum(found[1].values())
    )
    traffic = _traffic(budget, work, rows, group, ranks, links)
    steps = rates.step_s * work.learning.optimizer_steps
    seconds = {
        "sampling": _sampling_s(rates, work.sampling, layout, budget, links),
        "measuring": rates.seconds(work.measuring),
        "learning": rates.seconds(work.learning) - steps * (1 - 1 / group),
    }
    # Only what is sent while a pass computes is hidden behind it.
    beside = sum(part.seconds for part in traffic.values() if part.hidden)
    after = sum(part.seconds for part in traffic.values() if not part.hidden)
    seconds["waiting"] = after + max(0.0, beside - seconds["measuring"] - seconds["learning"])
    policy = recipe.policy
    return Spread(
        ranks=ranks,
        episodes=policy.prompts_per_update * policy.samples_per_prompt,
        phase=phase,
        memory=memory,
        sent={name: part.sent for name, part in traffic.items()},
        seconds=seconds,
    )


def _share(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe of a rank with as much to do as any."""
    policy = recipe.policy
    prompts = math.ceil(policy.prompts_per_update / ranks)
    own = replace(policy, prompts_per_update=prompts, minibatches=min(policy.minibatches, prompts))
    return replace(recipe, policy=own)


def _memory(budget: Budget, layout: Layout, group: int) -> dict[str, Parts]:
    """Bytes by part of each phase of the policy stage."""
    found, shape = {}, budget.shape
    # two layers; and embedding, norm and head around the whole pass
    at_once = 2 * shape.linear / shape.layers + shape.parameters - shape.linear
    for phase, whole in budget.phases("policy").items():
        parts = dict(whole)
        if group > 1:
            parts |= {name: parts[name] / group for name in _SHARDED if name in parts}
            parts["weights gathered"] = budget.base / shape.parameters * at_once
            parts["roll-out copy"] = budget.export
        if layout.engine and "roll-out copy" in parts:
            parts["roll-out copy"] /= layout.engine
        found[phase] = parts
    return found


@dataclass(frozen=True)
class _Traffic:
    sent: float
    """Bytes that a rank sends in an update."""
    seconds: float
    hidden: bool = False
    """Sent while a pass computes."""


def _traffic(
    budget: Budget, work: UpdateWork, rows: Rows, group: int, ranks: int, links: Links
) -> dict[str, _Traffic]:
    """By what is sent; of S bytes a ring of n sends S (n - 1) / n for each gather or scatter."""
    policy, shape = budget.recipe.policy, budget.shape
    learning, measuring = work.learning, work.measuring

    def ring(
        size: float, times: float, among: int, span: int, pieces: int = 1, hidden: bool = False
    ) -> _Traffic:
        sent = size * times * (among - 1) / among
        return _Traffic(sent, links.seconds(sent, times * pieces, span), hidden)

    answers = rows.completions or [budget.recipe.data.max_completion_tokens]
    episodes = policy.prompts_per_update * policy.samples_per_prompt * ranks
    tokens, groups = episodes * sum(answers) / len(answers), ranks // group
    trained = _GRADIENT * budget.trained
    found = {
        "roll-outs": ring(_ID * tokens, 1, ranks, ranks),
        "results": ring(_NUMBERS * tokens + _SCORE * episodes, 2, ranks, ranks),  # as sums
    }
    if group > 1:
        passes, layers = learning.train_passes, shape.layers
        learners = 1 + has_critic(budget.recipe)
        roles = 1 + learners + trains_reward(budget.recipe)
        sweeps = measuring.forward_passes / roles
        gathers = sweeps * roles + 2 * passes  # those of the learners in the precision of training
        size = budget.base * (sweeps * learners + 2 * passes)
        size += budget.export * sweeps * (roles - learners)
        found |= {
            "weights": ring(size / gathers, gathers, group, group, layers, hidden=True),
            "scattered gradients": ring(trained, passes, group, group, layers, hidden=True),
            "roll-out copy": ring(budget.export, 1, group, group),
        }
    if groups > 1:
        sums = 2 * learning.optimizer_steps  # a scatter and a gather
        found["summed gradients"] = ring(trained / group, sums, groups, ranks)
    return found


def _sampling_s(rates: Rates, work: Work, layout: Layout, budget: Budget, links: Links) -> float:
    """Seconds of the roll-outs; an engine reads its part of the weights and launches no kernels."""
    own = rates.seconds(work)
    if not layout.engine:
        return own
    part = budget.export / layout.engine / (budget.machine.bandwidth * BANDWIDTH_SHARE)
    sums = 2 * budget.shape.layers * links.hop_s * math.log2(layout.engine)
    return own - work.decode_steps * (rates.decode.fixed_s - part - sums)
