"""Losses on pairs of completions of one prompt. N pairs; every loss is unreduced, [N]."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from amenable.losses.checks import check_positive, check_precise, check_same_shape


def bradley_terry_loss(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    margin: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood that the chosen completion is preferred.

    loss_i = -log sigmoid(chosen_i - rejected_i - margin_i)

    Args:
        chosen: [N] reward-model scores in logits, any real number.
        rejected: [N] scores of the completions not picked, same scale.
        margin: [N] by how much the chosen score should lead; None is 0.

    Returns:
        [N] nats per comparison; log 2 where the scores are equal and there is no margin.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.

    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (K = 2); the margin
    is that of Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    """
    lead = _difference(chosen, rejected)
    if margin is not None:
        check_same_shape(1, chosen=chosen, margin=margin)
        check_precise(margin=margin)
        lead = lead - margin
    return -logsigmoid(lead)


def tie_loss(first: Float[Tensor, " N"], second: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Cross-entropy of the Bradley-Terry model against the soft label one half.

    loss_i = -0.5 log sigmoid(d_i) - 0.5 log sigmoid(-d_i),  d = first - second

    Args:
        first: [N] scores of the completions of tied pairs, in logits.
        second: [N] scores of their counterparts.

    Returns:
        [N] nats per comparison; smallest, log 2, where the scores are equal; the order of the sides
        is immaterial.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    difference = _difference(first, second)
    return -0.5 * (logsigmoid(difference) + logsigmoid(-difference))


def centring_loss(
    chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Penalty that draws the mean score of each pair to 0, which Bradley-Terry leaves free.

    loss_i = (chosen_i + rejected_i)^2

    Args:
        chosen: [N] scores in logits.
        rejected: [N] scores in logits.

    Returns:
        [N] squared logits, at least 0.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.

    Source: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    _check_pair(chosen, rejected)
    return (chosen + rejected).square()


def dpo_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    ref_chosen: Float[Tensor, " N"],
    ref_rejected: Float[Tensor, " N"],
    beta: float,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood of the choice under the reward that the policy itself implies.

    loss_i = -log sigmoid(beta ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))_i)

    Args:
        policy_chosen: [N] sequence log-probabilities of the chosen completions, nats, summed over
            real tokens.
        policy_rejected: [N] the same of the rejected ones.
        ref_chosen: [N] the same under the frozen reference.
        ref_rejected: [N] the same under the frozen reference.
        beta: above 0; the weight of the KL term in the objective that is solved.

    Returns:
        [N] nats per comparison; log 2 where policy and reference agree.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a beta that is not above 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    check_positive(beta=beta)
    policy_lead = _difference(policy_chosen, policy_rejected)
    ref_lead = _difference(ref_chosen, ref_rejected)
    check_same_shape(1, policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    return -logsigmoid(beta * (policy_lead - ref_lead))


def _difference(first: Tensor, second: Tensor) -> Tensor:
    _check_pair(first, second)
    return first - second


def _check_pair(first: Tensor, second: Tensor) -> None:
    check_same_shape(1, first=first, second=second)
    check_precise(first=first, second=second)
