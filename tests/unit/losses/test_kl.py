from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.kl import adaptive_kl_coef, k1, k2, k3, kl_loss, sequence_kl, target_kl_coef

LOG = math.log
ESTIMATORS = [k1, k2, k3]


def test_estimators_by_hand() -> None:
    """d = log 2: log 2, log(2)^2 / 2, 1/2 - 1 + log 2; d = -log 2: 2 - 1 - log 2 for k3."""
    logprobs, ref = torch.tensor([[LOG(0.5), LOG(0.25)]]), torch.tensor([[LOG(0.25), LOG(0.5)]])
    assert k1(logprobs, ref).tolist()[0] == pytest.approx([LOG(2), -LOG(2)])
    assert k2(logprobs, ref).tolist()[0] == pytest.approx([LOG(2) ** 2 / 2] * 2)
    assert k3(logprobs, ref).tolist()[0] == pytest.approx([LOG(2) - 0.5, 1 - LOG(2)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_policy_equal_to_the_reference_has_no_kl(estimator) -> None:
    logprobs = torch.tensor([[-0.1, -5.0, -80.0]])
    assert estimator(logprobs, logprobs).tolist() == [[0, 0, 0]]


def test_k1_and_k3_are_unbiased_over_the_whole_vocabulary() -> None:
    """Policy 1/2, 1/4, 1/4 and reference 1/4, 1/4, 1/2: KL = 1/2 log 2 - 1/4 log 2 = log(2) / 4.
    k2's expectation is another: (1/2 + 1/4) log(2)^2 / 2.
    """
    policy, reference = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    means = [float((policy * e(policy.log(), reference.log())).sum()) for e in ESTIMATORS]
    assert means == pytest.approx([LOG(2) / 4, 0.75 * LOG(2) ** 2 / 2, LOG(2) / 4], rel=1e-5)


def test_k3_is_never_negative_for_tiny_differences() -> None:
    logprobs = -torch.logspace(-9, 0, 2000).unsqueeze(0)
    ref = logprobs + torch.linspace(-1e-6, 1e-6, 2000)
    assert (k3(logprobs, ref) >= 0).all()


def test_k3_is_finite_and_differentiable_far_out() -> None:
    """d = -1000 is limited to exp(80) - 1 - 1000; d = 1000 gives 999."""
    logprobs = torch.tensor([[-1000.0, 0.0]], requires_grad=True)
    values = k3(logprobs, torch.tensor([[0.0, -1000.0]]))
    assert values.tolist()[0] == pytest.approx([math.exp(80), 999.0])
    values.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients(estimator) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    assert gradcheck(lambda x: estimator(x, ref), logprobs)


def test_sequence_kl_sums_over_real_tokens() -> None:
    kl = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert sequence_kl(kl, mask).tolist() == [3, 0]


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (6.0, 0.15),  # on target: unchanged
        (6.6, 0.15 * (1 + 0.1 * 0.064)),  # a tenth over: a tenth of 64 / 1000 up
        (60.0, 0.15 * (1 + 0.2 * 0.064)),  # far over: clipped at a fifth
        (5.4, 0.15 * (1 - 0.1 * 0.064)),
        (-1.0, 0.15 * (1 - 0.2 * 0.064)),  # a negative estimate is clipped too
    ],
)
def test_adaptive_coefficient_by_hand(observed: float, expected: float) -> None:
    assert adaptive_kl_coef(0.15, observed, 6.0, 64, 1000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["coef", "target", "episodes", "horizon"])
def test_controller_settings_must_be_positive(name: str) -> None:
    settings = {"coef": 0.1, "observed": 1.0, "target": 6.0, "episodes": 64, "horizon": 1000}
    with pytest.raises(ValueError, match=f"{name} must be above 0, is 0"):
        adaptive_kl_coef(**(settings | {name: 0}))


