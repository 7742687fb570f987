from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.direct_preference import (
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    robust_dpo_loss,
    soft_dpo_loss,
)

LOG = math.log
# log-ratios +2 and -1 lead by 3
PAIR = tuple(torch.tensor([[-10.0], [-21.0], [-12.0], [-20.0]]))
THIRD = LOG(3) / 3  # a beta that makes of it log 3
FAMILY = [
    (dpo_loss, {}),
    (conservative_dpo_loss, {"label_smoothing": 0.25}),
    (robust_dpo_loss, {"flip_rate": 0.25}),
    (soft_dpo_loss, {"probabilities": torch.full((3,), 0.75, dtype=torch.float64)}),
    (ipo_loss, {}),
]
NAMES = [function.__name__ for function, _ in FAMILY]
named = pytest.mark.parametrize(("function", "settings"), FAMILY, ids=NAMES)
logistic = pytest.mark.parametrize(("function", "settings"), FAMILY[:-1], ids=NAMES[:-1])


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


def test_conservative_dpo_by_hand() -> None:
    """beta lead = log 3, e = 1/4: 3/4 log 4/3 + 1/4 log 4."""
    loss = conservative_dpo_loss(*PAIR, beta=THIRD, label_smoothing=0.25)
    assert loss.item() == pytest.approx(0.75 * LOG(4 / 3) + 0.25 * LOG(4), rel=1e-6)


def test_conservative_dpo_rests_at_the_odds_of_a_right_label() -> None:
    """e = 1/4: d / d(beta lead) = sigmoid(beta lead) - 3/4, 0 at log 3; 0.05 at sigmoid = 0.8."""
    leads = torch.tensor([LOG(3), LOG(4)], requires_grad=True)
    zero = torch.zeros(2)
    conservative_dpo_loss(leads, zero, zero, zero, 1.0, 0.25).sum().backward()
    assert leads.grad is not None
    assert leads.grad.tolist() == pytest.approx([0, 0.05], abs=1e-7)


def test_robust_dpo_by_hand() -> None:
    """beta lead = log 3, e = 1/4: (3/4 log 4/3 - 1/4 log 4) / (1/2) = log 4 - 3/2 log 3 < 0."""
    loss = robust_dpo_loss(*PAIR, beta=THIRD, flip_rate=0.25)
    assert loss.item() == pytest.approx(LOG(4) - 1.5 * LOG(3), rel=1e-5)


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """Seen with the right label 3 times in 4 and with the wrong one else, it costs log 4/3."""
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    right = robust_dpo_loss(*PAIR, beta=THIRD, flip_rate=0.25)
    wrong = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, THIRD, 0.25)
    assert (0.75 * right + 0.25 * wrong).item() == pytest.approx(LOG(4 / 3), rel=1e-5)


def test_soft_dpo_by_hand() -> None:
    """beta lead = log 3: p = 1 costs log 4/3, 0 log 4, and 1/2 their mean, log(16/3) / 2."""
    four = [x.expand(3) for x in PAIR]
    losses = soft_dpo_loss(*four, torch.tensor([1.0, 0.0, 0.5]), THIRD)
    expected = [LOG(4 / 3), LOG(4), LOG(16 / 3) / 2]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_soft_dpo_rests_where_the_implied_choice_has_the_label_s_probability() -> None:
    """d / d(beta lead) = sigmoid(beta lead) - p."""
    lead = torch.tensor([LOG(3)], requires_grad=True)
    zero = torch.zeros(1)
    soft_dpo_loss(lead, zero, zero, zero, torch.tensor([0.75]), 1.0).sum().backward()
    assert lead.grad is not None
    assert lead.grad.item() == pytest.approx(0, abs=1e-7)


def test_ipo_by_hand() -> None:
    """A lead of 3; beta 1/4 asks for 2, so 1; beta 1/6 for 3, so 0; beta 1/2 for 1, so 4."""
    losses = [ipo_loss(*PAIR, beta=beta).item() for beta in (1 / 4, 1 / 6, 1 / 2)]
    assert losses == pytest.approx([1, 0, 4], abs=1e-5)


def test_ipo_where_policy_is_reference() -> None:
    """1 / (4 beta^2) = 25 at beta 0.1, and a slope of -1 / beta on the chosen completion."""
    chosen = torch.tensor([-7.0], requires_grad=True)
    rest = torch.tensor([-9.0])
    loss = ipo_loss(chosen, rest, torch.tensor([-7.0]), rest, beta=0.1)
    assert loss.item() == pytest.approx(25)
    loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-10)


@logistic
def test_logistic_losses_start_at_log_two(function, settings) -> None:
    chosen = torch.tensor([-10.0, -300.0, -1.0], dtype=torch.float64)
    rejected = chosen.flip(0)
    losses = function(chosen, rejected, chosen, rejected, beta=0.3, **settings)
    assert losses.tolist() == pytest.approx([LOG(2)] * 3)


@named
def test_gradients(function, settings) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert gradcheck(lambda x, y: function(x, y, c, d, beta=0.5, **settings), (a, b))


@named
def test_extreme_inputs_stay_finite(function, settings) -> None:
    chosen = torch.tensor([-9e3, 0.0, -9e3], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    losses = function(chosen, zero - 4e3, zero, zero - 2e3, beta=1.0, **settings)
    losses.sum().backward()
    assert chosen.grad is not None
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()


@named
def test_wrong_inputs_are_refused(function, settings) -> None:
    three = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="beta must be above 0, is 0"):
        function(three, three, three, three, beta=0, **settings)
    with pytest.raises(ValueError, match="shapes must be equal"):
        function(three, three, three, three[:1], beta=0.1, **settings)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        function(three, three.half(), three, three, beta=0.1, **settings)


def test_wrong_dpo_inputs_are_refused() -> None:
    three, one = torch.zeros(3), torch.zeros(1)
    with pytest.raises(ValueError, match="beta must be above 0, is 0"):
        dpo_loss(three, three, three, three, beta=0)
    with pytest.raises(ValueError, match=r"policy_rejected \(3,\), ref_chosen \(1,\)"):
        dpo_loss(three, three, one, one, beta=0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        dpo_loss(three, three, three, one, beta=0.1)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        dpo_loss(three, three.half(), three, three, beta=0.1)


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0, math.nan])
def test_wrong_shares_of_wrong_labels_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0\.5\)"):
        conservative_dpo_loss(*PAIR, beta=0.1, label_smoothing=share)
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0\.5\)"):
        robust_dpo_loss(*PAIR, beta=0.1, flip_rate=share)


def test_wrong_probabilities_are_refused() -> None:
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
            soft_dpo_loss(*PAIR, torch.tensor([bad]), 0.1)
    with pytest.raises(ValueError, match=r"probabilities \(2,\)"):
        soft_dpo_loss(*PAIR, torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="probabilities must be float32 or float64"):
        soft_dpo_loss(*PAIR, torch.zeros(1).half(), 0.1)
