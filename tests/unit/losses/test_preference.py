from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.preference import bradley_terry_loss, centring_loss, dpo_loss, tie_loss

LOG = math.log


def test_bradley_terry_by_hand() -> None:
    """A lead of log 3 wins with 3/4, one of -log 3 with 1/4, none with 1/2."""
    chosen = torch.tensor([LOG(3), 0.0, 5.0])
    rejected = torch.tensor([0.0, LOG(3), 5.0])
    expected = [LOG(4 / 3), LOG(4), LOG(2)]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)


def test_a_margin_is_taken_off_the_lead() -> None:
    """A lead of log 3 that should be log 3 counts as a draw; one short of it by log 3 as 1/4."""
    chosen, rejected = torch.tensor([LOG(3), LOG(3)]), torch.zeros(2)
    margin = torch.tensor([LOG(3), 2 * LOG(3)])
    losses = bradley_terry_loss(chosen, rejected, margin)
    assert losses.tolist() == pytest.approx([LOG(2), LOG(4)])


def test_bradley_terry_at_the_extremes() -> None:
    """A lead of 1e4 costs nothing, one of -1e4 costs 1e4, and the gradient is then -1."""
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry_loss(chosen, torch.zeros(2))
    assert losses.tolist() == [0, 1e4]
    losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [0, -1]


def test_tie_loss_by_hand() -> None:
    """At d = log 3: -(log 3/4 + log 1/4) / 2 = log(16/3) / 2; at d = 0 log 2; far out |d| / 2."""
    first = torch.tensor([LOG(3), 0.0, 1.0, -200.0])
    second = torch.tensor([0.0, LOG(3), 1.0, 200.0])
    expected = [0.5 * LOG(16 / 3), 0.5 * LOG(16 / 3), LOG(2), 200]
    assert tie_loss(first, second).tolist() == pytest.approx(expected)


def test_tie_loss_pulls_the_scores_together() -> None:
    """d/dd = sigmoid(d) - 1/2: 1/4 at log 3, 0 where the scores are equal."""
    first = torch.tensor([LOG(3), 0.0], requires_grad=True)
    tie_loss(first, torch.zeros(2)).sum().backward()
    assert first.grad is not None
    assert first.grad.tolist() == pytest.approx([0.25, 0.0])


def test_centring_by_hand() -> None:
    """(1 + 2)^2 = 9, (3 - 3)^2 = 0."""
    losses = centring_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0]))
    assert losses.tolist() == [9, 0]


def test_dpo_by_hand() -> None:
    """Log-ratios +2 and -1 lead by 3; beta = log(3) / 3 makes that log 3, so the loss log 4/3."""
    losses = dpo_loss(*torch.tensor([[-10.0], [-21.0], [-12.0], [-20.0]]), beta=LOG(3) / 3)
    assert losses.tolist() == pytest.approx([LOG(4 / 3)], rel=1e-6)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    chosen, rejected = torch.tensor([-10.0, -300.0]), torch.tensor([-20.0, -5.0])
    losses = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3)
    assert losses.tolist() == pytest.approx([LOG(2), LOG(2)])


def test_dpo_gradient_where_policy_is_reference() -> None:
    """-beta / 2 on the chosen and +beta / 2 on the rejected log-probability."""
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-20.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-10.0]), torch.tensor([-20.0]), 0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.05, 0.05))


def test_dpo_at_the_extremes() -> None:
    """Sequence log-probabilities of thousands of nats stay finite."""
    losses = dpo_loss(*torch.tensor([[-9e3, 0.0], [0.0, -9e3], [0.0, 0.0], [0.0, 0.0]]), beta=1.0)
    assert losses.tolist() == [9e3, 0]


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert gradcheck(lambda x, y: bradley_terry_loss(x, y, c), (a, b))
    assert gradcheck(tie_loss, (a, b))
    assert gradcheck(centring_loss, (a, b))
    assert gradcheck(lambda x, y: dpo_loss(x, y, c, d, 0.5), (a, b))


@pytest.mark.parametrize("function", [bradley_terry_loss, tie_loss, centring_loss])
def test_wrong_scores_are_refused(function) -> None:
    scores = torch.zeros(3)
    with pytest.raises(ValueError, match="shapes must be equal"):
        function(scores, scores[:1])
    with pytest.raises(ValueError, match=r"first must have 1 dimensions, has shape \(3, 1\)"):
        function(scores.unsqueeze(1), scores)
    with pytest.raises(ValueError, match=r"second must be float32 or float64, is torch\.bfloat16"):
        function(scores, scores.bfloat16())


def test_wrong_margins_are_refused() -> None:
    scores = torch.zeros(3)
    with pytest.raises(ValueError, match=r"shapes must be equal: .*margin \(1,\)"):
        bradley_terry_loss(scores, scores, torch.zeros(1))
    with pytest.raises(ValueError, match="margin must be float32 or float64"):
        bradley_terry_loss(scores, scores, torch.zeros(3, dtype=torch.int64))


def test_wrong_dpo_inputs_are_refused() -> None:
    three, one = torch.zeros(3), torch.zeros(1)
    with pytest.raises(ValueError, match="beta must be above 0, is 0"):
        dpo_loss(three, three, three, three, beta=0)
    with pytest.raises(ValueError, match=r"policy_chosen \(3,\), ref_chosen \(1,\)"):
        dpo_loss(three, three, one, one, beta=0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        dpo_loss(three, three, three, one, beta=0.1)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        dpo_loss(three, three.half(), three, three, beta=0.1)
