"""What holds of every loss that an algorithm can name: one table a kind, every property a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amenable.config.recipe import Recipe
from amenable.losses.advantages import reinforce_plus_plus
from amenable.losses.aggregation import Aggregation, token_weights
from amenable.losses.direct_preference import (
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    robust_dpo_loss,
    soft_dpo_loss,
)
from amenable.losses.kl import k1, k2, k3, kl_loss
from amenable.losses.kto import kto_loss
from amenable.losses.likelihood import cross_entropy
from amenable.losses.policy import gspo_policy_loss, ppo_policy_loss
from amenable.losses.preference import (
    bradley_terry_loss,
    centring_loss,
    length_margin,
    tie_loss,
)
from amenable.losses.reference_free import odds_ratio_loss, simpo_loss
from amenable.losses.selection import best_of_n, choice_probabilities, sampled_choices
from amenable.losses.ties import davidson_loss, rao_kupper_loss
from amenable.losses.value import value_loss
from amenable.train.policy_gradient import GRADIENTS

from .strategies import groups, pairs, tensors, token_batches

BETA = 0.4
POINT = torch.tensor(0.3, dtype=torch.float64)


def counts(numbers: Tensor) -> Tensor:
    """Token counts of 1 to 6 made of numbers in [-5, 5]."""
    return numbers.abs().long() + 1


# [N] losses of (chosen, rejected, ref_chosen, ref_rejected), and what swapping the sides adds to
# the loss, as a function of beta times the lead; None where that is no function of the lead.
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PAIR_LOSSES: dict[str, tuple[PairLoss, Callable[[Tensor], Tensor] | None]] = {
    "dpo": (lambda a, b, c, d: dpo_loss(a, b, c, d, BETA), lambda h: h),
    "cdpo": (lambda a, b, c, d: conservative_dpo_loss(a, b, c, d, BETA, 0.1), lambda h: 0.8 * h),
    "robust": (lambda a, b, c, d: robust_dpo_loss(a, b, c, d, BETA, 0.1), lambda h: h / 0.8),
    "soft": (
        lambda a, b, c, d: soft_dpo_loss(a, b, c, d, torch.full_like(a, 0.7), BETA),
        lambda h: 0.4 * h,
    ),
    "ipo": (lambda a, b, c, d: ipo_loss(a, b, c, d, BETA), lambda h: 2 * h / BETA**2),
    "bt": (lambda a, b, c, d: bradley_terry_loss(BETA * (a - c), BETA * (b - d)), lambda h: h),
    "bt_smoothed": (
        lambda a, b, c, d: bradley_terry_loss(BETA * (a - c), BETA * (b - d), None, 0.1),
        lambda h: 0.8 * h,
    ),
    "tie": (lambda a, b, c, d: tie_loss(a - c, b - d), lambda h: 0 * h),
    "rao_kupper_tie": (
        lambda a, b, c, d: rao_kupper_loss(a - c, b - d, torch.ones_like(a).bool(), 1.5),
        lambda h: 0 * h,
    ),
    "davidson": (
        lambda a, b, c, d: davidson_loss(BETA * (a - c), BETA * (b - d), a > 99, 0.5),
        lambda h: h,
    ),
    "davidson_tie": (
        lambda a, b, c, d: davidson_loss(a - c, b - d, torch.ones_like(a).bool(), 0.5),
        lambda h: 0 * h,
    ),
    "rao_kupper": (lambda a, b, c, d: rao_kupper_loss(a - c, b - d, a > 99, 1.5), None),
    "bt_length": (
        lambda a, b, c, d: bradley_terry_loss(a, b, length_margin(counts(c), counts(d), 0.1)),
        None,
    ),
    "simpo": (lambda a, b, c, d: simpo_loss(a, b, counts(c), counts(d), 2.0, 0.5), None),
    "orpo": (lambda a, b, c, d: odds_ratio_loss(a - 6, b - 6, counts(c), counts(d)), None),
    "centring": (lambda a, b, c, d: centring_loss(a, b), None),
    "kto": (lambda a, b, c, d: kto_loss(a, c, b > 0, POINT, BETA, 1.5, 1.0), None),
}

# [N, C] losses of (logprobs, old_logprobs, third, mask); the third is advantages or reference
TokenLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TOKEN_LOSSES: dict[str, TokenLoss] = {
    "ppo": lambda a, b, c, m: ppo_policy_loss(a, b, c, 0.2),
    "dapo": lambda a, b, c, m: ppo_policy_loss(a, b, c, (0.2, 0.28)),
    "dual_clip": lambda a, b, c, m: ppo_policy_loss(a, b, c, 0.2, 3.0),
    "gspo": lambda a, b, c, m: gspo_policy_loss(a, b, c, m, 0.2),
    "k1": lambda a, b, c, m: k1(a, b),
    "k2": lambda a, b, c, m: k2(a, b),
    "k3": lambda a, b, c, m: k3(a, b),
    "kl_loss": lambda a, b, c, m: kl_loss(a, b, c),
    "value": lambda a, b, c, m: value_loss(a, b, c, 0.2),
    "cross_entropy": lambda a, b, c, m: cross_entropy(a, m),
    **{name: row.surrogate(Recipe()).loss for name, row in GRADIENTS.items()},
}
AGGREGATIONS: list[Aggregation] = ["token", "sequence", "constant"]

over_pairs = pytest.mark.parametrize("name", PAIR_LOSSES)
over_tokens = pytest.mark.parametrize("name", TOKEN_LOSSES)
few = settings(max_examples=12)  # for each row of the table


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def reduced(loss: TokenLoss, batch: tuple[Tensor, ...], aggregation: Aggregation) -> Tensor:
    *values, mask = batch
    weights = token_weights(mask, aggregation, length=5, dtype=torch.float64)
    return (loss(*values, mask) * weights)[mask].sum()


@over_pairs
@few
@given(batch=pairs(4), random=st.randoms(use_true_random=False))
def test_pairs_know_no_order_or_neighbours(name: str, batch: tuple[Tensor, ...], random) -> None:
    """Permuted rows give permuted losses, and each row alone (8 x 1) gives what it gives in the
    batch (1 x 8).
    """
    loss, _ = PAIR_LOSSES[name]
    whole = loss(*batch)
    order = torch.tensor(random.sample(range(len(whole)), len(whole)))
    assert close(loss(*(x[order] for x in batch)), whole[order])
    rows = zip(*(x.split(1) for x in batch), strict=True)
    assert close(torch.cat([loss(*row) for row in rows]), whole)


@pytest.mark.parametrize("name", [n for n, (_, added) in PAIR_LOSSES.items() if added])
@few
@given(batch=pairs(4))
def test_swapping_sides_adds_a_function_of_the_lead(name: str, batch: tuple[Tensor, ...]) -> None:
    loss, added = PAIR_LOSSES[name]
    a, b, c, d = batch
    lead = BETA * ((a - c) - (b - d))
    assert added is not None
    assert close(loss(b, a, d, c) - loss(a, b, c, d), added(lead))


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "soft", "ipo", "bt", "bt_smoothed"])
@few
@given(batch=pairs(4), shift=st.floats(-3, 3))
def test_only_the_lead_matters(name: str, batch: tuple[Tensor, ...], shift: float) -> None:
    """A prompt's log-probabilities may be counted in or left out, on all sides alike."""
    loss, _ = PAIR_LOSSES[name]
    a, b, c, d = batch
    assert close(loss(a + shift, b + shift, c, d), loss(a, b, c, d))
    assert close(loss(a + shift, b, c + shift, d), loss(a, b, c, d))


