"""The critic's loss and how well it explains the returns. N completions, C completion tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import check_positive, check_precise, check_same_shape
from amenable.losses.masked import masked_var


def value_loss(
    values: Float[Tensor, "N C"],
    old_values: Float[Tensor, "N C"],
    returns: Float[Tensor, "N C"],
    clip_range: float,
) -> Float[Tensor, "N C"]:
    """Squared error of the values, made pessimistic by clipping their move.

    loss = 0.5 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)

    Args:
        values: [N, C] the critic's present values, in units of reward; the gradient flows through
            these alone.
        old_values: [N, C] its values at roll-out.
        returns: [N, C] targets, advantages + old values.
        clip_range: above 0, in units of reward; infinity turns clipping off.

    Returns:
        [N, C] squared units of reward, unreduced.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a clip range that is not above 0.

    Source: the value clipping of OpenAI baselines' ppo2 as described in Huang et al. 2024,
    arXiv:2403.17031.
    """
    check_positive(clip_range=clip_range)
    check_same_shape(2, values=values, old_values=old_values, returns=returns)
    check_precise(values=values, old_values=old_values, returns=returns)
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(
    values: Float[Tensor, "N C"], returns: Float[Tensor, "N C"], mask: Bool[Tensor, "N C"]
) -> Float[Tensor, ""]:
    """Share of the returns' variance that the values account for.

    1 - Var(returns - values) / Var(returns), over real tokens

    Args:
        values: [N, C] predictions, in units of reward.
        returns: [N, C] targets.
        mask: [N, C] True at real tokens.

    Returns:
        A scalar, at most 1; 0 for a constant prediction, negative for one worse than that. 0 also
        where the returns do not vary or nothing counts: there is nothing to explain.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    check_same_shape(2, values=values, returns=returns, mask=mask)
    check_precise(values=values, returns=returns)
    total = masked_var(returns, mask)
    share = 1 - masked_var(returns - values, mask) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, share, 0.0)
