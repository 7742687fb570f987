from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from amenable.losses.likelihood import token_entropy, token_logprobs
from amenable.models import projection
from amenable.models.projection import plain_projection, projected_logprobs


def head_of(weight: Tensor, trained: bool = False) -> nn.Linear:
    """A vocabulary projection."""
    head = nn.Linear(weight.shape[1], len(weight), bias=False)
    head.weight = nn.Parameter(weight, requires_grad=trained)
    return head


def inputs(
    dtype: torch.dtype = torch.float64, rows: int = 7, trained: bool = False
) -> tuple[Tensor, nn.Linear, Tensor]:
    """States, a projection to 11 tokens, targets."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (rows,), generator=generator)
    return states.to(dtype), head_of(weight.to(dtype), trained), targets


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_losses_on_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, temperature: float
) -> None:
    monkeypatch.setitem(projection._ROWS, "cpu", rows)
    states, head, targets = inputs()
    logits = (states @ head.weight.T)[None]
    found, entropy = projected_logprobs(
        states, head, targets, temperature=temperature, with_entropy=True
    )
    expected = token_logprobs(logits, targets[None], temperature)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert entropy is not None
    torch.testing.assert_close(entropy, token_entropy(logits, temperature)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_gradient_is_that_of_finite_differences(
    monkeypatch: pytest.MonkeyPatch, trained: bool, with_entropy: bool
) -> None:
    monkeypatch.setitem(projection._ROWS, "cpu", 2)
    states, head, targets = inputs(trained=trained)

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        head.weight = cast(nn.Parameter, weight)
        found = projected_logprobs(x, head, targets, temperature=0.7, with_entropy=with_entropy)
        return found if with_entropy else found[:1]  # type: ignore[return-value]

    assert torch.autograd.gradcheck(function, (states.requires_grad_(), head.weight))


def test_with_and_without_gradient_or_entropy_the_bits_are_the_same() -> None:
    """The ratio of the first step is exactly 1."""
    states, head, targets = inputs(torch.float32)
    plain = projected_logprobs(states, head, targets, temperature=0.7)[0]
    spread = projected_logprobs(states, head, targets, temperature=0.7, with_entropy=True)[0]
    trained = projected_logprobs(states.requires_grad_(), head, targets, temperature=0.7)[0]
    head.weight.requires_grad_()
    whole = projected_logprobs(states, head, targets, temperature=0.7, with_entropy=True)[0]
    for other in (spread, trained, whole):
        assert torch.equal(plain, other)


def test_impossible_tokens_give_no_nan() -> None:
    states = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[0.0, 0.0], [torch.finfo(torch.float32).min, 0.0], [0.0, 1.0]])
    head = head_of(weight)
    found, entropy = projected_logprobs(states, head, torch.tensor([0]), with_entropy=True)
    assert entropy is not None
    assert found.item() == pytest.approx(-torch.tensor(2.0).log().item())
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


@pytest.mark.parametrize("trained", [False, True])
def test_in_bf16_the_error_is_that_of_the_plain_path(trained: bool) -> None:
    """Against float32 on the same rounded weights: at most 1.1 times, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 96, generator=generator)
    weight = (torch.randn(2000, 96, generator=generator) / 5).bfloat16().float()
    targets = torch.randint(2000, (64,), generator=generator)

    def results(way: str) -> list[Tensor]:
        x, head = states.clone().requires_grad_(), head_of(weight.clone(), trained)
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            if way == "fused":
                found = projected_logprobs(x, head, targets)[0]
            else:
                found = token_logprobs(head(x)[None], targets[None])[0]
        found.sum().backward()
        grads = [x.grad, head.weight.grad] if trained else [x.grad]
        return [found.detach(), *(grad for grad in grads if grad is not None)]

    exact, fused, plain = results("exact"), results("fused"), results("plain")
    assert len(exact) == 2 + trained
    for wanted, ours, theirs in zip(exact, fused, plain, strict=True):
        assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm()


def test_only_plain_projections_are_taken(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert plain_projection(model) is model.get_output_embeddings()
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, intermediate_size=8))
    assert plain_projection(capped) is None