@pytest.mark.parametrize("name", [n for n in PAIR_LOSSES if n != "robust"])
@few
@given(batch=pairs(4))
def test_losses_are_never_negative_unless_they_say_so(name: str, batch: tuple[Tensor, ...]) -> None:
    assert (PAIR_LOSSES[name][0](*batch) >= 0).all()


@given(pairs(2), st.floats(1.01, 20), st.floats(0.01, 20))
def test_win_loss_and_tie_have_probabilities_that_sum_to_one(
    batch: tuple[Tensor, ...], theta: float, nu: float
) -> None:
    a, b = batch
    no, yes = torch.zeros_like(a).bool(), torch.ones_like(a).bool()
    for model, parameter in ((rao_kupper_loss, theta), (davidson_loss, nu)):
        sides = [(a, b, no), (b, a, no), (a, b, yes)]
        three = torch.stack([(-model(*side, parameter)).exp() for side in sides])
        assert close(three.sum(0), torch.ones_like(a))


@given(pairs(4), st.floats(0, 0.49))
def test_robust_dpo_is_dpo_in_the_mean_over_flips(batch: tuple[Tensor, ...], rate: float) -> None:
    a, b, c, d = batch
    right = robust_dpo_loss(a, b, c, d, BETA, rate)
    wrong = robust_dpo_loss(b, a, d, c, BETA, rate)
    mean = (1 - rate) * right + rate * wrong
    assert torch.allclose(mean, dpo_loss(a, b, c, d, BETA), rtol=1e-7, atol=1e-7)


@given(pairs(4), st.floats(0, 0.49))
def test_conservative_dpo_is_dpo_on_soft_labels(batch: tuple[Tensor, ...], share: float) -> None:
    label = torch.full_like(batch[0], 1 - share)
    smoothed = conservative_dpo_loss(*batch, beta=BETA, label_smoothing=share)
    assert close(smoothed, soft_dpo_loss(*batch, label, BETA))


