"""Likelihoods of win, loss and tie on pairs of scores. N pairs; unreduced, [N].

With s = log strength and d = chosen - rejected, both models give three probabilities that sum to 1
and are Bradley-Terry's where ties have none (theta = 1, nu = 0). A lost pair is a won one with its
sides swapped; at a tie the sides are immaterial.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from amenable.losses.checks import check_bool, check_precise, check_same_shape


def rao_kupper_loss(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    tied: Bool[Tensor, " N"],
    theta: float | Float[Tensor, ""],
) -> Float[Tensor, " N"]:
    """Negative log-likelihood of a win or a tie where a difference must pass a threshold to show.

    P(win) = sigmoid(d - log theta),  P(tie) = (theta^2 - 1) sigmoid(d - log theta)
    sigmoid(-d - log theta),  d = chosen - rejected

    Args:
        chosen: [N] scores in logits, of the completions that won; at a tie, of either.
        rejected: [N] scores of their counterparts.
        tied: [N] True where neither was preferred.
        theta: at least 1; log theta is the threshold in logits. A scalar tensor may be learned.
            At 1 no tie has any probability.

    Returns:
        [N] nats per comparison. At d = 0 a tie has probability (theta - 1) / (theta + 1).

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a theta below 1, or ties at a theta of 1.

    Source: Rao and Kupper 1967, "Ties in paired-comparison experiments: a generalization of the
    Bradley-Terry model", Journal of the American Statistical Association 62.
    """
    _check_ties(chosen, rejected, tied, "theta", theta, least=1.0)
    threshold = theta.log() if isinstance(theta, Tensor) else math.log(theta)
    difference = chosen - rejected
    losses = -logsigmoid(difference - threshold)
    if not bool(tied.any()):
        return losses
    odds = torch.as_tensor(2 * threshold, dtype=chosen.dtype, device=chosen.device)
    both = losses - logsigmoid(-difference - threshold)
    log_excess = odds + torch.log(-torch.expm1(-odds))  # log(theta^2 - 1)
    return torch.where(tied, both - log_excess, losses)


def davidson_loss(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    tied: Bool[Tensor, " N"],
    nu: float | Float[Tensor, ""],
) -> Float[Tensor, " N"]:
    """Negative log-likelihood of a win or a tie where ties go with the geometric mean of strengths.

    P(win) = exp(d / 2) / Z,  P(tie) = nu / Z,  Z = exp(d / 2) + exp(-d / 2) + nu,
    d = chosen - rejected

    Args:
        chosen: [N] scores in logits, of the completions that won; at a tie, of either.
        rejected: [N] scores of their counterparts.
        tied: [N] True where neither was preferred.
        nu: at least 0; the odds of a tie against a win between equals. A scalar tensor may be
            learned. At 0 no tie has any probability.

    Returns:
        [N] nats per comparison. At d = 0 a tie has probability nu / (2 + nu).

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a negative nu, or ties at a nu of 0.

    Source: Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired
    comparison experiments", Journal of the American Statistical Association 65.
    """
    _check_ties(chosen, rejected, tied, "nu", nu, least=0.0)
    difference = chosen - rejected
    strengths = torch.logaddexp(difference / 2, -difference / 2)  # log(Z - nu)
    room = torch.log1p(nu * torch.exp(-strengths))  # log Z - log(Z - nu)
    losses = -logsigmoid(difference) + room
    if not bool(tied.any()):
        return losses
    log_nu = nu.log() if isinstance(nu, Tensor) else math.log(nu)
    return torch.where(tied, strengths + room - log_nu, losses)


def _check_ties(
    chosen: Tensor,
    rejected: Tensor,
    tied: Tensor,
    name: str,
    parameter: float | Tensor,
    least: float,
) -> None:
    check_same_shape(1, chosen=chosen, rejected=rejected, tied=tied)
    check_precise(chosen=chosen, rejected=rejected)
    check_bool(tied=tied)
    if isinstance(parameter, Tensor):
        check_same_shape(0, **{name: parameter})
        check_precise(**{name: parameter})
    number = float(parameter.detach() if isinstance(parameter, Tensor) else parameter)
    if not number >= least:
        raise ValueError(f"{name} must be at least {least:g}, is {number:g}")
    if number == least and bool(tied.any()):
        raise ValueError(f"ties have no probability at {name} = {least:g}: give {name} above that")
