"""The clipped policy-gradient loss. N completions, C completion tokens; unreduced, [N, C].

None of these takes a mask: reduce through `masked.py`. Log-ratios are limited to +-80, far outside
any clip range, so that what lies under False in the mask cannot overflow into the gradient of what
lies under True.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import check_positive, check_precise, check_same_shape

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


def ppo_policy_loss(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    advantages: Float[Tensor, "N C"],
    clip_range: float,
) -> Float[Tensor, "N C"]:
    """Clipped surrogate loss of each token, to be minimised.

    loss = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))

    Args:
        logprobs: [N, C] nats under the present policy; the gradient flows through these alone.
        old_logprobs: [N, C] nats under the policy at roll-out.
        advantages: [N, C] constants, in units of reward (or of its standard deviation once
            whitened).
        clip_range: in (0, 1].

    Returns:
        [N, C] in the advantages' unit; -A where the policy has not moved.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a clip range outside (0, 1].

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, with the sign turned.
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, clip_range)
    return torch.maximum(plain, clipped)


def clipped_tokens(
    logprobs: Float[Tensor, "N C"],
    old_logprobs: Float[Tensor, "N C"],
    advantages: Float[Tensor, "N C"],
    clip_range: float,
) -> Bool[Tensor, "N C"]:
    """Whether clipping changes the token's loss, that is stops its gradient.

    Args:
        logprobs: as in `ppo_policy_loss`.
        old_logprobs: as in `ppo_policy_loss`.
        advantages: as in `ppo_policy_loss`.
        clip_range: as in `ppo_policy_loss`.

    Returns:
        [N, C] bool. A ratio outside the range counts only on the side that the advantage pushes it
        to.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a clip range outside (0, 1].
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, clip_range)
    return clipped > plain


def _surrogates(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    check_positive(clip_range=clip_range)
    if clip_range > 1:
        raise ValueError(f"clip_range must be at most 1, is {clip_range}")
    check_same_shape(2, logprobs=logprobs, advantages=advantages)
    check_precise(advantages=advantages)
    ratio = ratios(logprobs, old_logprobs)
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
