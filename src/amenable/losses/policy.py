"""Policy-gradient losses. N completions, C completion tokens; unreduced, [N, C].

Reduce through `masked.py` or with the weights of `aggregation.py`. Only GSPO, of one ratio for a
whole completion, takes a mask. Log-ratios are limited to +-80, far outside any clip range, so that
what lies under False in the mask cannot overflow into the gradient of what lies under True.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import check_positive, check_precise, check_same_shape
from amenable.losses.masked import masked_mean

LOG_RATIO_LIMIT = 80.0


def ratios(
    logprobs: Float[Tensor, "N C"], old_logprobs: Float[Tensor, "N C"]
) -> Float[Tensor, "N C"]:
    """Probability of each token under the policy over that under the policy that sampled it.

    ratio = exp(logprobs - old_logprobs)

    Args:
        logprobs: [N, C] nats under the present policy.
        old_logprobs: [N, C] nats under the policy at roll-out, from the same code and
            micro-batches.

    Returns:
        [N, C], at least 0; exactly 1 before the first update.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    check_same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs)
    check_precise(logprobs=logprobs, old_logprobs=old_logprobs)
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def importance_weights(
    logprobs: Float[Tensor, "N C"], sampler_logprobs: Float[Tensor, "N C"], cap: float
) -> Float[Tensor, "N C"]:
    """Weights that make samples of another engine count as the policy's own, but for the cap.

    w = min(exp(logprobs - sampler_logprobs), cap)

    Constants: no gradient flows through them. Source: truncated importance sampling, Ionides 2008;
    per token as in V-trace, Espeholt et al. 2018, arXiv:1802.01561.

    Args:
        logprobs: [N, C] nats under the policy at roll-out, by the trainer.
        sampler_logprobs: [N, C] nats of the same weights, by the engine that drew the tokens.
        cap: at least 1.

    Returns:
        [N, C], at most `cap`; 1 where both say the same.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a cap below 1.
    """
    if cap < 1:
        raise ValueError(f"cap must be at least 1, not {cap}")
    return ratios(logprobs, sampler_logprobs).clamp(max=cap).detach()