@over_tokens
@few
@given(batch=token_batches(3), aggregation=st.sampled_from(AGGREGATIONS))
def test_padding_changes_neither_loss_nor_gradient(
    name: str, aggregation: Aggregation, batch: tuple[Tensor, ...]
) -> None:
    """Two more columns of large numbers under False, at which a ratio alone would overflow."""
    logprobs, *rest, mask = batch
    results = []
    for columns in (0, 2):
        wide = torch.nn.functional.pad(logprobs, (0, columns), value=900.0).requires_grad_()
        others = [torch.nn.functional.pad(x, (0, columns), value=-900.0) for x in rest]
        wide_mask = torch.nn.functional.pad(mask, (0, columns), value=False)
        loss = reduced(TOKEN_LOSSES[name], (wide, *others, wide_mask), aggregation)
        loss.backward()
        assert wide.grad is not None
        results.append((loss.detach(), wide.grad[:, : mask.shape[1]]))
        assert not wide.grad[~wide_mask].any()
    assert close(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1])


@over_tokens
@few
@given(
    batch=token_batches(3),
    aggregation=st.sampled_from(AGGREGATIONS),
    random=st.randoms(use_true_random=False),
)
def test_batch_order_and_accumulation_change_nothing(
    name: str, aggregation: Aggregation, batch: tuple[Tensor, ...], random
) -> None:
    """Weights are made once for the batch; rows one at a time (8 x 1) add up to it (1 x 8)."""
    loss = TOKEN_LOSSES[name]
    whole = reduced(loss, batch, aggregation)
    order = torch.tensor(random.sample(range(len(batch[0])), len(batch[0])))
    assert close(reduced(loss, tuple(x[order] for x in batch), aggregation), whole)
    weights = token_weights(batch[-1], aggregation, length=5, dtype=torch.float64)
    rows = zip(*(x.split(1) for x in batch), weights.split(1), strict=True)
    parts = [(loss(*values) * weight)[values[-1]].sum() for *values, weight in rows]
    assert close(torch.stack(parts).sum(), whole)


@given(batch=token_batches(0), aggregation=st.sampled_from(AGGREGATIONS))
def test_weights_add_up(aggregation: Aggregation, batch: tuple[Tensor, ...]) -> None:
    (mask,) = batch
    weights = token_weights(mask, aggregation, length=7, dtype=torch.float64)
    lengths = mask.sum(dim=1)
    completions = int((lengths > 0).sum())
    wanted = float(completions > 0)
    if aggregation == "constant":
        wanted = float(lengths.sum()) / (7 * max(completions, 1))
    assert abs(weights.sum().item() - wanted) < 1e-9
    assert not weights[~mask].any()
    assert (weights >= 0).all()


@given(token_batches(3))
def test_a_kl_in_the_loss_is_never_negative(batch: tuple[Tensor, ...]) -> None:
    logprobs, old, ref, _ = batch
    assert (kl_loss(logprobs, old, ref) >= 0).all()
    assert (kl_loss(logprobs.float(), old.float(), ref.float()) >= 0).all()
    assert close(kl_loss(logprobs, logprobs, ref), k3(logprobs, ref))


@given(token_batches(3), st.floats(0.05, 0.5), st.floats(1.1, 5))
def test_the_dual_clip_only_lowers_the_loss(
    batch: tuple[Tensor, ...], clip_range: float, dual_clip: float
) -> None:
    logprobs, old, advantages, _ = batch
    single = ppo_policy_loss(logprobs, old, advantages, clip_range)
    dual = ppo_policy_loss(logprobs, old, advantages, clip_range, dual_clip)
    assert (dual <= single).all()
    assert torch.equal(dual[advantages >= 0], single[advantages >= 0])


@given(token_batches(1))
def test_reinforce_plus_plus_is_white_and_blind_to_padding(batch: tuple[Tensor, ...]) -> None:
    rewards, mask = batch
    advantages = reinforce_plus_plus(rewards, mask)
    assert not advantages[~mask].any()
    assert abs(advantages.sum().item()) < 1e-6
    if mask.any():
        assert advantages.square().sum().item() / int(mask.sum()) <= 1 + 1e-9
    wide = torch.nn.functional.pad(rewards, (0, 2), value=float("nan"))
    wide_mask = torch.nn.functional.pad(mask, (0, 2), value=False)
    assert close(reinforce_plus_plus(wide, wide_mask)[:, : mask.shape[1]], advantages)


@given(groups())
def test_the_best_is_at_least_as_good_as_all(scores: Tensor) -> None:
    chosen = scores.gather(1, best_of_n(scores).unsqueeze(1))
    assert (chosen >= scores).all()


@given(pairs(2), st.data())
def test_labels_of_swapped_sides_sum_to_one(batch: tuple[Tensor, ...], data: st.DataObject) -> None:
    first, second = batch
    forth, back = choice_probabilities(first, second), choice_probabilities(second, first)
    assert close(forth + back, torch.ones_like(first))
    uniform = data.draw(tensors(len(first), low=0.0, high=0.99))
    assert torch.equal(sampled_choices(first, second, uniform), uniform < forth)
