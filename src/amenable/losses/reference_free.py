"""Losses on pairs that need no reference: SimPO and ORPO. N pairs; unreduced, [N].

Both see a completion through its log-probability a token, sequence log-probability over length.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from amenable.losses.checks import check_not_negative, check_positive, check_same_shape
from amenable.losses.likelihood import mean_logprobs

CERTAINTY_LIMIT = 1e-7


def simpo_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    chosen_tokens: Int[Tensor, " N"],
    rejected_tokens: Int[Tensor, " N"],
    beta: float,
    margin: float,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood that the chosen completion's mean log-probability leads by a margin.

    loss_i = -log sigmoid(beta (policy_chosen_i / chosen_tokens_i
                                - policy_rejected_i / rejected_tokens_i) - margin)

    Args:
        policy_chosen: [N] sequence log-probabilities of the chosen completions, nats, summed over
            real tokens.
        policy_rejected: [N] the same of the rejected ones.
        chosen_tokens: [N] real tokens of the chosen completions, at least 1.
        rejected_tokens: [N] real tokens of the rejected ones, at least 1.
        beta: above 0; scales nats a token, so about ten times as large as in DPO.
        margin: at least 0, in units of beta times nats a token; the paper's gamma.

    Returns:
        [N] nats per comparison; log 2 where the means differ by margin / beta.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a negative count or margin, or a beta that is not
            above 0.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    check_positive(beta=beta)
    check_not_negative(margin=margin)
    check_same_shape(1, policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    chosen = mean_logprobs(policy_chosen, chosen_tokens)
    rejected = mean_logprobs(policy_rejected, rejected_tokens)
    return -logsigmoid(beta * (chosen - rejected) - margin)


def odds_ratio_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    chosen_tokens: Int[Tensor, " N"],
    rejected_tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """ORPO's second term: the chosen completion's odds should exceed the rejected one's.

    loss_i = -log sigmoid(log odds(p_chosen) - log odds(p_rejected)),  odds(p) = p / (1 - p),
    p = exp(sequence log-probability / tokens)

    ORPO's whole loss is the chosen completions' negative log-likelihood (`cross_entropy`) plus
    lambda times this term. The two have different denominators, tokens or completions there and
    pairs here, so they are kept apart.

    Args:
        policy_chosen: as in `simpo_loss`.
        policy_rejected: as in `simpo_loss`.
        chosen_tokens: as in `simpo_loss`.
        rejected_tokens: as in `simpo_loss`.

    Returns:
        [N] nats per comparison; log 2 where the means are equal. Finite: a mean log-probability is
        taken to be at most -1e-7, so that a certain completion has odds of 1e7; its gradient is
        then 0.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a negative count.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 4 and 7; the sum with the likelihood is eq. 6.
    """
    check_same_shape(1, policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    chosen = _log_odds(mean_logprobs(policy_chosen, chosen_tokens))
    rejected = _log_odds(mean_logprobs(policy_rejected, rejected_tokens))
    return -logsigmoid(chosen - rejected)


def _log_odds(logprobs: Tensor) -> Tensor:
    """Log-odds, log p - log(1 - p), by whichever form of log(1 - p) keeps its digits."""
    bounded = logprobs.clamp(max=-CERTAINTY_LIMIT)
    near_one = torch.log(-torch.expm1(bounded))
    far = torch.log1p(-torch.exp(bounded))
    return bounded - torch.where(bounded > -math.log(2), near_one, far)