@pytest.mark.parametrize("observed", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_refused(observed: float) -> None:
    with pytest.raises(ValueError, match="observed KL must be finite"):
        adaptive_kl_coef(0.1, observed, 6.0, 64, 1000)


def test_a_horizon_that_could_switch_the_penalty_off_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon 100 must exceed a fifth of the 500 episodes"):
        adaptive_kl_coef(0.1, 1.0, 6.0, 500, 100)


@pytest.mark.parametrize(
    ("coef", "observed", "expected"),
    [
        (0.15, 6.0, 0.15),  # on target: unchanged
        (0.15, 9.0, 0.15 + 0.1 * 0.5 * 0.064),  # half over: half of 0.1, times 64 / 1000
        (0.15, 60.0, 0.15 + 0.1 * 9 * 0.064),  # not clipped
        (0.15, 0.0, 0.15 - 0.1 * 0.064),
        (0.001, 0.0, 0.0),  # never below 0
        (0.0, 9.0, 0.1 * 0.5 * 0.064),  # and back from there
        (0.15, -6.0, 0.15 - 0.1 * 2 * 0.064),  # a negative estimate counts as it is
    ],
)
def test_multiplier_by_hand(coef: float, observed: float, expected: float) -> None:
    found = target_kl_coef(coef, 0.1, observed, 6.0, 64, 1000)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_multiplier_finds_the_weight_that_meets_the_target() -> None:
    """Where the KL is 1 / weight, a target of 4 needs 1/4; where it stays below, no penalty."""
    coef = 0.1
    for _ in range(2000):
        coef = target_kl_coef(coef, 0.1, 1 / coef, 4.0, 50, 1000)
    assert coef == pytest.approx(0.25, rel=1e-6)
    for _ in range(2000):
        coef = target_kl_coef(coef, 0.1, 3.0, 4.0, 50, 1000)
    assert coef == 0.0


@pytest.mark.parametrize("name", ["first", "target", "episodes", "horizon"])
def test_settings_of_the_multiplier_must_be_positive(name: str) -> None:
    settings = {"first": 0.1, "observed": 1.0, "target": 6.0, "episodes": 64, "horizon": 1000}
    with pytest.raises(ValueError, match=f"{name} must be above 0, is 0"):
        target_kl_coef(**({"coef": 0.1} | settings | {name: 0}))


@pytest.mark.parametrize(
    ("coef", "observed"), [(-0.1, 1.0), (0.1, math.nan), (0.1, math.inf), (math.nan, 1.0)]
)
def test_a_multiplier_refuses_a_weight_below_zero_and_an_unknown_kl(
    coef: float, observed: float
) -> None:
    with pytest.raises(ValueError, match="coef must be at least 0 and observed finite, are"):
        target_kl_coef(coef, 0.1, observed, 6.0, 64, 1000)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_wrong_logprobs_are_refused(estimator) -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"ref_logprobs \(1, 3\)"):
        estimator(good, good[:1])
    with pytest.raises(ValueError, match="logprobs must have 2 dimensions"):
        estimator(good[0], good[0])
    with pytest.raises(ValueError, match="ref_logprobs must be float32 or float64"):
        estimator(good, good.bfloat16())


def test_wrong_sequence_kl_inputs_are_refused() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"mask \(1, 3\)"):
        sequence_kl(good, torch.ones(1, 3).bool())
    with pytest.raises(ValueError, match="kl must be float32 or float64"):
        sequence_kl(good.half(), good.bool())
    with pytest.raises(ValueError, match="mask must be bool"):
        sequence_kl(good, good.int())


