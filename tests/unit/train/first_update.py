"""The parts of an on-policy run, so that one update can be looked into."""

from __future__ import annotations

import dataclasses
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import StageContext, read_jsonl
from amenable.data.collate import PromptGroup, collate
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.rollout.types import Rollout
from amenable.train.experience import Episode, MicroBatch, Minibatches
from amenable.train.on_policy import _OnPolicyLoop
from amenable.train.policy_roles import PolicyRoles, open_roles

PolicyContext = Callable[..., StageContext]
ON_POLICY = [name for name, row in ALGORITHMS.items() if row.learns_from == "prompts"]


def make_learner(ctx: StageContext, roles: PolicyRoles) -> Any:
    """The learner that the algorithm's row leads to."""
    module, _, function = ALGORITHMS[ctx.recipe.policy.algorithm].run.partition(":")
    home, made = importlib.import_module(module), []

    def keep(ctx: StageContext, make: Callable[..., Any]) -> dict[str, Any]:
        made.append(make(ctx, roles))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "run_on_policy", keep)
        getattr(home, function)(ctx)
    return made[0]


@dataclass
class Floor:
    """A run that has not begun."""

    ctx: StageContext
    roles: PolicyRoles
    learner: Any
    loop: Any

    @classmethod
    def of(cls, ctx: StageContext) -> Floor:
        roles = open_roles(ctx)
        learner = make_learner(ctx, roles)
        return cls(ctx, roles, learner, _OnPolicyLoop(ctx, roles, learner))

    def measured(self, episodes: Sequence[Episode] | None = None) -> Minibatches:
        """The first update's micro-batches, or those of other episodes, with scores."""
        kept, _ = self.loop._scorer.judge(self.loop._sample(0) if episodes is None else episodes, 0)
        return self.loop._measure(self.loop._usable(kept, 0), 0)

    def learn(
        self, minibatches: Minibatches | None = None, kl_coef: float = 0.05
    ) -> dict[str, float]:
        """What the learner says of one update."""
        return self.learner.learn(minibatches or self.measured(), 0, kl_coef)

    def gradient(self) -> Tensor:
        """Of the policy's first step, clipped: a tenth of it is Adam's first moment."""
        moments = self.learner.state()[0]["policy_optimizer"]
        return torch.cat(
            [moments[key].flatten() * 10 for key in sorted(moments) if key.endswith(".exp_avg")]
        )


def figures(ctx: StageContext) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without the stage's prefix."""
    return [
        {key.removeprefix("policy/"): value for key, value in row.items()}
        for row in read_jsonl(ctx.log.metrics_path)
    ]


def said(ctx: StageContext) -> str:
    """What the user has read so far."""
    stream = ctx.progress._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def off_by(one: Tensor, other: Tensor) -> float:
    """Length of the difference, in lengths of the first."""
    return float((one - other).norm() / one.norm())


def episode(
    group: int, tokens: int = 2, *, ended: bool = True, score: float = 0.0, **more: Any
) -> Episode:
    """A made-up one; the tokens of its completion are 5, 6, …"""
    return Episode(
        sample=0,
        prompt=Prompt(
            messages=(Message(Speaker.USER, f"q{group}"),), id=f"p{group}", group=f"p{group}"
        ),
        group=group,
        rollout=Rollout((3, 4), tuple(range(5, 5 + tokens)), ended),
        text="abcdef"[:tokens],
        score=score,
        **more,
    )


def micro_batch(
    groups: Sequence[Sequence[Episode]],
    scores: Sequence[float],
    *,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_scores: Tensor | None = None,
) -> MicroBatch:
    """Made-up episodes as the learner sees them; log-probabilities are 0 unless given."""
    batch = collate(
        [
            PromptGroup(own[0].rollout.prompt_ids, [e.rollout.completion_ids for e in own])
            for own in groups
        ],
        0,
    )
    zeros = torch.zeros(batch.mask.shape)
    return MicroBatch(
        batch=batch,
        episodes=tuple(e for own in groups for e in own),
        logprobs=zeros if logprobs is None else logprobs,
        ref_logprobs=zeros if ref_logprobs is None else ref_logprobs,
        entropy=zeros,
        scores=torch.tensor(scores),
        token_scores=token_scores,
        states=None,
    )


def with_scores(minibatches: Minibatches, score: Callable[[Episode], float]) -> Minibatches:
    """The same episodes, scored otherwise."""
    return [
        [
            dataclasses.replace(m, scores=torch.tensor([score(e) for e in m.episodes]))
            for m in minibatch
        ]
        for minibatch in minibatches
    ]
