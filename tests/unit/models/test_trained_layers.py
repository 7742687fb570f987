from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from amenable.data.collate import PromptGroup, collate
from amenable.models.logprobs import completion_logprobs
from amenable.models.trained_layers import TrainedEmbedding, TrainedLinear, fuse_trained

GROUPS = [PromptGroup([5, 6, 7], [[8, 9], [10, 11, 12]]), PromptGroup([6, 7], [[9, 9, 8]])]


def pair(tiny: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice, the second one fused."""
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    fused = deepcopy(plain)
    fuse_trained(fused)
    return plain, fused


def gradients(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of two micro-batches."""
    for group in GROUPS:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            batch = collate([group], 0)
            loss = completion_logprobs(model, batch).logprobs.square().sum()
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_has_the_same_gradients(tiny: Path, dtype: torch.dtype) -> None:
    plain, fused = pair(tiny)
    assert any(type(module) is TrainedLinear for module in fused.modules())
    assert any(type(module) is TrainedEmbedding for module in fused.modules())
    expected, found = gradients(plain, dtype), gradients(fused, dtype)
    assert expected.keys() == found.keys()
    for name, wanted in expected.items():
        close = 1e-5 if dtype is torch.float32 else 2e-2
        assert (found[name] - wanted).norm() <= close * wanted.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_a_gradient_the_bits_are_the_same(tiny: Path, dtype: torch.dtype) -> None:
    """Ratios start at exactly 1."""
    plain, fused = pair(tiny)
    batch = collate(GROUPS, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        trained = completion_logprobs(fused, batch).logprobs.detach()
        with torch.no_grad():
            assert torch.equal(completion_logprobs(fused, batch).logprobs, trained)
            assert torch.equal(completion_logprobs(plain, batch).logprobs, trained)


def test_a_layer_with_a_bias_is_the_plain_layer() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 4).double()
    fused = deepcopy(plain)
    fuse_trained(fused)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    results = []
    for layer in (plain, fused):
        own = x.clone().requires_grad_()
        layer(own).square().sum().backward()
        results.append([own.grad, layer.weight.grad, layer.bias.grad])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_padding_row_has_no_gradient() -> None:
    table = nn.Embedding(6, 2, padding_idx=3)
    fuse_trained(table)
    table(torch.tensor([[1, 3, 1]])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.sum(1).tolist() == [0, 4, 0, 0, 0, 0]


def test_frozen_layers_have_none() -> None:
    layer = nn.Linear(3, 4, bias=False).requires_grad_(False)
    fuse_trained(layer)
    x = torch.ones(1, 3, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
