"""Losses of reward models on pairs of completions. N pairs; every loss is unreduced, [N]."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from amenable.losses.checks import (
    check_below_half,
    check_counts,
    check_precise,
    check_same_shape,
)


def bradley_terry_loss(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    margin: Float[Tensor, " N"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood that the chosen completion is preferred.

    loss_i = -(1 - label_smoothing) log sigmoid(lead_i) - label_smoothing log sigmoid(-lead_i),
    lead_i = chosen_i - rejected_i - margin_i

    Args:
        chosen: [N] reward-model scores in logits, any real number.
        rejected: [N] scores of the completions not picked, same scale.
        margin: [N] by how much the chosen score should lead; None is 0.
        label_smoothing: share of the labels taken to be wrong, in [0, 0.5). Above 0 the loss has a
            minimum, at a lead of log((1 - label_smoothing) / label_smoothing).

    Returns:
        [N] nats per comparison; log 2 where the scores are equal and there is no margin.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a smoothing outside [0, 0.5).

    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (K = 2); the margin
    is that of Touvron et al. 2023, arXiv:2307.09288, eq. 2; label smoothing as in Wang et al. 2024,
    arXiv:2401.06080.
    """
    check_below_half(label_smoothing=label_smoothing)
    lead = _difference(chosen, rejected)
    if margin is not None:
        check_same_shape(1, chosen=chosen, margin=margin)
        check_precise(margin=margin)
        lead = lead - margin
    if label_smoothing == 0:
        return -logsigmoid(lead)
    return -(1 - label_smoothing) * logsigmoid(lead) - label_smoothing * logsigmoid(-lead)


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


def length_margin(
    chosen_tokens: Int[Tensor, " N"],
    rejected_tokens: Int[Tensor, " N"],
    weight: float | Float[Tensor, ""],
) -> Float[Tensor, " N"]:
    """Margin that lets length, and not the score, account for a liking of longer completions.

    margin_i = -weight (chosen_tokens_i - rejected_tokens_i)

    `bradley_terry_loss(chosen, rejected, length_margin(...))` is then
    -log sigmoid(chosen - rejected + weight (chosen_tokens - rejected_tokens)): a choice that its
    length explains moves the scores less, one against its length more.

    Args:
        chosen_tokens: [N] real tokens of the chosen completions.
        rejected_tokens: [N] real tokens of the others.
        weight: logits a token; above 0 where raters like long completions. A scalar tensor is
            learned with the scores, as a second expert that sees nothing but the length.

    Returns:
        [N] logits, of the weight's dtype (float32 for a number); 0 where the lengths are equal.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a negative count, or a weight that is a tensor
            and no scalar.

    Source: Park et al. 2024, arXiv:2403.19159 (R-DPO), the term alpha |y_w| - alpha |y_l|; with a
    learned weight the product of experts of Shen et al. 2023, arXiv:2310.05199, whose biased expert
    is linear in length. Departure: on a reward model's scores in place of the implicit ones.
    """
    check_same_shape(1, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)
    check_counts(chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)
    excess = chosen_tokens - rejected_tokens
    if not isinstance(weight, Tensor):
        return -weight * excess.float()
    check_same_shape(0, weight=weight)
    check_precise(weight=weight)
    return -weight * excess


def _difference(first: Tensor, second: Tensor) -> Tensor:
    _check_pair(first, second)
    return first - second


def _check_pair(first: Tensor, second: Tensor) -> None:
    check_same_shape(1, first=first, second=second)
    check_precise(first=first, second=second)
