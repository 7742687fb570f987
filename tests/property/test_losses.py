"""What holds of the losses whatever the numbers: padding, order, sides, signs."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amenable.losses.advantages import gae, group_relative, leave_one_out, shape_rewards
from amenable.losses.direct_preference import dpo_loss
from amenable.losses.kl import adaptive_kl_coef, k1, k2, k3, sequence_kl
from amenable.losses.likelihood import (
    cross_entropy,
    sequence_logprobs,
    token_entropy,
    token_logprobs,
)
from amenable.losses.masked import masked_mean, masked_sum, masked_var, masked_whiten
from amenable.losses.policy import clipped_tokens, ppo_policy_loss, ratios
from amenable.losses.preference import bradley_terry_loss, centring_loss, tie_loss
from amenable.losses.value import explained_variance, value_loss

from .strategies import groups, pairs, tensors, token_batches

GARBAGE = float("nan")


def padded(values: Tensor, columns: int = 2) -> Tensor:
    filler = False if values.dtype == torch.bool else GARBAGE
    return torch.nn.functional.pad(values, (0, columns), value=filler)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@given(token_batches(1))
def test_padding_changes_no_reduction(batch: tuple[Tensor, ...]) -> None:
    values, mask = batch
    wide, wide_mask = padded(values), padded(mask)
    for reduce in (masked_sum, masked_mean, masked_var):
        assert close(reduce(values, mask), reduce(wide, wide_mask))
    assert close(padded(masked_whiten(values, mask)).nan_to_num(), masked_whiten(wide, wide_mask))
    assert close(sequence_logprobs(values, mask), sequence_logprobs(wide, wide_mask))
    assert close(sequence_kl(values, mask), sequence_kl(wide, wide_mask))
    assert close(cross_entropy(values, mask).sum(), cross_entropy(wide, wide_mask).sum())


@given(token_batches(1))
def test_masking_equals_slicing(batch: tuple[Tensor, ...]) -> None:
    values, mask = batch
    kept = values[mask].tolist()
    mean = math.fsum(kept) / max(len(kept), 1)
    spread = math.fsum((x - mean) ** 2 for x in kept) / max(len(kept), 1)
    assert math.isclose(masked_sum(values, mask).item(), math.fsum(kept), abs_tol=1e-9)
    assert math.isclose(masked_mean(values, mask).item(), mean, abs_tol=1e-9)
    assert math.isclose(masked_var(values, mask).item(), spread, abs_tol=1e-9)


@given(token_batches(1))
def test_micro_batches_add_up_to_the_batch(batch: tuple[Tensor, ...]) -> None:
    values, mask = batch
    count = int(mask.sum())
    parts = [
        masked_mean(v, m, denominator=count)
        for v, m in zip(values.split(1), mask.split(1), strict=True)
    ]
    assert close(torch.stack(parts).sum(), masked_mean(values, mask))


@given(token_batches(2), st.floats(0, 1), st.floats(0, 1))
def test_padding_changes_no_advantage(
    batch: tuple[Tensor, ...], gamma: float, gae_lambda: float
) -> None:
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    wide = gae(padded(rewards), padded(values), padded(mask), gamma, gae_lambda)
    assert close(wide[0], padded(advantages).nan_to_num())
    assert close(wide[1], padded(returns).nan_to_num())


@given(token_batches(2))
def test_without_discount_returns_are_rewards_to_go(batch: tuple[Tensor, ...]) -> None:
    rewards, values, mask = batch
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    for row in range(mask.shape[0]):
        real = int(mask[row].sum())
        expected = [math.fsum(rewards[row, t:real].tolist()) for t in range(real)]
        assert close(returns[row, :real], torch.tensor(expected, dtype=torch.float64))


@given(token_batches(1), st.data(), st.floats(0, 1))
def test_rewards_add_up_to_score_less_penalty(
    batch: tuple[Tensor, ...], data: st.DataObject, kl_coef: float
) -> None:
    kl, mask = batch
    scores = data.draw(tensors(kl.shape[0]))
    rewards = shape_rewards(scores, kl, mask, kl_coef)
    totals = torch.where(mask.any(dim=1), scores, 0.0) - kl_coef * torch.where(mask, kl, 0).sum(1)
    assert close(rewards.sum(dim=1), totals)
    assert not rewards[~mask].any()


@given(token_batches(3), st.randoms(use_true_random=False))
def test_batch_order_changes_nothing(batch: tuple[Tensor, ...], random) -> None:
    a, b, c, mask = batch
    order = torch.tensor(random.sample(range(len(a)), len(a)))
    functions = [
        lambda a, b, c, mask: ppo_policy_loss(a, b, c, 0.2),
        lambda a, b, c, mask: value_loss(a, b, c, 0.2),
        lambda a, b, c, mask: gae(a, b, mask, 0.9, 0.8)[0],
        lambda a, b, c, mask: k3(a, b),
        lambda a, b, c, mask: sequence_logprobs(a, mask),
    ]
    for function in functions:
        whole = function(a, b, c, mask)
        assert torch.equal(whole[order], function(a[order], b[order], c[order], mask[order]))
    shuffled = masked_whiten(a[order], mask[order])
    assert close(masked_whiten(a, mask)[order], shuffled)


@given(pairs(), st.floats(-3, 3))
def test_only_the_difference_of_scores_matters(batch: tuple[Tensor, ...], shift: float) -> None:
    chosen, rejected = batch
    moved = bradley_terry_loss(chosen + shift, rejected + shift)
    assert close(bradley_terry_loss(chosen, rejected), moved)


@given(pairs())
def test_swapping_sides_negates_the_margin(batch: tuple[Tensor, ...]) -> None:
    """-log s(d) + log s(-d) = -d; the two probabilities sum to 1; ties know no sides."""
    chosen, rejected = batch
    forth, back = bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen)
    assert close(back - forth, chosen - rejected)
    assert close((-forth).exp() + (-back).exp(), torch.ones_like(chosen))
    assert close(tie_loss(chosen, rejected), (forth + back) / 2)
    assert torch.equal(tie_loss(chosen, rejected), tie_loss(rejected, chosen))
    assert torch.equal(centring_loss(chosen, rejected), centring_loss(rejected, chosen))


@given(pairs())
def test_a_tie_costs_at_least_log_two(batch: tuple[Tensor, ...]) -> None:
    assert (tie_loss(*batch) >= math.log(2) - 1e-12).all()


@given(pairs(4), st.floats(0.01, 2))
def test_dpo_is_bradley_terry_on_implicit_rewards(batch: tuple[Tensor, ...], beta: float) -> None:
    a, b, c, d = batch
    implicit = bradley_terry_loss(beta * (a - c), beta * (b - d))
    assert close(dpo_loss(a, b, c, d, beta), implicit)


@given(token_batches(2))
def test_kl_estimators_have_their_signs(batch: tuple[Tensor, ...]) -> None:
    logprobs, ref, _ = batch
    assert torch.equal(k1(logprobs, ref), -k1(ref, logprobs))
    assert torch.equal(k2(logprobs, ref), k2(ref, logprobs))
    assert (k2(logprobs, ref) >= 0).all()
    assert (k3(logprobs, ref) >= 0).all()
    assert (k3(logprobs.float(), ref.float()) >= 0).all()


@given(st.data())
def test_probabilities_sum_to_one_and_entropy_is_bounded(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(2, 5))
    temperature = data.draw(st.floats(0.1, 3))
    logits = data.draw(tensors(2, 2, vocabulary))
    columns = [
        token_logprobs(logits, torch.full((2, 2), v), temperature) for v in range(vocabulary)
    ]
    logprobs = torch.stack(columns, dim=-1)
    assert close(logprobs.exp().sum(-1), torch.ones(2, 2, dtype=torch.float64))
    entropy = token_entropy(logits, temperature)
    assert close(entropy, -(logprobs.exp() * logprobs).sum(-1))
    assert (entropy <= math.log(vocabulary) + 1e-9).all()


@given(token_batches(3), st.floats(0.05, 0.5))
def test_clipping_only_makes_the_policy_loss_worse(
    batch: tuple[Tensor, ...], clip_range: float
) -> None:
    logprobs, old, advantages, _ = batch
    plain = -advantages * ratios(logprobs, old)
    loss = ppo_policy_loss(logprobs, old, advantages, clip_range)
    assert (loss >= plain).all()
    assert torch.equal(loss > plain, clipped_tokens(logprobs, old, advantages, clip_range))


@given(token_batches(3), st.floats(0.05, 0.5))
def test_clipping_only_makes_the_value_loss_worse(
    batch: tuple[Tensor, ...], clip_range: float
) -> None:
    values, old, returns, _ = batch
    loss = value_loss(values, old, returns, clip_range)
    assert (loss >= 0.5 * (values - returns) ** 2).all()


@given(token_batches(2))
def test_explained_variance_is_at_most_one(batch: tuple[Tensor, ...]) -> None:
    values, returns, mask = batch
    assert explained_variance(values, returns, mask).item() <= 1


@given(groups(), st.floats(-3, 3))
def test_groups_are_centred_and_blind_to_a_shift(scores: Tensor, shift: float) -> None:
    size = scores.shape[1]
    zeros = torch.zeros(scores.shape[0], dtype=torch.float64)
    for advantages in (group_relative(scores), leave_one_out(scores)):
        assert close(advantages.sum(dim=1), zeros)
    assert close(leave_one_out(scores + shift), leave_one_out(scores))
    centred = group_relative(scores, scale=None)
    assert close(leave_one_out(scores), centred * size / (size - 1))


@given(st.floats(0.001, 1), st.floats(-10, 100), st.integers(1, 400))
def test_the_controller_moves_towards_its_target(
    coef: float, observed: float, episodes: int
) -> None:
    new = adaptive_kl_coef(coef, observed, 6.0, episodes, 1000)
    assert new > 0
    assert (new >= coef) if observed >= 6 else (new <= coef)
