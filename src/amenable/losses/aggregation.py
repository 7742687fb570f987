"""How the losses of tokens add up to one number: weights [N, C] that hold the denominator.

The loss of an update is (weights * losses).sum(), over all its completions. Make the weights once,
from the mask of the whole update, and give each micro-batch its rows of them: then accumulating
8 x 1 equals 1 x 8 whatever the lengths.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import check_mask, check_positive, check_same_shape

Aggregation = Literal["token", "sequence", "constant"]


def token_weights(
    mask: Bool[Tensor, "N C"],
    aggregation: Aggregation,
    length: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "N C"]:
    """Weight of each token in the loss of the update.

    token:     1 / sum_n L_n          every token alike: long completions weigh more
    sequence:  1 / (M L_n)            every completion alike: a token of a long one weighs less
    constant:  1 / (M length)         as token, but independent of how long completions happen to be

    with L_n the real tokens of completion n and M the completions that have any.

    Args:
        mask: [N, C] True at real tokens, of the whole update.
        aggregation: "token" is DAPO's, "sequence" GRPO's as published (and GSPO's), "constant" Dr.
            GRPO's.
        length: for "constant" alone, above 0: the longest completion allowed, in tokens. At 1 the
            loss is the mean over completions of the sum over tokens: the policy gradient itself.
        dtype: float32 or float64, that of the losses.

    Returns:
        [N, C]; 0 where the mask is False. They sum to 1 under "token" and "sequence", to the mean
        L_n / length under "constant". A completion without real tokens leaves the denominator.

    Raises:
        ValueError: wrong rank or dtype, an unknown aggregation, or a length that is not above 0.

    Source: token: Yu et al. 2025, arXiv:2503.14476, eq. 12; sequence: Shao et al. 2024,
    arXiv:2402.03300, eq. 3; constant: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    check_same_shape(2, mask=mask)
    check_mask(mask)
    check_positive(length=length)
    kept = mask.to(dtype)
    if aggregation == "token":
        return kept / kept.sum().clamp(min=1)
    lengths = kept.sum(dim=1, keepdim=True)
    completions = (lengths > 0).sum().clamp(min=1)
    if aggregation == "sequence":
        return kept / (lengths.clamp(min=1) * completions)
    if aggregation == "constant":
        return kept / (length * completions)
    raise ValueError(f"aggregation must be 'token', 'sequence' or 'constant', is {aggregation!r}")
