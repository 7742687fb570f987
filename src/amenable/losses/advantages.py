"""From scores to advantages. N completions, C completion tokens; P prompts with G completions each.

A mask is True at real tokens, which are contiguous from column 0 (completions are padded on the
right). The score falls on the last real token: no extra slot behind the end of sequence. The value
after the last real token is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from amenable.losses.checks import (
    check_fraction,
    check_leading_mask,
    check_precise,
    check_same_shape,
)
from amenable.losses.masked import masked_whiten

STD_EPS = 1e-4


def shape_rewards(
    scores: Float[Tensor, " N"],
    kl: Float[Tensor, "N C"],
    mask: Bool[Tensor, "N C"],
    kl_coef: float,
) -> Float[Tensor, "N C"]:
    """Reward of each token: the KL penalty everywhere, the score once at the end.

    reward_t = -kl_coef kl_t + score [t is the last real token]

    Args:
        scores: [N] one score a completion, in units of reward.
        kl: [N, C] per-token KL estimates against the reference, nats; `k1` makes the sum over
            tokens an unbiased estimate of the sequence KL.
        mask: [N, C] True at real tokens, contiguous from column 0.
        kl_coef: units of reward a nat.

    Returns:
        [N, C]; 0 where the mask is False, so also for a completion without real tokens.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a mask with a gap.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, spread over tokens.
    """
    check_same_shape(2, kl=kl, mask=mask)
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"scores must be [N] for kl [N, C], are {tuple(scores.shape)}")
    check_precise(scores=scores, kl=kl)
    check_leading_mask(mask)
    penalties = torch.where(mask, -kl_coef * kl, 0.0)
    return penalties + torch.where(_last_tokens(mask), scores.unsqueeze(1), 0.0)


def gae(
    rewards: Float[Tensor, "N C"],
    values: Float[Tensor, "N C"],
    mask: Bool[Tensor, "N C"],
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """Generalised advantage estimates and the returns that the critic is trained on.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma gae_lambda A_{t+1};  R_t = A_t + V_t

    Args:
        rewards: [N, C] units of reward.
        values: [N, C] the critic's values at roll-out; V_t is read where token t is predicted, and
            counts as 0 after the last real token.
        mask: [N, C] True at real tokens, contiguous from column 0.
        gamma: discount a token, in [0, 1].
        gae_lambda: in [0, 1]; 0 gives the TD error, 1 the discounted sum of rewards minus the
            value.

    Returns:
        Advantages and returns, [N, C] each, in units of reward; both 0 where the mask is False.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a mask with a gap, or gamma or gae_lambda outside
            [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 11 and 16.
    """
    check_same_shape(2, rewards=rewards, values=values, mask=mask)
    check_precise(rewards=rewards, values=values)
    check_leading_mask(mask)
    check_fraction(gamma=gamma, gae_lambda=gae_lambda)
    kept_values = torch.where(mask, values, 0.0)
    next_values = _shifted_left(kept_values)
    deltas = torch.where(mask, rewards, 0.0) + gamma * next_values - kept_values
    advantages = _discounted_sums(deltas, gamma * gae_lambda)
    return advantages, advantages + kept_values


def group_relative(
    scores: Float[Tensor, "P G"], scale: Literal["std"] | None = "std"
) -> Float[Tensor, "P G"]:
    """Scores relative to those of the same prompt's other completions, as in GRPO.

    A_pg = (s_pg - mean_g s_pg) / (std_g s_pg + 1e-4)

    Args:
        scores: [P, G] units of reward, G at least 2.
        scale: "std" divides by the group's sample standard deviation (division by G - 1); None
            does not, which takes away the extra weight of prompts whose scores hardly differ.

    Returns:
        [P, G]; each row sums to 0; all 0 for a prompt whose scores are equal.

    Raises:
        ValueError: wrong rank or dtype, fewer than two completions a prompt, or an unknown scale.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without scale: Liu et al. 2025,
    arXiv:2503.20783.
    """
    _check_groups(scores)
    if scale not in ("std", None):
        raise ValueError(f"scale must be 'std' or None, is {scale!r}")
    centred = scores - scores.mean(dim=1, keepdim=True)
    return centred if scale is None else centred / (scores.std(dim=1, keepdim=True) + STD_EPS)


def leave_one_out(scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Scores minus the mean score of the same prompt's other completions, as in RLOO.

    A_pg = s_pg - 1/(G-1) sum_{h != g} s_ph

    Args:
        scores: [P, G] units of reward, G at least 2.

    Returns:
        [P, G]; each row sums to 0.

    Raises:
        ValueError: wrong rank or dtype, or fewer than two completions a prompt.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.
    """
    _check_groups(scores)
    others = (scores.sum(dim=1, keepdim=True) - scores) / (scores.shape[1] - 1)
    return scores - others


def reinforce_plus_plus(
    rewards: Float[Tensor, "N C"], mask: Bool[Tensor, "N C"], gamma: float = 1.0
) -> Float[Tensor, "N C"]:
    """Returns whitened over all tokens of the batch, without groups or a critic, as in REINFORCE++.

    G_t = sum_{u >= t} gamma^(u - t) r_u;  A = (G - mean G) / std G, over the batch's real tokens

    Args:
        rewards: [N, C] units of reward, from `shape_rewards` with its KL penalty (k1 in the paper).
        mask: [N, C] True at real tokens, contiguous from column 0, of the whole roll-out batch.
        gamma: discount a token, in [0, 1].

    Returns:
        [N, C] in standard deviations; 0 where the mask is False, and throughout where all returns
        are equal.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a mask with a gap, or a gamma outside [0, 1].

    Source: Hu et al. 2025, arXiv:2501.03262, section 3 (REINFORCE++). The batch's mean and
    deviation contain the completion itself, a bias of order 1 / N.
    """
    check_same_shape(2, rewards=rewards, mask=mask)
    check_precise(rewards=rewards)
    check_leading_mask(mask)
    check_fraction(gamma=gamma)
    return masked_whiten(_discounted_sums(torch.where(mask, rewards, 0.0), gamma), mask)


def _last_tokens(mask: Tensor) -> Tensor:
    return mask & ~_shifted_left(mask)


def _shifted_left(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 1))[:, 1:]


def _discounted_sums(deltas: Tensor, discount: float) -> Tensor:
    sums = torch.zeros_like(deltas)
    running = deltas.new_zeros(deltas.shape[0])
    for column in reversed(range(deltas.shape[1])):
        running = deltas[:, column] + discount * running
        sums[:, column] = running
    return sums


def _check_groups(scores: Tensor) -> None:
    check_same_shape(2, scores=scores)
    check_precise(scores=scores)
    if scores.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions a prompt, has {scores.shape[1]}")
