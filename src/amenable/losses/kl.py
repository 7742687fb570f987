"""Estimators of KL(policy || reference) from sampled tokens, and the controller of its weight.

With d = logprobs - ref_logprobs at tokens drawn from the policy: E[k1] = E[k3] = KL, and k2 is
close to it where KL is small (John Schulman, "Approximating KL divergence", 2020,
http://joschu.net/blog/kl-approx.html). As a term of the reward k1 is right. As a term of the loss
an unbiased value is no unbiased gradient; over tokens of the policy at hand, the mean gradient of

    k1  is 0
    k2  is that of KL(policy || reference), the one that is meant
    k3  is that of KL(reference || policy): another divergence with the same minimum
    kl_loss  is that of KL(policy || reference), also once the policy has moved from the roll-out's

Each of these takes a token as if it did not change what comes after it. Over several tokens even k2
and kl_loss leave that out; only a KL inside the reward has ref exp(reward / coef) as its optimum.
N completions, C completion tokens; unreduced, [N, C].
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import check_positive, check_precise, check_same_shape
from amenable.losses.masked import masked_sum

LOG_RATIO_LIMIT = 80.0
ERROR_LIMIT = 0.2


def k1(logprobs: Float[Tensor, "N C"], ref_logprobs: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Log-ratio: unbiased, of either sign.

    k1 = logprobs - ref_logprobs;  gradient: grad logprobs, whose mean is 0

    Args:
        logprobs: [N, C] nats under the policy that sampled the tokens.
        ref_logprobs: [N, C] nats under the reference.

    Returns:
        [N, C] nats.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    check_same_shape(2, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_precise(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "N C"], ref_logprobs: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Half the squared log-ratio: biased, never negative, of low variance; its gradient is right.

    k2 = d^2 / 2;  gradient: d grad logprobs, whose mean is that of KL(policy || reference)

    Args:
        logprobs: [N, C] nats under the policy that sampled the tokens.
        ref_logprobs: [N, C] nats under the reference.

    Returns:
        [N, C] nats, at least 0.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Float[Tensor, "N C"], ref_logprobs: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Log-ratio with a control variate: unbiased and never negative; its gradient is another's.

    k3 = exp(-d) - 1 + d,  d = logprobs - ref_logprobs;  gradient: (1 - exp(-d)) grad logprobs,
    whose mean is that of KL(reference || policy)

    Args:
        logprobs: [N, C] nats under the policy that sampled the tokens.
        ref_logprobs: [N, C] nats under the reference.

    Returns:
        [N, C] nats, at least 0; finite, as exp(-d) is limited to exp(80).

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    difference = k1(logprobs, ref_logprobs)
    excess = torch.expm1(-difference.clamp(min=-LOG_RATIO_LIMIT))
    return (excess + difference).clamp(min=0)  # rounding may leave -1e-16


def kl_loss(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    ref_logprobs: Float[Tensor, "N C"],
) -> Float[Tensor, "N C"]:
    """k3 weighted by the ratio to the roll-out's policy: right in its value and in its gradient.

    loss = ratio k3,  ratio = exp(logprobs - old_logprobs), both with gradient

    Over tokens of the roll-out's policy its mean is KL(policy || reference) of the present policy,
    so its mean gradient is that KL's. At ratio 1 the gradient is d grad logprobs, k2's.

    Args:
        logprobs: [N, C] nats under the present policy; the gradient flows through these alone.
        old_logprobs: [N, C] nats under the policy that sampled the tokens.
        ref_logprobs: [N, C] nats under the reference.

    Returns:
        [N, C] nats, at least 0; finite, as both exponents are limited to 40.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.

    Source: DeepSeek-AI 2025, arXiv:2512.02556, section 3.1 (unbiased KL estimate).
    """
    check_same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check_precise(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    limit = LOG_RATIO_LIMIT / 2  # the product of two exponentials
    ratio = (logprobs - old_logprobs).clamp(-limit, limit).exp()
    difference = logprobs - ref_logprobs
    excess = torch.expm1(-difference.clamp(min=-limit)) + difference
    return ratio * excess.clamp(min=0)


def sequence_kl(kl: Float[Tensor, "N C"], mask: Bool[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """KL of each whole completion: the sum of its per-token estimates over real tokens.

    Args:
        kl: [N, C] nats, from one of the estimators.
        mask: [N, C] True at real tokens.

    Returns:
        [N] nats; 0 for a completion without real tokens.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    check_same_shape(2, kl=kl, mask=mask)
    check_precise(kl=kl)
    return masked_sum(kl, mask, dim=1)


def adaptive_kl_coef(
    coef: float, observed: float, target: float, episodes: int, horizon: int
) -> float:
    """The KL weight for the next update, moved so that the observed KL nears its target.

    coef (1 + clip(observed / target - 1, -0.2, 0.2) episodes / horizon)

    Args:
        coef: present weight, above 0, units of reward a nat.
        observed: mean sequence KL of the update's roll-outs, nats; any finite number.
        target: wanted sequence KL in nats, above 0.
        episodes: completions in the update, above 0.
        horizon: episodes over which the controller reacts, above 0.

    Returns:
        The new weight, above 0.

    Raises:
        ValueError: a number is out of its range, or the horizon is so short that the weight could
            reach 0.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2; per update in place of per batch of
    fixed size.
    """
    check_positive(coef=coef, target=target, episodes=episodes, horizon=horizon)
    if not math.isfinite(observed):
        raise ValueError(f"observed KL must be finite, is {observed}")
    if ERROR_LIMIT * episodes >= horizon:
        raise ValueError(f"horizon {horizon} must exceed a fifth of the {episodes} episodes")
    error = min(max(observed / target - 1, -ERROR_LIMIT), ERROR_LIMIT)
    return coef * (1 + error * episodes / horizon)


def target_kl_coef(
    coef: float, first: float, observed: float, target: float, episodes: int, horizon: int
) -> float:
    """The KL weight for the next update as a Lagrange multiplier of "KL at most target".

    max(0, coef + first (observed / target - 1) episodes / horizon)

    It falls to 0 where the policy stays within the target by itself, and rises for as long as it
    does not: gradient ascent on the dual of the constrained problem.

    Args:
        coef: present weight, at least 0, units of reward a nat.
        first: the weight that the run began with, above 0; sets the size of the steps.
        observed: mean sequence KL of the update's roll-outs, nats; any finite number.
        target: largest wanted sequence KL in nats, above 0.
        episodes: completions in the update, above 0.
        horizon: episodes after which an error of 100 % has moved the weight by `first`.

    Returns:
        The new weight, at least 0.

    Raises:
        ValueError: a number is out of its range.

    Source: dual ascent; Boyd et al. 2011, "Distributed optimization and statistical learning via
    the alternating direction method of multipliers", section 2.1.
    """
    check_positive(first=first, target=target, episodes=episodes, horizon=horizon)
    if not (math.isfinite(observed) and coef >= 0):
        raise ValueError(f"coef must be at least 0 and observed finite, are {coef}, {observed}")
    return max(0.0, coef + first * (observed / target - 1) * episodes / horizon)
