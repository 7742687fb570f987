from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from amenable.losses.likelihood import (
    cross_entropy,
    mean_logprobs,
    sequence_logprobs,
    token_entropy,
    token_logprobs,
)

LOG = math.log
NAN = float("nan")
# probabilities 1/8, 2/8, 5/8 and 1/3, 1/3, 1/3
LOGITS = torch.tensor([[[0.0, LOG(2), LOG(5)], [7.0, 7.0, 7.0]]])


def test_token_logprobs_by_hand() -> None:
    """Logits log 1, log 2, log 5 have the probabilities 1/8, 2/8, 5/8."""
    logprobs = token_logprobs(LOGITS, torch.tensor([[2, 0]]))
    assert logprobs.tolist()[0] == pytest.approx([LOG(5 / 8), LOG(1 / 3)])


def test_temperature_divides_the_logits() -> None:
    """At temperature 1/2 the weights are squared: 1, 4, 25 of 30."""
    logprobs = token_logprobs(LOGITS, torch.tensor([[1, 0]]), temperature=0.5)
    assert logprobs.tolist()[0] == pytest.approx([LOG(4 / 30), LOG(1 / 3)])


def test_probabilities_of_all_targets_sum_to_one() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    total = sum(token_logprobs(logits, torch.full((2, 3), v), 0.7).exp() for v in range(5))
    assert torch.allclose(total, torch.ones(2, 3))


def test_logprobs_of_extreme_logits() -> None:
    """Certain, impossible, and finite beyond the range of exp in float32."""
    logits = torch.tensor([[[1e4, 0.0], [0.0, -math.inf], [-1e4, -1e4 + LOG(3)]]])
    assert token_logprobs(logits, torch.tensor([[0, 1, 1]]))[0, :2].tolist() == [0, -math.inf]
    assert token_logprobs(logits, torch.tensor([[1, 0, 1]]))[0, :2].tolist() == [-1e4, 0]
    last = token_logprobs(logits, torch.tensor([[0, 0, 1]]))[0, 2].item()
    assert last == pytest.approx(LOG(3 / 4), abs=2e-3)  # the spacing of float32 at 1e4 is 1e-3


def test_half_precision_logits_are_widened() -> None:
    """512 equal bfloat16 logits: each has log 1/512 to float32 accuracy."""
    logits = torch.full((1, 1, 512), 3.0, dtype=torch.bfloat16)
    logprobs = token_logprobs(logits, torch.tensor([[5]]))
    assert logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-LOG(512), abs=1e-6)
    assert token_entropy(logits).item() == pytest.approx(LOG(512), abs=1e-5)


def test_float64_logits_stay_float64() -> None:
    assert token_logprobs(LOGITS.double(), torch.tensor([[0, 0]])).dtype == torch.float64


def test_entropy_by_hand() -> None:
    """H(1/8, 1/4, 5/8), and log 3 for equal logits; temperature 1/2 gives 1/30, 4/30, 25/30."""
    expected = -sum(p * LOG(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert token_entropy(LOGITS).tolist()[0] == pytest.approx([expected, LOG(3)])
    sharper = -sum(p * LOG(p) for p in (1 / 30, 4 / 30, 25 / 30))
    assert token_entropy(LOGITS, 0.5).tolist()[0] == pytest.approx([sharper, LOG(3)])


def test_entropy_of_a_certain_token_is_zero_and_has_a_gradient() -> None:
    """An entry that is ruled out (-inf) adds nothing and does not spoil the gradient."""
    logits = torch.tensor([[[0.0, -math.inf], [1e4, 0.0]]], requires_grad=True)
    entropy = token_entropy(logits)
    assert entropy.tolist() == [[0, 0]]
    entropy.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_gradient_of_a_logprob_is_onehot_minus_softmax() -> None:
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, torch.tensor([[2, 0]]))[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([-1 / 8, -2 / 8, 3 / 8])
    assert logits.grad[0, 1].tolist() == [0, 0, 0]


def test_gradients() -> None:
    logits = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    targets = torch.tensor([[0, 3], [1, 1]])
    assert gradcheck(lambda x: token_logprobs(x, targets, 0.8), logits)
    assert gradcheck(lambda x: token_entropy(x, 0.8), logits)


def test_sequence_logprobs_sum_the_real_tokens() -> None:
    """-1 - 2 = -3; nothing; a masked -inf does not count."""
    logprobs = torch.tensor([[-1.0, -2.0, -math.inf], [-4.0, -5.0, -6.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert sequence_logprobs(logprobs, mask).tolist() == [-3, 0]


def test_cross_entropy_turns_the_sign_and_drops_the_rest() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")]])
    mask = torch.tensor([[True, False, False]])
    assert cross_entropy(logprobs, mask).tolist() == [[1, 0, 0]]


def test_wrong_logits_targets_and_temperatures_are_refused() -> None:
    targets = torch.tensor([[0, 0]])
    with pytest.raises(ValueError, match="logits must have 3 dimensions"):
        token_logprobs(LOGITS[0], targets)
    with pytest.raises(ValueError, match=r"logits must be floating point, are torch\.int64"):
        token_entropy(LOGITS.long())
    with pytest.raises(ValueError, match=r"shapes must be equal: targets \(1, 1\)"):
        token_logprobs(LOGITS, targets[:, :1])
    with pytest.raises(ValueError, match="targets must have 2 dimensions"):
        token_logprobs(LOGITS, targets[0])
    with pytest.raises(ValueError, match=r"targets must be int64 token ids, are torch\.float32"):
        token_logprobs(LOGITS, targets.float())
    with pytest.raises(ValueError, match="temperature must be above 0, is 0"):
        token_logprobs(LOGITS, targets, temperature=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_entropy(LOGITS, temperature=-1)


@pytest.mark.parametrize("function", [sequence_logprobs, cross_entropy])
def test_wrong_logprobs_are_refused(function) -> None:
    logprobs, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="shapes must be equal"):
        function(logprobs, mask[:1])
    with pytest.raises(ValueError, match="logprobs must have 2 dimensions"):
        function(logprobs[0], mask[0])
    with pytest.raises(ValueError, match="logprobs must be float32 or float64"):
        function(logprobs.bfloat16(), mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        function(logprobs, mask.long())


def test_mean_logprobs_by_hand() -> None:
    """-6 over 3, -5 over 2; no token, no log-probability."""
    sums, counts = torch.tensor([-6.0, -5.0, 0.0]), torch.tensor([3, 2, 0])
    assert mean_logprobs(sums, counts).tolist() == [-2, -2.5, 0]


def test_mean_logprobs_equal_slicing() -> None:
    logprobs = torch.tensor([[-1.0, -3.0, NAN], [-2.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_logprobs(sequence_logprobs(logprobs, mask), mask.sum(1)).tolist() == [-2, -2]


def test_wrong_counts_are_refused() -> None:
    sums, counts = torch.zeros(2), torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens \(1,\)"):
        mean_logprobs(sums, counts[:1])
    with pytest.raises(ValueError, match="tokens must be int32 or int64"):
        mean_logprobs(sums, sums)
    with pytest.raises(ValueError, match="sequence_logprobs must be float32 or float64"):
        mean_logprobs(sums.half(), counts)
    with pytest.raises(ValueError, match="tokens must not be negative"):
        mean_logprobs(sums, -counts)
