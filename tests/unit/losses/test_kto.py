from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.kto import kto_loss, kto_reference_point

LOG = math.log
ZERO = torch.tensor(0.0)


def test_kto_by_hand() -> None:
    """beta 1, z = 1. A log-ratio of 1 + log 3 gains log 3: desirable it loses 2 (1 - 3/4) = 1/2,
    undesirable 4 (3/4) = 3; at the reference point each loses half its weight.
    """
    policy = torch.tensor([-4 + LOG(3), -4 + LOG(3), -4.0, -4.0])
    ref = torch.full((4,), -5.0)
    desirable = torch.tensor([True, False, True, False])
    losses = kto_loss(policy, ref, desirable, torch.tensor(1.0), 1.0, 2.0, 4.0)
    assert losses.tolist() == pytest.approx([0.5, 3.0, 1.0, 2.0], rel=1e-6)


def test_kto_gradient_by_hand() -> None:
    """At the reference point sigmoid' = 1/4: -beta w / 4 where desirable, +beta w / 4 where not."""
    policy = torch.tensor([-4.0, -4.0], requires_grad=True)
    desirable = torch.tensor([True, False])
    ref = policy.detach().clone()
    kto_loss(policy, ref, desirable, ZERO, 0.4, 2.0, 3.0).sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.2, 0.3])


def test_no_gradient_flows_through_the_reference_point() -> None:
    point = torch.tensor(0.5, requires_grad=True)
    policy = torch.tensor([-1.0], requires_grad=True)
    desirable = torch.tensor([True])
    kto_loss(policy, torch.tensor([-2.0]), desirable, point, 1.0, 1.0, 1.0).sum().backward()
    assert point.grad is None
    assert not kto_reference_point(policy, torch.tensor([-2.0])).requires_grad


def test_reference_point_by_hand() -> None:
    """Log-ratios 3 and 1 give 2; -3 and 1 would give -1, so 0; nothing gives 0."""
    ref = torch.tensor([-5.0, -5.0])
    assert kto_reference_point(torch.tensor([-2.0, -4.0]), ref).item() == 2
    assert kto_reference_point(torch.tensor([-8.0, -4.0]), ref).item() == 0
    assert kto_reference_point(torch.zeros(0), torch.zeros(0)).item() == 0


def test_extreme_inputs_stay_finite() -> None:
    """Far from the reference point the loss is 0 or the weight, and flat."""
    policy = torch.tensor([9e3, -9e3, 9e3, -9e3], requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    losses = kto_loss(policy, torch.zeros(4), desirable, ZERO, 1.0, 2.0, 3.0)
    assert losses.tolist() == [0, 2, 3, 0]
    losses.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [0, 0, 0, 0]


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, ref = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    desirable = torch.tensor([True, False, False, True])
    point = torch.tensor(0.3, dtype=torch.float64)
    policy.requires_grad_()
    assert gradcheck(lambda x: kto_loss(x, ref, desirable, point, 0.7, 1.5, 1.0), policy)


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_settings_must_be_positive(name: str) -> None:
    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | {name: 0}
    row = torch.zeros(1)
    with pytest.raises(ValueError, match=f"{name} must be above 0, is 0"):
        kto_loss(row, row, row.bool(), ZERO, **settings)


def test_wrong_inputs_are_refused() -> None:
    row, desirable = torch.zeros(3), torch.zeros(3).bool()
    with pytest.raises(ValueError, match=r"desirable \(1,\)"):
        kto_loss(row, row, desirable[:1], ZERO, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="reference_point must have 0 dimensions"):
        kto_loss(row, row, desirable, row, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="ref must be float32 or float64"):
        kto_loss(row, row.half(), desirable, ZERO, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"desirable must be bool, is torch\.int64"):
        kto_loss(row, row, desirable.long(), ZERO, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"policy \(3,\), ref \(1,\)"):
        kto_reference_point(row, row[:1])
    with pytest.raises(ValueError, match="policy must be float32 or float64"):
        kto_reference_point(row.half(), row)
