"""Our PPO losses and GAE against torchtune's, to 1e-5 in float32.

Their masks mean what ours do (True counts), except that their GAE whitens its advantages, with the
unbiased variance and the mean added back (their `shift_mean=True`), and reads values and rewards
behind the last real token, which are therefore 0 in what it is given.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchtune", reason="in an environment of its own: make test-peers")

from torchtune.rlhf import estimate_advantages, get_rewards_ppo
from torchtune.rlhf.loss import DPOLoss, PPOLoss

from amenable.losses.advantages import gae, shape_rewards
from amenable.losses.direct_preference import conservative_dpo_loss, dpo_loss
from amenable.losses.kl import k1
from amenable.losses.masked import masked_mean, masked_whiten
from amenable.losses.policy import clipped_tokens, ppo_policy_loss, ratios
from amenable.losses.value import value_loss

TOLERANCE = 1e-5
ROWS, COLUMNS = 6, 9
MASK = torch.arange(COLUMNS) < torch.tensor([9, 1, 4, 8, 2, 6]).unsqueeze(1)


def numbers(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(ROWS, COLUMNS, generator=generator)


def assert_same(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    print(f"\n{name}: differs by {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize(("clip_range", "value_clip_range"), [(0.1, 0.2), (0.2, 0.5)])
def test_ppo_loss(clip_range: float, value_clip_range: float) -> None:
    old, advantages, returns, old_values = (numbers(seed) for seed in range(4))
    old = old - 3
    logprobs = (old + numbers(4, 0.3)).requires_grad_()
    values = (old_values + numbers(5, 0.5)).requires_grad_()
    peer = PPOLoss(clip_range, value_clip_range, value_coeff=0.1)
    total, policy, value, ratio, clipped = peer(
        old, logprobs, advantages, old_values, values, returns, MASK, MASK
    )
    losses = ppo_policy_loss(logprobs, old, advantages, clip_range)
    ours_policy = masked_mean(losses, MASK)
    ours_value = masked_mean(value_loss(values, old_values, returns, value_clip_range), MASK)
    ours = ours_policy + 0.1 * ours_value
    assert_same("policy loss", ours_policy, policy)
    assert_same("value loss", ours_value, value)
    assert_same("total", ours, total)
    assert_same("ratio", ratios(logprobs, old).mean(), ratio)
    share = masked_mean(clipped_tokens(logprobs, old, advantages, clip_range), MASK)
    assert 0.1 < share < 0.9
    assert_same("clip fraction", share, clipped)
    theirs_grad = torch.autograd.grad(total, (logprobs, values))
    ours_grad = torch.autograd.grad(ours, (logprobs, values))
    for name, mine, other in zip(("logprobs", "values"), ours_grad, theirs_grad, strict=True):
        assert_same(f"gradient of {name}", mine, other)


def test_rewards() -> None:
    logprobs, ref, scores = numbers(0), numbers(1), numbers(2)[:, 0]
    last = MASK.sum(dim=1) - 1
    theirs, _, _ = get_rewards_ppo(scores, logprobs, ref, 0.05, last)
    ours = shape_rewards(scores, k1(logprobs, ref), MASK, 0.05)
    assert_same("rewards", ours[MASK], theirs[MASK])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.5, 0)])
def test_gae(gamma: float, gae_lambda: float) -> None:
    rewards, values = numbers(0), numbers(1)
    theirs, their_returns = estimate_advantages(
        values * MASK, rewards * MASK, gamma, gae_lambda, MASK
    )
    advantages, returns = gae(rewards, values, MASK, gamma, gae_lambda)
    # theirs = mean + (A - mean) / unbiased deviation
    count = int(MASK.sum())
    white = masked_whiten(advantages, MASK) * math.sqrt((count - 1) / count)
    ours = torch.where(MASK, white + masked_mean(advantages, MASK), 0.0)
    assert_same(f"whitened advantages, gamma {gamma}, lambda {gae_lambda}", ours, theirs)
    assert_same("returns", returns, their_returns)


def test_gae_before_whitening() -> None:
    """Returns less values are the raw advantages, whatever their whitening does."""
    rewards, values = numbers(2), numbers(3)
    _, their_returns = estimate_advantages(values * MASK, rewards * MASK, 0.97, 0.9, MASK)
    advantages, _ = gae(rewards, values, MASK, 0.97, 0.9)
    assert_same("advantages", advantages, their_returns - values * MASK)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing: float) -> None:
    """TRL 1.16 has no label smoothing in its DPO; torchtune's is that of conservative DPO."""
    sums = [(numbers(seed, 5.0)[:, 0] - 20).requires_grad_() for seed in range(4)]
    theirs, _, _ = DPOLoss(0.3, smoothing)(*sums)
    ours = conservative_dpo_loss(*sums, beta=0.3, label_smoothing=smoothing)
    assert_same(f"DPO, smoothing {smoothing}", ours, theirs)
    if smoothing == 0:
        assert_same("plain DPO", dpo_loss(*sums, beta=0.3), theirs)
    grads = [torch.autograd.grad(x.sum(), sums[:2]) for x in (ours, theirs)]
    for mine, other in zip(*grads, strict=True):
        assert_same("gradient", mine, other)
