"""What the reward model minimises on a pair: the recipe's choice of margin, ties and corrections.

Shapes: n pairs, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from amenable.data.collate import PromptGroup
from amenable.data.schemas import Choice, Preference
from amenable.losses.preference import (
    bradley_terry_loss,
    centring_loss,
    length_margin,
    tie_loss,
)
from amenable.losses.ties import davidson_loss, rao_kupper_loss
from amenable.rollout.types import uniform_noise

if TYPE_CHECKING:
    from amenable.config.reward import RewardConfig

_MOST_PER_TOKEN = 1.0  # logits; where length explains every choice, the best weight is infinite


@dataclass(frozen=True)
class RankLoss:
    """A pair's loss under the settings of `[reward]`."""

    ties: Literal["pull", "rao-kupper", "davidson"] = "pull"
    tie_parameter: float = 1.0
    """theta of Rao and Kupper, nu of Davidson."""
    label_smoothing: float = 0.0
    centring_coef: float = 0.0
    length_weight: float = 0.0
    """Logits a token that length accounts for; the scores need not."""

    @classmethod
    def fit(
        cls, config: RewardConfig, rows: Sequence[Preference], groups: Iterable[PromptGroup]
    ) -> RankLoss:
        """The loss of a recipe, with what it needs to know of the training pairs.

        Args:
            config: the reward section.
            rows: all training pairs.
            groups: token ids of each, the chosen candidate first.
        """
        parameter = 1.0 if config.ties == "pull" else tie_parameter(config.ties, tie_share(rows))
        debiased = config.length_debias
        return cls(
            ties=config.ties,
            tie_parameter=parameter,
            label_smoothing=config.label_smoothing,
            centring_coef=config.centring_coef,
            length_weight=fitted_length_weight(rows, pair_tokens(groups)) if debiased else 0.0,
        )

    def __call__(
        self,
        scores: Tensor,
        rows: Sequence[Preference],
        tokens: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """[n] losses times the rows' weights.

        Args:
            scores: [n, 2] raw scores, of chosen and rejected.
            rows: the pairs.
            tokens: of each, the length of the chosen and of the rejected candidate; needed where
                length is debiased.
        """
        margin = scores.new_tensor([row.margin or 0.0 for row in rows])
        if self.length_weight:
            assert tokens is not None
            lengths = torch.tensor(list(tokens), device=scores.device).view(-1, 2)
            margin = margin + length_margin(lengths[:, 0], lengths[:, 1], self.length_weight)
        tied = torch.tensor([row.choice is Choice.TIE for row in rows], device=scores.device)
        lead, other = scores[:, 0] - margin, scores[:, 1]
        losses = (1 - self.label_smoothing) * self._losses(lead, other, tied)
        if self.label_smoothing:
            losses = losses + self.label_smoothing * self._losses(other, lead, tied)
        if self.centring_coef:
            losses = losses + self.centring_coef * centring_loss(scores[:, 0], scores[:, 1])
        return losses * scores.new_tensor([row.weight for row in rows])

    def _losses(self, winner: Tensor, loser: Tensor, tied: Tensor) -> Tensor:
        if self.ties == "rao-kupper":
            return rao_kupper_loss(winner, loser, tied, self.tie_parameter)
        if self.ties == "davidson":
            return davidson_loss(winner, loser, tied, self.tie_parameter)
        return torch.where(tied, tie_loss(winner, loser), bradley_terry_loss(winner, loser))


PLAIN = RankLoss()
"""Bradley and Terry; ties pull together."""


def pair_tokens(groups: Iterable[PromptGroup]) -> list[tuple[int, int]]:
    """Tokens of the chosen and of the rejected candidate of each pair."""
    return [(len(group.completions[0]), len(group.completions[1])) for group in groups]


def tie_share(rows: Sequence[Preference]) -> float:
    """Weight of the ties among the pairs, in [0.001, 0.99]: neither kind is ever impossible."""
    weights = [(row.weight, row.choice is Choice.TIE) for row in rows]
    tied, total = sum(w for w, tie in weights if tie), sum(w for w, _ in weights)
    return min(max(tied / total, 0.001), 0.99)


def tie_parameter(ties: str, share: float) -> float:
    """The parameter at which equals tie with probability `share`, in (0, 1).

    Rao and Kupper: P(tie) = (theta - 1) / (theta + 1); Davidson: nu / (2 + nu).
    """
    if ties == "rao-kupper":
        return (1 + share) / (1 - share)
    return 2 * share / (1 - share)


def fitted_length_weight(rows: Sequence[Preference], tokens: Sequence[tuple[int, int]]) -> float:
    """Logits a token that predict the choices best from the difference in length alone.

    The maximum likelihood of sigmoid(weight (chosen tokens - rejected tokens)) over the decided
    training pairs, at most 1 in size.
    """
    decided = [row.choice is not Choice.TIE for row in rows]
    excess = np.asarray(tokens, dtype=np.float64).reshape(-1, 2)[decided]
    weights = np.asarray([row.weight for row in rows])[decided]
    difference = excess[:, 0] - excess[:, 1]

    def loss(weight: float) -> float:
        return float((weights * np.logaddexp(0.0, -weight * difference)).sum())

    bounds = (-_MOST_PER_TOKEN, _MOST_PER_TOKEN)
    return float(minimize_scalar(loss, bounds=bounds, method="bounded").x) if len(weights) else 0.0


def bootstrap_weights(rows: Sequence[Preference], heads: int, seed: int) -> Tensor:
    """[n, H] how often each head sees a pair: Poisson(1) for several heads, 1 for a single one.

    The draw depends on (seed, row, head) alone. Source: Oza and Russell 2001, "Online bagging and
    boosting": the bootstrap of a stream.
    """
    if heads == 1:
        return torch.ones(len(rows), 1)
    cumulative = np.cumsum([0.36787944, 0.36787944, 0.18393972, 0.06131324, 0.01532831])
    keys = [("head", row.prompt.id, row.candidate_0, row.candidate_1) for row in rows]
    drawn = [np.searchsorted(cumulative, uniform_noise((seed, *key), heads)) for key in keys]
    return torch.tensor(np.stack(drawn), dtype=torch.float32)