def sequence_ratios(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    mask: Bool[Tensor, "N C"],
) -> Float[Tensor, "N C"]:
    """GSPO's ratio: the geometric mean of a completion's token ratios, at each of its tokens.

    s_n = exp(mean_t (logprobs_nt - old_logprobs_nt)), over real tokens

    The gradient flows through the mean, so one token's log-probability moves the ratio by
    s_n / L_n and all tokens of a completion share one fate under clipping.

    Args:
        logprobs: [N, C] nats under the present policy.
        old_logprobs: [N, C] nats under the policy at roll-out.
        mask: [N, C] True at real tokens.

    Returns:
        [N, C], the same number along each row; 1 for a completion without real tokens.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 7.
    """
    check_same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    check_precise(logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratios = masked_mean(logprobs - old_logprobs, mask, dim=1).unsqueeze(1)
    return log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().expand_as(logprobs)


def ppo_policy_loss(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    advantages: Float[Tensor, "N C"],
    clip_range: float | tuple[float, float],
    dual_clip: float = math.inf,
) -> Float[Tensor, "N C"]:
    """Clipped surrogate loss of each token, to be minimised.

    loss = max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), and at most -A dual_clip where A < 0

    Args:
        logprobs: [N, C] nats under the present policy; the gradient flows through these alone.
        old_logprobs: [N, C] nats under the policy at roll-out.
        advantages: [N, C] constants, in units of reward (or of its standard deviation once
            whitened).
        clip_range: in (0, 1], for both sides; or (low, high), DAPO's decoupled clip, with low in
            (0, 1] and high above 0.
        dual_clip: above 1; the ratio beyond which a bad token stops pushing. Infinity turns it off.

    Returns:
        [N, C] in the advantages' unit; -A where the policy has not moved.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a clip range outside (0, 1] (its high side: not
            above 0), or a dual clip that is not above 1.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, with the sign turned; two sides: Yu et
    al. 2025, arXiv:2503.14476, eq. 10; dual clip: Ye et al. 2020, arXiv:1912.09729.
    """
    _check_actions(logprobs, advantages)
    return _clipped_loss(ratios(logprobs, old_logprobs), advantages, clip_range, dual_clip)[0]


def clipped_tokens(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    advantages: Float[Tensor, "N C"],
    clip_range: float | tuple[float, float],
    dual_clip: float = math.inf,
) -> Bool[Tensor, "N C"]:
    """Whether clipping changes the token's loss, that is stops its gradient.

    Args:
        logprobs: as in `ppo_policy_loss`.
        old_logprobs: as in `ppo_policy_loss`.
        advantages: as in `ppo_policy_loss`.
        clip_range: as in `ppo_policy_loss`.
        dual_clip: as in `ppo_policy_loss`.

    Returns:
        [N, C] bool. A ratio outside the range counts only on the side that the advantage pushes it
        to, or where the dual clip holds it.

    Raises:
        ValueError: as `ppo_policy_loss`.
    """
    _check_actions(logprobs, advantages)
    return _clipped_loss(ratios(logprobs, old_logprobs), advantages, clip_range, dual_clip)[1]


def gspo_policy_loss(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    advantages: Float[Tensor, "N C"],
    mask: Bool[Tensor, "N C"],
    clip_range: float | tuple[float, float],
) -> Float[Tensor, "N C"]:
    """Clipped surrogate loss with one ratio a completion.

    loss_nt = max(-A_nt s_n, -A_nt clip(s_n, 1 - low, 1 + high)),  s from `sequence_ratios`

    The paper's objective is that of one advantage a completion, the same at all its tokens, and of
    the "sequence" weights of `token_weights`, under which a completion's tokens add up to its loss.

    Args:
        logprobs: [N, C] nats under the present policy; the gradient flows through these alone.
        old_logprobs: [N, C] nats under the policy at roll-out.
        advantages: [N, C] constants, in units of reward or of its standard deviation.
        mask: [N, C] True at real tokens.
        clip_range: as in `ppo_policy_loss`; ratios of whole completions move far less than those of
            tokens, the paper's range is (3e-4, 4e-4).

    Returns:
        [N, C] in the advantages' unit; what lies where the mask is False is to be left out.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a clip range out of bounds.

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 5.
    """
    _check_actions(logprobs, advantages)
    ratio = sequence_ratios(logprobs, old_logprobs, mask)
    return _clipped_loss(ratio, advantages, clip_range, math.inf)[0]


def gspo_clipped_tokens(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    advantages: Float[Tensor, "N C"],
    mask: Bool[Tensor, "N C"],
    clip_range: float | tuple[float, float],
) -> Bool[Tensor, "N C"]:
    """Whether clipping stops the gradient of the token's completion.

    Args:
        logprobs: as in `gspo_policy_loss`.
        old_logprobs: as in `gspo_policy_loss`.
        advantages: as in `gspo_policy_loss`.
        mask: as in `gspo_policy_loss`.
        clip_range: as in `gspo_policy_loss`.

    Returns:
        [N, C] bool.

    Raises:
        ValueError: as `gspo_policy_loss`.
    """
    _check_actions(logprobs, advantages)
    ratio = sequence_ratios(logprobs, old_logprobs, mask)
    return _clipped_loss(ratio, advantages, clip_range, math.inf)[1]


def _clipped_loss(
    ratio: Tensor, advantages: Tensor, clip_range: float | tuple[float, float], dual_clip: float
) -> tuple[Tensor, Tensor]:
    low, high = _clip_sides(clip_range)
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, is {dual_clip}")
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss, held = torch.maximum(plain, clipped), clipped > plain
    if math.isinf(dual_clip):
        return loss, held
    most = torch.where(advantages < 0, -advantages * dual_clip, math.inf)
    return torch.minimum(loss, most), held | (loss > most)


def _clip_sides(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(clip_range, tuple):
        low, high = clip_range
        check_positive(clip_range_low=low, clip_range_high=high)
        if low > 1:
            raise ValueError(f"clip_range_low must be at most 1, is {low}")
        return low, high
    check_positive(clip_range=clip_range)
    if clip_range > 1:
        raise ValueError(f"clip_range must be at most 1, is {clip_range}")
    return clip_range, clip_range


def _check_actions(logprobs: Tensor, advantages: Tensor) -> None:
    check_same_shape(2, logprobs=logprobs, advantages=advantages)
    check_precise(advantages=advantages)