def mean_gradient(loss, sampler: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Gradient with respect to the logits of the mean of loss(logprobs) over the sampler's tokens,
    with all tokens of the vocabulary enumerated.
    """
    leaf = logits.clone().requires_grad_()
    values = loss(leaf.log_softmax(0).unsqueeze(0)).squeeze(0)
    return torch.autograd.grad((sampler * values).sum(), leaf)[0]


LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
REF = torch.tensor([-0.5, 0.4, 0.2, 1.5], dtype=torch.float64).log_softmax(0).unsqueeze(0)
OLD = torch.tensor([0.0, -0.2, 0.5, 0.9], dtype=torch.float64).log_softmax(0).unsqueeze(0)


def divergence_gradients() -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of KL(policy || reference) and KL(reference || policy), by hand: p (d - KL) with
    d = log p - log ref, and p - ref.
    """
    probabilities = LOGITS.softmax(0)
    difference = probabilities.log() - REF[0]
    kl = (probabilities * difference).sum()
    return probabilities * (difference - kl), probabilities - REF[0].exp()


def test_mean_gradients_as_losses() -> None:
    """On tokens of the policy itself k1's is 0, k2's that of KL(policy || reference), k3's that of
    KL(reference || policy).
    """
    reverse, forward = divergence_gradients()
    policy = LOGITS.softmax(0)
    close = torch.testing.assert_close
    close(mean_gradient(lambda x: k1(x, REF), policy, LOGITS), torch.zeros_like(LOGITS))
    close(mean_gradient(lambda x: k2(x, REF), policy, LOGITS), reverse)
    close(mean_gradient(lambda x: k3(x, REF), policy, LOGITS), forward)
    assert (forward - reverse).abs().max() > 0.01


def test_kl_loss_has_the_kl_and_its_gradient_off_policy() -> None:
    """Tokens of another policy than the present one: mean and gradient are the KL's all the same;
    k2's gradient is then not.
    """
    reverse, _ = divergence_gradients()
    sampler = OLD[0].exp()
    logprobs = LOGITS.log_softmax(0).unsqueeze(0)
    kl = (logprobs.exp() * (logprobs - REF)).sum()
    mean = (sampler * kl_loss(logprobs, OLD, REF)).sum()
    torch.testing.assert_close(mean, kl)
    gradient = mean_gradient(lambda x: kl_loss(x, OLD, REF), sampler, LOGITS)
    torch.testing.assert_close(gradient, reverse)
    biased = mean_gradient(lambda x: k2(x, REF), sampler, LOGITS)
    assert (biased - reverse).abs().max() > 0.01


def test_kl_loss_on_policy_has_k2_s_gradient_token_by_token() -> None:
    """Ratio 1: the value is k3's and the gradient d."""
    logprobs = OLD.clone().requires_grad_()
    losses = kl_loss(logprobs, OLD, REF)
    torch.testing.assert_close(losses, k3(OLD, REF))
    losses.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, OLD - REF)


def test_kl_loss_by_hand() -> None:
    """Ratio 2 and d = log 2: 2 (1/2 - 1 + log 2)."""
    one = torch.tensor([[0.5]]).log()
    loss = kl_loss(one, one - LOG(2), one - LOG(2))
    assert loss.item() == pytest.approx(2 * (LOG(2) - 0.5))


def test_kl_loss_is_finite_and_differentiable_far_out() -> None:
    logprobs = torch.tensor([[0.0, -1000.0, 0.0, -1000.0]], requires_grad=True)
    old = torch.tensor([[-1000.0, 0.0, -1000.0, 0.0]])
    values = kl_loss(logprobs, old, torch.tensor([[-1000.0, 0.0, 1000.0, -2000.0]]))
    values.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(values).all()
    assert (values >= 0).all()
    assert torch.isfinite(logprobs.grad).all()


def test_kl_loss_gradients() -> None:
    logprobs = LOGITS.log_softmax(0).unsqueeze(0).requires_grad_()
    assert gradcheck(lambda x: kl_loss(x, OLD, REF), logprobs)


def test_wrong_kl_loss_inputs_are_refused() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"old_logprobs \(1, 3\)"):
        kl_loss(good, good[:1], good)
    with pytest.raises(ValueError, match="old_logprobs must be float32 or float64"):
        kl_loss(good, good.half(), good)
