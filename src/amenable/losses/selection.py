"""From scores of sampled completions to what is trained on: the best ones, or labelled pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from amenable.losses.checks import check_precise, check_same_shape


def best_of_n(scores: Float[Tensor, "P G"]) -> Int[Tensor, " P"]:
    """Index of each prompt's best completion, as in best-of-n sampling and expert iteration.

    i_p = argmax_g s_pg, the first of them where several are best

    One round lands on the distribution of the best of G draws, which has at most
    log G - (G - 1) / G nats of KL to the sampling policy.

    Args:
        scores: [P, G] units of reward, G at least 1.

    Returns:
        [P] int64 in [0, G).

    Raises:
        ValueError: wrong rank or dtype, no completion, or a score that is not a number.

    Source: Stiennon et al. 2020, arXiv:2009.01325; the KL is bounded in Beirami et al. 2024,
    arXiv:2401.01879.
    """
    check_same_shape(2, scores=scores)
    check_precise(scores=scores)
    if scores.shape[1] < 1:
        raise ValueError("there is no completion to choose from")
    if bool(scores.isnan().any()):
        row = int(scores.isnan().any(dim=1).nonzero()[0])
        raise ValueError(f"scores of prompt {row} hold NaN: leave failed completions out first")
    best = scores.max(dim=1, keepdim=True).values
    return (scores == best).int().argmax(dim=1)


def choice_probabilities(
    first: Float[Tensor, " N"], second: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Soft labels: the probability that the first completion is preferred, under Bradley-Terry.

    p_i = sigmoid(first_i - second_i)

    The label "the higher score is chosen" is another: it asks for an infinite lead, and online DPO
    on it diverges.

    Args:
        first: [N] scores of the first completions, in logits.
        second: [N] scores of the second ones.

    Returns:
        [N] in [0, 1]; 1/2 where the scores are equal; those of swapped sides sum to 1.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.

    Source: Bradley and Terry 1952; for online DPO, Guo et al. 2024, arXiv:2402.04792.
    """
    check_same_shape(1, first=first, second=second)
    check_precise(first=first, second=second)
    return torch.sigmoid(first - second)


def sampled_choices(
    first: Float[Tensor, " N"], second: Float[Tensor, " N"], uniform: Float[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """Sampled labels: whether a Bradley-Terry rater prefers the first completion.

    c_i = [uniform_i < sigmoid(first_i - second_i)]

    Args:
        first: [N] scores of the first completions, in logits.
        second: [N] scores of the second ones.
        uniform: [N] independent draws from [0, 1); the caller owns the generator.

    Returns:
        [N] True where the first is preferred.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a draw outside [0, 1).

    Source: as `choice_probabilities`.
    """
    check_same_shape(1, first=first, uniform=uniform)
    check_precise(uniform=uniform)
    if not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError("uniform must be in [0, 1)")
    return uniform < choice_probabilities(first, second)
