from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.preference import (
    bradley_terry_loss,
    centring_loss,
    length_margin,
    tie_loss,
)

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


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert gradcheck(lambda x, y: bradley_terry_loss(x, y, c), (a, b))
    assert gradcheck(tie_loss, (a, b))
    assert gradcheck(centring_loss, (a, b))
    assert gradcheck(lambda x, y: bradley_terry_loss(x, y, c, 0.2), (a, b))
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 5, 2])
    assert gradcheck(lambda w: length_margin(counts, counts.flip(0), w), weight)


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


def test_label_smoothing_by_hand() -> None:
    """A lead of log 3 and e = 1/4: 3/4 log 4/3 + 1/4 log 4, the entropy of the label, so the least
    there is; e = 0 gives the plain loss; a margin of log 3 makes the lead 0 and the loss log 2.
    """
    chosen = torch.tensor([LOG(3)], requires_grad=True)
    zero = torch.zeros(1)
    loss = bradley_terry_loss(chosen, zero, label_smoothing=0.25)
    assert loss.item() == pytest.approx(0.75 * LOG(4 / 3) + 0.25 * LOG(4))
    loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0, abs=1e-7)
    assert bradley_terry_loss(chosen, zero, label_smoothing=0.0).item() == pytest.approx(LOG(4 / 3))
    margin = torch.tensor([LOG(3)])
    assert bradley_terry_loss(chosen, zero, margin, 0.25).item() == pytest.approx(LOG(2))


def test_label_smoothing_at_the_extremes() -> None:
    """A lead of 1e4 costs e 1e4, one of -1e4 the rest."""
    losses = bradley_terry_loss(torch.tensor([1e4, -1e4]), torch.zeros(2), label_smoothing=0.25)
    assert losses.tolist() == [2500, 7500]


@pytest.mark.parametrize("share", [-0.1, 0.5, math.nan])
def test_wrong_smoothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0\.5\)"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), label_smoothing=share)


def test_length_explains_what_it_can() -> None:
    """Weight 0.1. 10 tokens more count as a lead of 1, so scores that lead by log 3 - 1 cost
    log 4/3; 10 fewer as one of -1, so that they must lead by log 3 + 1.
    """
    margin = length_margin(torch.tensor([20, 10, 7]), torch.tensor([10, 20, 7]), 0.1)
    assert margin.tolist() == pytest.approx([-1, 1, 0])
    chosen = torch.tensor([LOG(3) - 1, LOG(3) + 1, LOG(3)])
    losses = bradley_terry_loss(chosen, torch.zeros(3), margin)
    assert losses.tolist() == pytest.approx([LOG(4 / 3)] * 3)


def test_the_weight_of_length_can_be_learned() -> None:
    """At scores and weight 0, d loss / d weight = -(length difference) / 2: it grows where the
    longer one won.
    """
    weight = torch.tensor(0.0, requires_grad=True)
    margin = length_margin(torch.tensor([9]), torch.tensor([5]), weight)
    bradley_terry_loss(torch.zeros(1), torch.zeros(1), margin).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(-2)


def test_wrong_lengths_are_refused() -> None:
    counts = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="shapes must be equal"):
        length_margin(counts, counts[:1], 0.1)
    with pytest.raises(ValueError, match="chosen_tokens must be int32 or int64"):
        length_margin(counts.float(), counts, 0.1)
    with pytest.raises(ValueError, match="rejected_tokens must not be negative, has -2"):
        length_margin(counts, -counts, 0.1)
    with pytest.raises(ValueError, match="weight must have 0 dimensions"):
        length_margin(counts, counts, torch.zeros(2))
    with pytest.raises(ValueError, match="weight must be float32 or float64"):
        length_margin(counts, counts, torch.tensor(1))
