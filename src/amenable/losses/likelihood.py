"""Log-probabilities of tokens and of whole completions.

N completions, C completion tokens, V vocabulary entries. Logits may come in half precision and are
widened to float32 before anything is exponentiated. The target's logit minus one log-sum-exp is
used in place of a full log-softmax, so float32 logits at temperature 1 are not copied. Callers
slice the logits to completion positions first.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from amenable.losses.checks import (
    check_counts,
    check_mask,
    check_positive,
    check_precise,
    check_same_shape,
)
from amenable.losses.masked import masked_sum


def token_logprobs(
    logits: Float[Tensor, "N C V"], targets: Int[Tensor, "N C"], temperature: float = 1.0
) -> Float[Tensor, "N C"]:
    """Log-probability of each target token under softmax(logits / temperature).

    log p_t = z_t[target] - log sum_v exp z_t[v],  z = logits / temperature

    Args:
        logits: [N, C, V]; position t holds the logits that predict target t. Any floating dtype.
        targets: [N, C] token ids in [0, V), also where they will be masked: use the pad id, not
            -100.
        temperature: above 0; the one that the tokens were sampled at.

    Returns:
        [N, C] nats, at most 0; float32, or float64 for float64 logits.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a temperature that is not above 0.

    Source: Huang et al. 2024, arXiv:2403.17031: the sampling temperature divides the logits in
    every log-probability.
    """
    _check_logits(logits, temperature)
    check_same_shape(2, targets=targets, logits_positions=logits[..., 0])
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 token ids, are {targets.dtype}")
    scaled = _scaled(logits, temperature)
    picked = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return picked - scaled.logsumexp(dim=-1)


def token_entropy(logits: Float[Tensor, "N C V"], temperature: float = 1.0) -> Float[Tensor, "N C"]:
    """Entropy of softmax(logits / temperature) at each position.

    H_t = -sum_v p_t[v] log p_t[v], where an entry with p = 0 (logit -inf) adds nothing

    Args:
        logits: [N, C, V], any floating dtype.
        temperature: above 0.

    Returns:
        [N, C] nats in [0, log V]; float32, or float64 for float64 logits.

    Raises:
        ValueError: wrong rank or dtype, or a temperature that is not above 0.
    """
    _check_logits(logits, temperature)
    scaled = _scaled(logits, temperature)
    logprobs = scaled - scaled.logsumexp(dim=-1, keepdim=True)
    logprobs = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0 * -inf would be NaN
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def sequence_logprobs(
    logprobs: Float[Tensor, "N C"], mask: Bool[Tensor, "N C"]
) -> Float[Tensor, " N"]:
    """Log-probability of each completion: the sum over its real tokens.

    Args:
        logprobs: [N, C] nats.
        mask: [N, C] True at the completion's real tokens, its end-of-sequence token included.

    Returns:
        [N] nats; 0 for a completion without real tokens.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    check_same_shape(2, logprobs=logprobs, mask=mask)
    check_precise(logprobs=logprobs)
    return masked_sum(logprobs, mask, dim=1)


def mean_logprobs(
    sequence_logprobs: Float[Tensor, " N"], tokens: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Log-probability a token: the completion's sum over its number of real tokens.

    Args:
        sequence_logprobs: [N] nats, summed over real tokens.
        tokens: [N] real tokens of each completion, its end-of-sequence token included.

    Returns:
        [N] nats a token; 0 for a completion without real tokens, whose sum is 0.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a negative count.
    """
    check_same_shape(1, sequence_logprobs=sequence_logprobs, tokens=tokens)
    check_precise(sequence_logprobs=sequence_logprobs)
    check_counts(tokens=tokens)
    return sequence_logprobs / tokens.clamp(min=1)


def cross_entropy(
    logprobs: Float[Tensor, "N C"], mask: Bool[Tensor, "N C"]
) -> Float[Tensor, "N C"]:
    """Negative log-likelihood of each token that counts; the SFT loss before its reduction.

    Args:
        logprobs: [N, C] nats, of the demonstrated tokens.
        mask: [N, C] True where the token is trained on.

    Returns:
        [N, C] nats, unreduced; 0 where the mask is False.

    Raises:
        ValueError: wrong ranks, shapes or dtypes.
    """
    check_same_shape(2, logprobs=logprobs, mask=mask)
    check_precise(logprobs=logprobs)
    check_mask(mask)
    return torch.where(mask, -logprobs, 0.0)


def _check_logits(logits: Tensor, temperature: float) -> None:
    check_same_shape(3, logits=logits)
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, are {logits.dtype}")
    check_positive(temperature=temperature)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature
