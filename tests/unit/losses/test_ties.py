from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.preference import bradley_terry_loss
from amenable.losses.ties import davidson_loss, rao_kupper_loss

LOG = math.log
MODELS = [(rao_kupper_loss, 2.0), (davidson_loss, 1.0)]
each = pytest.mark.parametrize(("model", "parameter"), MODELS, ids=["rao_kupper", "davidson"])
TIED, DECIDED = torch.tensor([True]), torch.tensor([False])


def test_rao_kupper_by_hand() -> None:
    """theta 2. Strengths 3 : 1 win with 3 / (3 + 2) = 3/5, lose with 1 / (1 + 6) = 1/7 and tie with
    the rest, 9/35; equals tie with 1/3 and win with 1/3.
    """
    chosen = torch.tensor([LOG(3), 0.0, LOG(3), 5.0, 5.0])
    rejected = torch.tensor([0.0, LOG(3), 0.0, 5.0, 5.0])
    tied = torch.tensor([False, False, True, True, False])
    losses = rao_kupper_loss(chosen, rejected, tied, 2.0)
    expected = [LOG(5 / 3), LOG(7), LOG(35 / 9), LOG(3), LOG(3)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_davidson_by_hand() -> None:
    """nu 1. Strengths 4 : 1 and a tie of weight sqrt(4) = 2: 4/7, 1/7 and 2/7; equals 1/3 each."""
    chosen = torch.tensor([LOG(4), 0.0, LOG(4), 5.0, 5.0])
    rejected = torch.tensor([0.0, LOG(4), 0.0, 5.0, 5.0])
    tied = torch.tensor([False, False, True, True, False])
    losses = davidson_loss(chosen, rejected, tied, 1.0)
    expected = [LOG(7 / 4), LOG(7), LOG(7 / 2), LOG(3), LOG(3)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("model", "none"), [(rao_kupper_loss, 1.0), (davidson_loss, 0.0)])
def test_without_ties_it_is_bradley_terry(model, none: float) -> None:
    chosen, rejected = torch.tensor([1.0, -30.0, 500.0]), torch.tensor([2.0, 40.0, -500.0])
    decided = torch.zeros(3, dtype=torch.bool)
    expected = bradley_terry_loss(chosen, rejected)
    for parameter in (none, torch.tensor(none)):
        torch.testing.assert_close(model(chosen, rejected, decided, parameter), expected)


@each
def test_a_tie_pulls_the_scores_together(model, parameter: float) -> None:
    scores = torch.tensor([0.7, -0.7, 0.0], requires_grad=True)
    model(scores, torch.zeros(3), torch.ones(3, dtype=torch.bool), parameter).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0] == -scores.grad[1]
    assert scores.grad[0] > 0
    assert scores.grad[2] == 0


@each
def test_extreme_scores_stay_finite(model, parameter: float) -> None:
    """A lost pair 2e4 apart costs 2e4; a tie there 2e4 (both thresholds) or 1e4 (the mean)."""
    chosen = torch.tensor([-1e4, 1e4, 1e4], requires_grad=True)
    tied = torch.tensor([False, False, True])
    losses = model(chosen, -chosen.detach(), tied, parameter)
    tie = 2e4 if model is rao_kupper_loss else 1e4
    assert losses.tolist() == pytest.approx([2e4, 0, tie], rel=1e-3)
    losses.sum().backward()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("number", [1e-30, 1e-3, 1e3, 1e30])
def test_extreme_parameters_stay_finite(number: float) -> None:
    scores = torch.zeros(2, dtype=torch.float64)
    tied = torch.tensor([True, False])
    assert torch.isfinite(davidson_loss(scores, scores, tied, number)).all()
    assert torch.isfinite(rao_kupper_loss(scores, scores, tied, max(number, 1 + 1e-9))).all()


@each
def test_gradients(model, parameter: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    tied = torch.tensor([True, False, False, True])
    learned = torch.tensor(parameter, dtype=torch.float64, requires_grad=True)
    a.requires_grad_()
    b.requires_grad_()
    assert gradcheck(lambda x, y, p: model(x, y, tied, p), (a, b, learned))


@each
def test_the_parameter_is_learned_from_the_share_of_ties(model, parameter: float) -> None:
    """Equals tie with (theta - 1) / (theta + 1) and nu / (2 + nu): both 1/3 here, so with a third
    of the pairs tied its gradient is 0.
    """
    learned = torch.tensor(parameter, dtype=torch.float64, requires_grad=True)
    scores = torch.zeros(3, dtype=torch.float64)
    model(scores, scores, torch.tensor([True, False, False]), learned).sum().backward()
    assert learned.grad is not None
    assert learned.grad.item() == pytest.approx(0, abs=1e-12)


@each
def test_wrong_inputs_are_refused(model, parameter: float) -> None:
    scores, tied = torch.zeros(3), torch.zeros(3).bool()
    with pytest.raises(ValueError, match=r"rejected \(1,\)"):
        model(scores, scores[:1], tied, parameter)
    with pytest.raises(ValueError, match="rejected must be float32 or float64"):
        model(scores, scores.half(), tied, parameter)
    with pytest.raises(ValueError, match="tied must be bool"):
        model(scores, scores, tied.int(), parameter)
    with pytest.raises(ValueError, match=r"(theta|nu) must have 0 dimensions"):
        model(scores, scores, tied, torch.ones(3))
    with pytest.raises(ValueError, match=r"(theta|nu) must be float32 or float64"):
        model(scores, scores, tied, torch.tensor(2))


def test_parameters_out_of_range_are_refused() -> None:
    score = torch.zeros(1)
    for bad in (0.9, math.nan, torch.tensor(0.9)):
        with pytest.raises(ValueError, match="theta must be at least 1, is"):
            rao_kupper_loss(score, score, DECIDED, bad)
    with pytest.raises(ValueError, match=r"nu must be at least 0, is -0\.1"):
        davidson_loss(score, score, DECIDED, -0.1)


def test_ties_without_probability_are_refused() -> None:
    score = torch.zeros(1)
    with pytest.raises(ValueError, match="ties have no probability at theta = 1"):
        rao_kupper_loss(score, score, TIED, 1.0)
    with pytest.raises(ValueError, match="ties have no probability at nu = 0"):
        davidson_loss(score, score, TIED, torch.tensor(0.0))
