"""From rewards to the scores that a learner sees: mixed, clipped, whitened, missing ends charged.

Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from amenable.data.collate import GroupBatch
from amenable.errors import NumericsError
from amenable.losses.masked import VARIANCE_EPS, masked_var, masked_whiten
from amenable.models.heads import HeadEnsemble
from amenable.models.logprobs import CompletionStates
from amenable.train.experience import Episode, MicroBatch, Minibatches, flat
from amenable.train.loop import Metrics

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.data.render import Renderer
    from amenable.train.policy_roles import PolicyRoles


class Raw(NamedTuple):
    """Of a micro-batch, by the run's own reward model."""

    scores: Tensor
    """[N] centred."""
    disagreement: Tensor | None
    """[N] spread of its heads, where it has several."""
    states: CompletionStates | None
    """That it read."""


class Scorer:
    """All rewards of a run.

    Rewards that read texts judge the whole roll-out batch at once, before anything else, so that
    completions of which one fails never enter the batch. The run's own reward model scores the
    micro-batches.
    """

    def __init__(self, ctx: StageContext, roles: PolicyRoles) -> None:
        self._config, self._renderer = ctx.recipe.policy, roles.foundation.renderer
        self._texts, self._own = roles.text_rewards, roles.own_reward
        self._role, self._offset = roles.reward_role, roles.reward_offset
        self._metrics: Metrics = {}

    def judge(
        self, episodes: Sequence[Episode], update: int
    ) -> tuple[list[Episode], list[dict[str, object]]]:
        """Scores texts.

        Returns:
            The episodes with their scores, without those that were cut off where the recipe filters
            them, and without those of which a reward failed; and a row of
            `samples.jsonl` for each of those.

        Raises:
            StageError: more rewards failed than the recipe allows.
        """
        self._metrics = {}
        if self._config.missing_eos == "filter":
            episodes = [episode for episode in episodes if episode.rollout.ended]
        if self._texts is None or not episodes:
            return list(episodes), []
        judged = self._texts.judge(
            [episode.prompt for episode in episodes],
            [episode.text for episode in episodes],
            _TokenEnds(self._renderer, episodes),
        )
        kept: list[Episode] = []
        failed: list[dict[str, object]] = []
        for n, (episode, reason) in enumerate(zip(episodes, judged.reasons, strict=True)):
            if reason:
                failed.append(
                    {
                        "step": update,
                        "prompt": episode.prompt.text,
                        "completion": episode.text,
                        "score": None,
                        "reason": reason,
                    }
                )
                continue
            steps = tuple(judged.steps[n]) if judged.steps is not None else ()
            kept.append(replace(episode, score=float(judged.scores[n]), steps=steps))
        self._metrics["reward_failures"] = len(failed) / len(episodes)
        for name, scores in judged.parts.items():
            given = scores[~scores.isnan()]
            if len(given):
                self._metrics[f"reward_{name}"] = float(given.mean())
        return kept, failed

    @torch.no_grad()
    def raw(self, batch: GroupBatch) -> Raw:
        """What the own reward model says of a micro-batch; zeros where there is none."""
        if self._role is None:
            return Raw(torch.zeros(len(batch.rows), device=batch.input_ids.device), None, None)
        states, head = self._role.states(batch), self._role.scalar_head
        scores = head(states.last) - self._offset
        if not isinstance(head, HeadEnsemble):
            return Raw(scores, None, states)
        apart = head.disagreement(states.last)
        return Raw(scores - self._config.disagreement_coef * apart, apart, states)

    def scored(self, minibatches: Minibatches) -> Minibatches:
        """The same micro-batches with the scores that the learner sees."""
        micros = flat(minibatches)
        scores = torch.cat([micro.scores for micro in micros])
        episodes = [episode for micro in micros for episode in micro.episodes]
        if self._own is not None:
            _check_finite(scores, episodes)
            self._metrics[f"reward_{self._own.name}"] = float(scores.mean())
            scores = self._own.weight * self._own.apply(scores)
        apart = [micro.disagreement for micro in micros if micro.disagreement is not None]
        if apart:
            self._metrics["disagreement"] = float(torch.cat(apart).mean())
        raw = scores + scores.new_tensor([e.score for e in episodes])
        shaped, of_steps = self._shaped(raw, episodes)
        sizes = [len(micro.episodes) for micro in micros]
        parts = iter(zip(shaped.split(sizes), of_steps.split(sizes), strict=True))
        return [[_with_scores(micro, *next(parts)) for micro in m] for m in minibatches]

    def _shaped(self, scores: Tensor, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Of a roll-out batch: clip, whiten, then charge completions that did not end.

        Returns:
            [N] scores; and [N] what the part that falls on single tokens is multiplied by. What a
            clip cuts off is taken from the last token.
        """
        config, of_steps = self._config, torch.ones_like(scores)
        if config.score_clip:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        if config.whiten_scores:
            all_of_them = torch.ones_like(scores, dtype=torch.bool)
            of_steps = of_steps / (masked_var(scores, all_of_them) + VARIANCE_EPS).sqrt()
            scores = masked_whiten(scores, all_of_them, shift_mean=False)
        missing = torch.tensor([not e.rollout.ended for e in episodes], device=scores.device)
        if config.missing_eos == "replace":
            charged = scores.masked_fill(missing, -config.missing_eos_penalty)
            return charged, of_steps.masked_fill(missing, 0.0)
        return scores - config.missing_eos_penalty * missing, of_steps

    def metrics(self) -> Metrics:
        """Of the last roll-out batch: the share that failed, and each reward apart."""
        return self._metrics

    def state(self) -> dict[str, Any]:
        """Of the running normalisers."""
        return {
            "texts": self._texts.state() if self._texts is not None else {},
            "own": self._own.state() if self._own is not None else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        if self._texts is not None:
            self._texts.load_state(state["texts"])
        if self._own is not None:
            self._own.load_state(state["own"])


def _check_finite(scores: Tensor, episodes: Sequence[Episode]) -> None:
    """Of the run's own reward model.

    Raises:
        NumericsError: a score is not finite.
    """
    for score, episode in zip(scores.tolist(), episodes, strict=True):
        if not math.isfinite(score):
            raise NumericsError(
                f"the run's own reward model gives the score {score} to {episode}; train it "
                "again, or set model.dtype = 'fp32'"
            )


def _with_scores(micro: MicroBatch, scores: Tensor, of_steps: Tensor) -> MicroBatch:
    """The micro-batch with its [N] scores, and the part of them that falls on single tokens."""
    if not any(episode.steps for episode in micro.episodes):
        return replace(micro, scores=scores)
    tokens = torch.zeros_like(micro.logprobs)
    for row, episode in enumerate(micro.episodes):
        for token, score in episode.steps:
            tokens[row, token] += score
    return replace(micro, scores=scores, token_scores=tokens * of_steps[:, None])


class _TokenEnds(Sequence[Sequence[int]]):
    """Where in a completion's text each of its tokens ends; worked out when it is read."""

    def __init__(self, renderer: Renderer, episodes: Sequence[Episode]) -> None:
        self._renderer, self._episodes = renderer, episodes

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids = self._episodes[index].rollout.completion_ids
        text = self._renderer.completion_text
        return [len(text(ids[: end + 1])) for end in range(len(ids))]

    def __iter__(self) -> Iterator[Sequence[int]]:
        return (self[index] for index in range(len(self)))
