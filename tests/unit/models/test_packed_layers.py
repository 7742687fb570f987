"""Short norms and feed-forward layers against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amenable.data.collate import GroupBatch, PromptGroup, collate
from amenable.models.logprobs import completion_logprobs
from amenable.models.packed_layers import rms_norm, shorten, swiglu

from .conftest import build

GROUPS = [PromptGroup([5, 9, 300, 4], [[41, 17, 2], [8]]), PromptGroup([7], [[3, 3]])]


def test_rms_norm_by_hand() -> None:
    """Mean square of 3 and 4 is 12.5; with eps 3.5 the root is 4."""
    found = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 1.0]), 3.5)
    assert found.tolist() == [[1.5, 1.0]]


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, g, u = (
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((2, 3, 4), (4,), (3, 4), (3, 4))
    )
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, w))
    assert torch.autograd.gradcheck(swiglu, (g, u))
    x.requires_grad_(requires_grad=False)
    assert torch.autograd.gradcheck(lambda b: rms_norm(x, b, 1e-5), (w,))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_shortened_model_has_the_same_logprobs_and_gradients(name: str) -> None:
    changes = {"sliding_window": None} if name == "Mistral" else {}
    found = []
    for short in (True, False):
        model, batch = build(name, **changes), collate(GROUPS, 0)
        if short:
            shorten(model)
        kinds = {type(module).__name__ for module in model.modules()}
        assert (f"Packed{name}RMSNorm" in kinds) == short
        assert (f"Packed{name}MLP" in kinds) == short
        found.append(measured(model, batch))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    assert len(found[0]) > 10
    for ours, theirs in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def measured(model: PreTrainedModel, batch: GroupBatch) -> list[Tensor]:
    """Log-probabilities, and every gradient of their sum."""
    logprobs = completion_logprobs(model, batch).logprobs
    logprobs.sum().backward()
    return [logprobs.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_plain_passes_get_transformers_own_code() -> None:
    model, ids = build("Llama"), torch.tensor([[5, 9, 300]])
    before = model(ids).logits
    shorten(model)
    shorten(model)  # twice is once
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["Gemma2", "GPTNeoX"])
def test_other_models_are_left_alone(name: str) -> None:
    model = build(name)
    if not hasattr(model.config, "hidden_act"):
        model.config.hidden_act = "silu"
    kinds = [type(module) for module in model.modules()]
    shorten(model)
    assert [type(module) for module in model.modules()] == kinds
