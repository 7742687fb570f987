from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from amenable.losses.likelihood import token_entropy, token_logprobs
from amenable.models import projection
from amenable.models.projection import frozen_projection, projected_logprobs


def inputs(dtype: torch.dtype = torch.float64, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """States, weights of 11 tokens, targets."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (rows,), generator=generator)
    return states.to(dtype), weight.to(dtype), targets


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_losses_on_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, temperature: float
) -> None:
    monkeypatch.setitem(projection._ROWS, "cpu", rows)
    states, weight, targets = inputs()
    logits = (states @ weight.T)[None]
    found, entropy = projected_logprobs(
        states, weight, targets, temperature=temperature, with_entropy=True
    )
    expected = token_logprobs(logits, targets[None], temperature)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert entropy is not None
    torch.testing.assert_close(entropy, token_entropy(logits, temperature)[0], rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(projection._ROWS, "cpu", 2)
    states, weight, targets = inputs()

    def function(x: Tensor) -> Tensor:
        return projected_logprobs(x, weight, targets, temperature=0.7)[0]

    assert torch.autograd.gradcheck(function, states.requires_grad_())


def test_with_and_without_gradient_or_entropy_the_bits_are_the_same() -> None:
    """The ratio of the first step is exactly 1."""
    states, weight, targets = inputs(torch.float32)
    plain = projected_logprobs(states, weight, targets, temperature=0.7)[0]
    spread = projected_logprobs(states, weight, targets, temperature=0.7, with_entropy=True)[0]
    trained = projected_logprobs(states.requires_grad_(), weight, targets, temperature=0.7)[0]
    assert torch.equal(plain, spread)
    assert torch.equal(plain, trained)


def test_impossible_tokens_give_no_nan() -> None:
    states = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[0.0, 0.0], [torch.finfo(torch.float32).min, 0.0], [0.0, 1.0]])
    found, entropy = projected_logprobs(states, weight, torch.tensor([0]), with_entropy=True)
    assert entropy is not None
    assert found.item() == pytest.approx(-torch.tensor(2.0).log().item())
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_in_bf16_the_error_is_that_of_the_plain_path() -> None:
    """Against float32 on the same rounded weights: at most 1.1 times, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 96, generator=generator)
    weight = (torch.randn(2000, 96, generator=generator) / 5).bfloat16()
    targets = torch.randint(2000, (64,), generator=generator)

    def both(way: str) -> tuple[Tensor, Tensor]:
        x = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            if way == "fused":
                found = projected_logprobs(x, weight, targets)[0]
            else:
                exact = weight.float() if way == "exact" else weight
                logits = torch.nn.functional.linear(x, exact)
                found = token_logprobs(logits[None], targets[None])[0]
        return found.detach(), torch.autograd.grad(found.sum(), x)[0]

    exact, fused, plain = both("exact"), both("fused"), both("plain")
    for wanted, ours, theirs in zip(exact, fused, plain, strict=True):
        assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm()


def test_only_frozen_plain_projections_are_taken(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert frozen_projection(model) is None
    model.requires_grad_(False)
    assert frozen_projection(model) is model.get_output_embeddings().weight
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, intermediate_size=8))
    assert frozen_projection(capped.requires_grad_(False)) is None
