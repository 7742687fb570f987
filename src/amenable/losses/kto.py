"""KTO: completions that are each desirable or not, without pairs. N completions; unreduced, [N]."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import check_bool, check_positive, check_precise, check_same_shape


def kto_loss(
    policy: Float[Tensor, " N"],
    ref: Float[Tensor, " N"],
    desirable: Bool[Tensor, " N"],
    reference_point: Float[Tensor, ""],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[Tensor, " N"]:
    """Loss of utility against a reference point, in the manner of Kahneman and Tversky.

    loss_i = w_i sigmoid(-s_i beta (policy_i - ref_i - z)),
    s_i = 1 and w_i = desirable_weight where desirable, else -1 and undesirable_weight

    Its sum is least on the simplex's boundary: there is no closed optimum to land on.

    Args:
        policy: [N] sequence log-probabilities, nats, summed over real tokens.
        ref: [N] the same under the frozen reference.
        desirable: [N] True where the completion is desirable.
        reference_point: z, a scalar in nats, from `kto_reference_point` over the whole batch (not a
            micro-batch, or accumulation would change the loss). No gradient flows through it.
        beta: above 0; how fast utility saturates.
        desirable_weight: above 0; the paper's lambda_D.
        undesirable_weight: above 0; lambda_U. The paper keeps (weight x count) of the two kinds
            between 1 : 1 and 4 : 3.

    Returns:
        [N] in [0, weight], utility lost; weight / 2 where the log-ratio is z.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a number that is not above 0.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: lambda_y - v(x, y).
    """
    check_positive(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    check_same_shape(1, policy=policy, ref=ref, desirable=desirable)
    check_same_shape(0, reference_point=reference_point)
    check_precise(policy=policy, ref=ref, reference_point=reference_point)
    check_bool(desirable=desirable)
    gain = beta * (policy - ref - reference_point.detach())
    lost = torch.sigmoid(torch.where(desirable, -gain, gain))
    return torch.where(desirable, desirable_weight, undesirable_weight) * lost


def kto_reference_point(policy: Float[Tensor, " N"], ref: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """KTO's estimate of KL(policy || reference), from completions paired with other prompts.

    z = max(0, mean_i (policy_i - ref_i)), detached

    Args:
        policy: [N] sequence log-probabilities, nats, of completions that belong to *another* prompt
            of the batch.
        ref: [N] the same under the frozen reference.

    Returns:
        A scalar in nats, at least 0, without gradient; 0 for an empty batch. Biased: the
        completions are not drawn from the policy.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1, the practical estimate of z_0.
    """
    check_same_shape(1, policy=policy, ref=ref)
    check_precise(policy=policy, ref=ref)
    total = (policy - ref).detach().sum()
    return (total / max(len(policy), 1)).clamp(min=0)
