from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from amenable.models.lora_linear import LoraLinear, _Product, fuse

IDS = torch.tensor([[5, 9, 300, 41, 17], [2, 3, 4, 5, 6]])


@pytest.fixture
def pair(tiny: Path) -> tuple[PeftModel, PeftModel]:
    """peft's model with two random adapters, and the same one fused."""
    base = AutoModelForCausalLM.from_pretrained(tiny).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
    plain = PeftModel(base, config, adapter_name="a")
    plain.add_adapter("b", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    plain.set_adapter("a")
    fused = deepcopy(plain)
    fuse(fused)
    return plain.eval(), fused.eval()


def outcome(model: PeftModel, enabled: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        logits = model(IDS).logits.float()
    logits.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


@pytest.mark.parametrize("adapter", ["a", "b"])
def test_outputs_and_gradients_are_pefts(pair: tuple[PeftModel, PeftModel], adapter: str) -> None:
    for model in pair:
        model.set_adapter(adapter)
    (wanted, gradients), (found, ours) = map(outcome, pair)
    assert any(isinstance(module, LoraLinear) for module in pair[1].modules())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == ours.keys()
    assert all(f".{adapter}." in name for name in ours)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


def test_without_its_adapter_it_is_the_base(pair: tuple[PeftModel, PeftModel]) -> None:
    plain, fused = pair
    with plain.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        assert torch.equal(plain(IDS).logits, fused(IDS).logits)


def test_in_bf16_the_error_is_pefts(pair: tuple[PeftModel, PeftModel]) -> None:
    """Against float32: at most 1.1 times that of peft, for the logits and the whole gradient."""
    exact, gradients = outcome(pair[0])
    errors = []
    for model in pair:
        logits, own = outcome(model, enabled=True)
        squares = sum(float((own[n] - g).square().sum()) for n, g in gradients.items())
        errors.append((float((logits - exact).norm()), squares**0.5))
    for theirs, ours in zip(*errors, strict=True):
        assert ours <= 1.1 * theirs


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_that_of_finite_differences(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, down, up = numbers(2, 3, 5), numbers(2, 5), numbers(4, 2)
    weight, shift = numbers(4, 5), numbers(4) if bias else None

    base = nn.Linear(5, 4, bias=bias, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(weight)
    if shift is not None:
        base.bias.copy_(shift)

    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        found: Tensor = _Product.apply(a, base, b, c, 1.7)  # type: ignore[no-untyped-call]
        return found

    expected = nn.functional.linear(x, weight, shift) + 1.7 * (x @ down.T) @ up.T
    torch.testing.assert_close(function(x, down, up), expected)
    inputs = tuple(part.requires_grad_() for part in (x, down, up))
    assert torch.autograd.gradcheck(function, inputs)
