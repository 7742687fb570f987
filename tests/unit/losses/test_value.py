from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.value import explained_variance, value_loss


def test_value_loss_by_hand() -> None:
    """Old value 0, clip 0.5. V = 2 for R = 1: clipped to 0.5, errors 1 and 0.25, so 1/2. V = 1 for
    R = 1: clipped to 0.5, errors 0 and 0.25, so 1/8. V = 0.25 for R = 1: inside, 0.5625 / 2.
    """
    losses = value_loss(torch.tensor([[2.0, 1.0, 0.25]]), torch.zeros(1, 3), torch.ones(1, 3), 0.5)
    assert losses.tolist()[0] == pytest.approx([0.5, 0.125, 0.28125])


def test_a_value_that_has_moved_far_enough_gets_no_gradient() -> None:
    """The clipped error dominates for the second; the first is pulled back by V - R = 1."""
    values = torch.tensor([[2.0, 1.0, 0.25]], requires_grad=True)
    value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), 0.5).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist()[0] == pytest.approx([1.0, 0.0, -0.75])


def test_without_clipping_it_is_half_the_squared_error() -> None:
    losses = value_loss(
        torch.tensor([[100.0, -3.0]]), torch.zeros(1, 2), torch.ones(1, 2), math.inf
    )
    assert losses.tolist() == [[99**2 / 2, 8]]


def test_gradients() -> None:
    values = torch.tensor([[2.0, 1.0, 0.25]], dtype=torch.float64, requires_grad=True)
    zeros, ones = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    assert gradcheck(lambda x: value_loss(x, zeros, ones, 0.5), values)


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 (variance 8/3); residuals 0, 1, 2 (variance 2/3): 1 - 1/4."""
    returns = torch.tensor([[0.0, 2.0, 4.0, 99.0]])
    values = torch.tensor([[0.0, 1.0, 2.0, -99.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(0.75)


def test_explained_variance_at_its_limits() -> None:
    """A perfect critic 1 (a constant offset aside), a constant one 0, an inverted one -3."""
    returns = torch.tensor([[-1.0, 0.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.full((1, 3), 0.3), returns, mask).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3)


def test_explained_variance_of_nothing_is_zero() -> None:
    returns = torch.tensor([[-1.0, 0.0, 1.0]])
    nothing, everything = torch.zeros(1, 3).bool(), torch.ones(1, 3).bool()
    assert explained_variance(returns, returns, nothing).item() == 0
    assert explained_variance(returns, torch.ones(1, 3), everything).item() == 0


def test_wrong_inputs_are_refused() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="clip_range must be above 0, is -1"):
        value_loss(good, good, good, -1)
    with pytest.raises(ValueError, match=r"returns \(2, 1\)"):
        value_loss(good, good, good[:, :1], 0.2)
    with pytest.raises(ValueError, match="values must have 2 dimensions"):
        value_loss(good[0], good[0], good[0], 0.2)
    with pytest.raises(ValueError, match="old_values must be float32 or float64"):
        value_loss(good, good.half(), good, 0.2)
    with pytest.raises(ValueError, match=r"mask \(1, 3\)"):
        explained_variance(good, good, torch.ones(1, 3).bool())
    with pytest.raises(ValueError, match="values must be float32 or float64"):
        explained_variance(good.half(), good, good.bool())
    with pytest.raises(ValueError, match="mask must be bool"):
        explained_variance(good, good, good.int())
