"""The losses of the off-policy algorithms, as a table over the micro-batch that they see.

A tie is a pair whose label is either side with probability 1/2, where the mean of the loss over
both labels is a loss of its own (dpo, cdpo, robust-dpo, ipo); the other algorithms leave ties out.

Shapes: n pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amenable.config.preference import PreferenceConfig
from amenable.losses.direct_preference import (
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    robust_dpo_loss,
    soft_dpo_loss,
)
from amenable.losses.kto import kto_loss
from amenable.losses.likelihood import mean_logprobs
from amenable.losses.reference_free import odds_ratio_loss, simpo_loss


@dataclass(frozen=True)
class Pairs:
    """A micro-batch as a loss sees it. Log-probabilities are sums over real tokens, in nats."""

    policy_chosen: Tensor
    """[n]"""
    policy_rejected: Tensor
    """[n]"""
    ref_chosen: Tensor
    """[n]; 0 where the algorithm has no reference."""
    ref_rejected: Tensor
    """[n]; 0 where the algorithm has no reference."""
    chosen_tokens: Tensor
    """[n] real tokens of the chosen completions."""
    rejected_tokens: Tensor
    """[n]"""
    tied: Tensor
    """[n] True where neither was preferred: chosen is then the first candidate."""
    reference_point: Tensor
    """KTO's z of the whole batch, in nats; else 0."""

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `losses.direct_preference` takes."""
        return self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected

    @property
    def swapped(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with the other label."""
        return self.policy_rejected, self.policy_chosen, self.ref_rejected, self.ref_chosen

    @property
    def chosen_nll(self) -> Tensor:
        """[n] nats a token of the chosen completions; 0 at a tie, which chooses none."""
        nll = -mean_logprobs(self.policy_chosen, self.chosen_tokens)
        return nll.masked_fill(self.tied, 0.0)

    @property
    def size(self) -> int:
        """How many."""
        return len(self.tied)


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """One algorithm.

    Args:
        loss: [n] losses of a micro-batch, unreduced and without `sft_coef`.
        reward_scale: factor of the implicit reward, which is that of the log-ratio with a
            reference and that of the mean log-probability a token without.
        reference: compares with the frozen start, over summed log-probabilities; else over means.
        ties: learns from ties.
        mismatched: needs the log-ratios of completions behind another pair's prompt.
    """

    loss: Callable[[Pairs, PreferenceConfig], Tensor]
    reward_scale: Callable[[PreferenceConfig], float]
    reference: bool = True
    ties: bool = False
    mismatched: bool = False


def _dpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    return _with_ties(pairs, config, dpo_loss(*pairs.four, config.beta))


def _cdpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    smoothing = config.label_smoothing
    return _with_ties(
        pairs, config, conservative_dpo_loss(*pairs.four, config.beta, label_smoothing=smoothing)
    )


def _robust_dpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    losses = robust_dpo_loss(*pairs.four, config.beta, flip_rate=config.flip_rate)
    return _with_ties(pairs, config, losses)


def _with_ties(pairs: Pairs, config: PreferenceConfig, losses: Tensor) -> Tensor:
    """The losses, with a tie as the label 1/2, of which cdpo and robust-dpo leave DPO's loss."""
    half = torch.full_like(losses, 0.5)
    return torch.where(pairs.tied, soft_dpo_loss(*pairs.four, half, config.beta), losses)


def _ipo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    losses = ipo_loss(*pairs.four, config.beta)
    both = (losses + ipo_loss(*pairs.swapped, config.beta)) / 2
    return torch.where(pairs.tied, both, losses)


def _kto(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """The mean of a pair's two completions: chosen is desirable, rejected is not."""
    losses = kto_loss(
        torch.cat([pairs.policy_chosen, pairs.policy_rejected]),
        torch.cat([pairs.ref_chosen, pairs.ref_rejected]),
        torch.arange(2 * pairs.size, device=pairs.tied.device) < pairs.size,
        pairs.reference_point,
        config.beta,
        config.desirable_weight,
        config.undesirable_weight,
    )
    return losses.view(2, pairs.size).mean(0)


def _simpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    return simpo_loss(
        pairs.policy_chosen,
        pairs.policy_rejected,
        pairs.chosen_tokens,
        pairs.rejected_tokens,
        config.simpo_beta,
        config.simpo_margin,
    )


def _orpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    odds = odds_ratio_loss(
        pairs.policy_chosen, pairs.policy_rejected, pairs.chosen_tokens, pairs.rejected_tokens
    )
    return pairs.chosen_nll + config.orpo_weight * odds


def _beta(config: PreferenceConfig) -> float:
    return config.beta


LOSSES = {
    "dpo": PairLoss(loss=_dpo, reward_scale=_beta, ties=True),
    "ipo": PairLoss(loss=_ipo, reward_scale=_beta, ties=True),
    "cdpo": PairLoss(loss=_cdpo, reward_scale=_beta, ties=True),
    "robust-dpo": PairLoss(loss=_robust_dpo, reward_scale=_beta, ties=True),
    "kto": PairLoss(loss=_kto, reward_scale=_beta, mismatched=True),
    "simpo": PairLoss(loss=_simpo, reward_scale=lambda config: config.simpo_beta, reference=False),
    "orpo": PairLoss(loss=_orpo, reward_scale=lambda config: 1.0, reference=False),
}
