"""What an update learns from: sampled completions with their scores and log-probabilities.

Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amenable.data.collate import GroupBatch
from amenable.data.schemas import Prompt
from amenable.losses.kl import k1, sequence_kl
from amenable.losses.policy import LOG_RATIO_LIMIT
from amenable.models.logprobs import CompletionStates
from amenable.rollout.types import Rollout
from amenable.train.loop import Metrics

if TYPE_CHECKING:
    from amenable.data.annotator import SimulatedAnnotator


@dataclass(frozen=True)
class Episode:
    """One sampled completion on its way through an update."""

    prompt: Prompt
    group: int
    """Which of the update's prompts; a prompt may come twice."""
    sample: int
    """Which of the prompt's samples, counted over all its groups in the update."""
    rollout: Rollout
    text: str
    score: float = 0.0
    """Of the rewards that read texts."""
    steps: tuple[tuple[int, float], ...] = ()
    """(token, score): the part of `score` that falls on single tokens."""

    def __str__(self) -> str:
        return f"prompt {self.prompt.id!r}, completion {self.text!r}"


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
    """[N] centred proxy scores, with clipping, whitening and the rule for a missing end applied."""
    token_scores: Tensor | None
    """[N, C] the part of the scores that rewards give to single tokens, where one does."""
    states: CompletionStates | None
    """Of the reward model, where it is a role of this run; on the rank that owns the batch."""
    disagreement: Tensor | None = None
    """[N] spread of the reward model's heads, where it has several."""
    sampler_logprobs: Tensor | None = None
    """[N, C] as the engine said that drew the tokens, where it computes otherwise than the trainer;
    0 off the mask."""
    owner: int = 0
    """The rank that makes the passes over it, in every sweep."""

    @property
    def kl(self) -> Tensor:
        """[N, C] k1 estimates, policy against reference."""
        return k1(self.logprobs, self.ref_logprobs)

    @property
    def sequence_kl(self) -> Tensor:
        """[N] nats, summed over real tokens."""
        return sequence_kl(self.kl, self.batch.mask)

    def sampler_gap(self, of_reference: bool) -> Tensor | None:
        """[M] nats, the trainer's less the engine's, of all real tokens; of whoever sampled."""
        if self.sampler_logprobs is None:
            return None
        own = self.ref_logprobs if of_reference else self.logprobs
        return (own - self.sampler_logprobs)[self.batch.mask]

    @property
    def measured(self) -> list[Tensor]:
        """What its owner finds and every rank needs."""
        found = [self.logprobs, self.ref_logprobs, self.entropy, self.scores]
        return found if self.disagreement is None else [*found, self.disagreement]

    def groups(self) -> list[slice]:
        """The places of each prompt's completions, which stand side by side."""
        rows = self.batch.rows.tolist()
        starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]


Minibatches = list[list[MicroBatch]]
"""A roll-out batch: a list of micro-batches for each optimizer step of a pass."""


def flat(minibatches: Minibatches) -> list[MicroBatch]:
    """All micro-batches, in order."""
    return [micro for minibatch in minibatches for micro in minibatch]


