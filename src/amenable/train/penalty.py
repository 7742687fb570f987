"""The KL penalty of an on-policy run: where it enters, and who steers its weight.

Shapes: N completions and C tokens of a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amenable.algorithms import kl_placement
from amenable.losses.advantages import shape_rewards
from amenable.losses.kl import adaptive_kl_coef, k1, k2, k3, target_kl_coef
from amenable.train.experience import MicroBatch

if TYPE_CHECKING:
    from amenable.config.policy import PolicyConfig

_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


class KLPenalty:
    """Where the recipe's penalty enters."""

    def __init__(self, config: PolicyConfig) -> None:
        placement = kl_placement(config)
        self.in_loss = placement in ("loss", "both")
        self.in_reward = placement in ("reward", "both")
        self._estimator = _ESTIMATORS[config.kl.estimator]

    def token_rewards(self, micro: MicroBatch, coef: float) -> Tensor:
        """[N, C] reward of each token: the penalty, if it is one of the reward, and the score.

        The score falls on the last real token, but for the part that rewards give to tokens.
        """
        if self.in_reward:
            kl = self._estimator(micro.logprobs, micro.ref_logprobs)
        else:
            kl = torch.zeros_like(micro.logprobs)
        mask = micro.batch.mask
        if micro.token_scores is None:
            return shape_rewards(micro.scores, kl, mask, coef)
        last = micro.scores - micro.token_scores.sum(1)
        return shape_rewards(last, kl, mask, coef) + micro.token_scores


class KLController:
    """The weight of the penalty, from update to update."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config.kl
        self.coef = config.kl.coef

    def observe(self, sequence_kl: float, episodes: int) -> None:
        """Move the weight after an update.

        Args:
            sequence_kl: mean of the update's roll-outs, nats.
            episodes: completions in the update.
        """
        kl = self._config
        if kl.controller == "adaptive":
            self.coef = adaptive_kl_coef(self.coef, sequence_kl, kl.target, episodes, kl.horizon)
        elif kl.controller == "target":
            self.coef = target_kl_coef(
                self.coef, kl.coef, sequence_kl, kl.target, episodes, kl.horizon
            )