def episode_groups(episodes: Sequence[Episode]) -> list[tuple[Episode, ...]]:
    """Episodes by the prompt that they continue."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    return [tuple(group) for group in groups.values()]


def describe(
    minibatches: Minibatches, gold: SimulatedAnnotator | None, of_reference: bool = False
) -> Metrics:
    """Metrics of the episodes that are learnt from, before anything is.

    Args:
        minibatches: the roll-out batch.
        gold: scores beside the rewards.
        of_reference: the reference drew the samples, so that they are weighed for the KL.
    """
    micros = flat(minibatches)
    episodes = [episode for micro in micros for episode in micro.episodes]
    scores = torch.cat([micro.scores for micro in micros])
    kl = torch.cat([micro.sequence_kl for micro in micros])
    if of_reference:
        kl = weighted_sequence_kl(kl)
    tokens = sum(int(micro.batch.mask.sum()) for micro in micros)
    count, prompts = len(episodes), [episode.prompt.id for episode in episodes]
    metrics = {
        "reward": float(scores.mean()),
        "reward_se": clustered_error(scores, prompts),
        "kl_loss": float(kl.mean()),
        "kl_se": clustered_error(kl, prompts),
        "entropy": sum(float(micro.entropy.sum()) for micro in micros) / tokens,
        "completion_tokens": tokens / count,
        "repeated": repeated_share(episodes),
    }
    gaps = [gap for micro in micros if (gap := micro.sampler_gap(of_reference)) is not None]
    if gaps:
        gap = torch.cat(gaps)
        metrics["engine_gap"] = float(gap.square().mean().sqrt())
        metrics["engine_kl"] = -float(gap.mean())
    if gold is not None:
        metrics["gold"] = sum(gold.score(e.prompt, e.text) for e in episodes) / count
    return metrics


def repeated_share(episodes: Sequence[Episode]) -> float:
    """Share of the completions whose text another prompt has got as well."""
    prompts: dict[str, set[str]] = {}
    for episode in episodes:
        prompts.setdefault(episode.text, set()).add(episode.prompt.id)
    return sum(len(prompts[episode.text]) > 1 for episode in episodes) / len(episodes)


def weighted_sequence_kl(log_ratios: Tensor) -> Tensor:
    """[N] estimates of KL(policy || reference) from samples of the reference, at least 0.

    w log w - w + 1,  w = exp(log_ratio); unbiased, as the mean of w is 1.

    Args:
        log_ratios: [N] log policy - log reference of whole completions, nats.
    """
    weights = log_ratios.clamp(max=LOG_RATIO_LIMIT).exp()
    return weights * log_ratios - weights + 1


def clustered_error(figures: Tensor, prompts: Sequence[str]) -> float:
    """Standard error of the mean of [N] figures; samples of one prompt are not independent.

    Source: Miller 2024, arXiv:2411.00640, clustered standard errors (equal sizes: the spread of
    the clusters' means).
    """
    own: dict[str, list[float]] = {}
    for prompt, figure in zip(prompts, figures.tolist(), strict=True):
        own.setdefault(prompt, []).append(figure)
    means = torch.tensor([sum(values) / len(values) for values in own.values()])
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else 0.0


def sample_rows(
    minibatches: Minibatches, update: int, gold: SimulatedAnnotator | None, count: int
) -> list[dict[str, object]]:
    """Up to `count` rows of `samples.jsonl`, spread over the roll-out batch."""
    episodes = list(_with_figures(minibatches))
    rows: list[dict[str, object]] = []
    shown = min(count, len(episodes))
    gaps, last = max(1, shown - 1), len(episodes) - 1
    for episode, score, kl in [episodes[i * last // gaps] for i in range(shown)]:
        row: dict[str, object] = {
            "step": update,
            "prompt": episode.prompt.text,
            "completion": episode.text,
            "score": score,
            "kl": kl,
            "ended": episode.rollout.ended,
        }
        if gold is not None:
            row["gold"] = gold.score(episode.prompt, episode.text)
        rows.append(row)
    return rows


def _with_figures(minibatches: Minibatches) -> Iterator[tuple[Episode, float, float]]:
    for micro in flat(minibatches):
        yield from zip(
            micro.episodes, micro.scores.tolist(), micro.sequence_kl.tolist(), strict=True
        )


def padded(parts: Sequence[Tensor], fill: float | bool = 0.0) -> Tensor:
    """[sum N, max C] from the [N, C] of several micro-batches."""
    width = max(part.shape[1] for part in parts)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
    )


def unpadded(rows: Tensor, like: Sequence[MicroBatch]) -> list[Tensor]:
    """Undo `padded`: the [N, C] of each micro-batch."""
    sizes = [len(micro.episodes) for micro in like]
    pieces = rows.split(sizes)
    return [
        piece[:, : micro.batch.mask.shape[1]] for piece, micro in zip(pieces, like, strict=True)
    ]
