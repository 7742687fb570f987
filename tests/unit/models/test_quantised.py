from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from amenable.artifacts import StageContext
from amenable.config.load import load_recipe
from amenable.config.model import LoraConfig
from amenable.data.collate import PromptGroup, collate
from amenable.errors import ModelError
from amenable.models import quantised
from amenable.models.adapters import adapter_state, add_adapter, load_adapter_state
from amenable.models.build import Foundation
from amenable.models.check import check_quantisable
from amenable.models.export import export_policy, export_reward
from amenable.models.heads import ScalarHead
from amenable.models.quantised import QuantisedLinear, Stored
from amenable.models.roles import Role
from amenable.pipeline.preflight import check_inputs
from amenable.rollout.transformers_engine import RolloutCopy

from .conftest import build

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; make test-quantised",
)
MakeContext = Callable[..., StageContext]
BATCH = collate([PromptGroup([5, 9, 300], [[41, 17, 2], [8, 260, 77, 12, 2]])], pad_id=0)
BOTH = pytest.mark.parametrize("kind", ["int8", "nf4"])


@pytest.fixture
def foundation(make_context: MakeContext) -> Callable[..., Foundation]:
    def make(kind: str, **changes: Any) -> Foundation:
        return Foundation.open(make_context("policy", model__quantise=kind, **changes).recipe)

    return make


def stored(weight: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> QuantisedLinear:
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    return QuantisedLinear(layer, kind, dtype)


def shaken(role: Role) -> Role:
    """The role with an adapter that is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in role.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return role


@needs_bitsandbytes
def test_int8_keeps_whole_numbers_of_a_row() -> None:
    """Multiples of a 127th of the row's largest are kept as they are, also where rows differ."""
    codes = torch.randint(-127, 128, (6, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = 127
    weight = codes * torch.tensor([1, 2, 0.5, 0.25, 4, 8])[:, None] / 128
    layer = stored(weight, "int8")
    torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=0)
    assert sum(tensor.nbytes for tensor in layer.stored.tensors) == 6 * 64 + 6 * 4


@needs_bitsandbytes
def test_nf4_keeps_zero_and_the_largest_of_a_block() -> None:
    """Four blocks of 64 whose largest magnitude is one and the same, so that its own 8 bits are
    exact; the first positive level is 0.0796 of it (Dettmers et al. 2023, appendix E)."""
    weight = torch.zeros(2, 128)
    weight[:, ::64], weight[:, 1::64], weight[:, 2::64] = 0.5, -0.5, 0.5 * 0.0796
    found = stored(weight, "nf4").weight
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.003, 0.012), ("nf4", 0.07, 0.11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_normal_weights(kind: str, least: float, most: float, dtype: torch.dtype) -> None:
    """int8 of n normal weights a row: a step of max / 127, of which an error is 1/√12: 0.7 % for
    a largest of 3.2 deviations. nf4 is coarser by what 16 levels are."""
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = stored(weight, kind, dtype)
    assert layer.weight.dtype is dtype
    error = (layer.weight.float() - weight).square().sum().sqrt() / weight.square().sum().sqrt()
    assert least < float(error) < most
    most_bytes = weight.numel() * {"int8": 1.005, "nf4": 0.517}[kind]
    assert sum(tensor.nbytes for tensor in layer.stored.tensors) <= most_bytes


@needs_bitsandbytes
@BOTH
def test_roles_share_one_base_that_is_quantised_in_its_linear_layers(
    foundation: Callable[..., Foundation], kind: str
) -> None:
    found = foundation(kind)
    reference = found.role("reference", train=False)
    roles = [
        found.role("policy"),
        found.role("reward", head=ScalarHead(64)),
        found.role("critic", head=ScalarHead(64)),
    ]
    assert len({id(role.plain) for role in (reference, *roles)}) == 1
    plain = roles[0].plain
    layers = [m for m in plain.modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == 2 * 7
    whole = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, _ in plain.named_parameters()
        if ".lora_" not in name
    }
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert whole == {"embed_tokens", *norms}, "the head is the embedding"
    assert not any(p.requires_grad for n, p in plain.named_parameters() if ".lora_" not in n)
    said = [role.logprobs(BATCH).logprobs.detach() for role in (reference, roles[0])]
    torch.testing.assert_close(*said, rtol=0, atol=1e-6)


@needs_bitsandbytes
@BOTH
def test_gradients_are_those_of_the_written_out_weights(
    foundation: Callable[..., Foundation], kind: str, tiny: Path
) -> None:
    """Against plain transformers and peft's own layers with the same numbers as weights."""
    role = shaken(foundation(kind, lora__rank=4).role("policy"))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).requires_grad_(False)
    for name, module in role.plain.named_modules():
        if isinstance(module, QuantisedLinear):
            base.get_submodule(name.removesuffix(".base_layer")).weight.copy_(module.weight)
    whole = add_adapter(base, "policy", LoraConfig(rank=4, alpha=8.0), seed=0)
    for module in whole.modules():
        if type(module).__name__ == "LoraLinear":
            module.__class__ = type(module).__mro__[1]
    load_adapter_state(whole, "policy", adapter_state(role.model, "policy"))  # type: ignore[arg-type]
    outcomes = []
    for one in (role, Role(whole, "policy")):
        logprobs = one.logprobs(BATCH).logprobs
        logprobs[BATCH.mask].square().sum().backward()
        outcomes.append((logprobs.detach(), [p.grad for p in one.trainable_parameters()]))
    (ours, gradients), (theirs, wanted) = outcomes
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients, wanted, strict=True):
        assert expected is not None
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_bitsandbytes
def test_nothing_written_out_is_kept_for_the_backward_pass(
    foundation: Callable[..., Foundation],
) -> None:
    written: list[weakref.ref[Tensor]] = []

    def noting(stored: Stored) -> Stored:
        def read() -> Tensor:
            weight = stored.read()
            written.append(weakref.ref(weight))
            return weight

        return Stored(stored.tensors, read)

    role = foundation("nf4", lora__rank=4).role("policy")
    for module in role.plain.modules():
        if isinstance(module, QuantisedLinear):
            module.stored = noting(module.stored)
    total = role.logprobs(BATCH).logprobs.sum()
    assert len(written) == 14
    assert not any(reference() is not None for reference in written)
    total.backward()
    assert len(written) == 14 + 11, "no input of the first layer's q, k and v has a gradient"
    assert not any(reference() is not None for reference in written)


@needs_bitsandbytes
@BOTH
def test_rollouts_use_the_base_as_it_is(foundation: Callable[..., Foundation], kind: str) -> None:
    found = foundation(kind)
    role = found.role("policy")
    copy = RolloutCopy(role)
    assert copy.sync() is role.plain
    assert copy.engine(found.renderer)._role is role


@needs_bitsandbytes
@BOTH
def test_exports_are_those_of_the_original_weights(
    foundation: Callable[..., Foundation], kind: str, tmp_path: Path
) -> None:
    """To the byte what the same adapter on the whole base gives."""
    written = {}
    for name in (kind, "none"):
        found, out = foundation(name), tmp_path / name
        role = shaken(found.role("policy"))
        export_policy(role.model, found.tokenizer, out / "policy", "policy")
        head = ScalarHead(64, seed=3)
        export_reward(role.model, head, found.tokenizer, out / "reward", "policy")
        export_policy(role.model, found.tokenizer, out / "bare")
        written[name] = {
            file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()
        }
    assert Path("policy/adapter/adapter_model.safetensors") in written[kind]
    assert written[kind] == written["none"]


def test_without_the_package_a_run_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, foundation: Callable[..., Foundation]
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else known(name)
    )
    monkeypatch.setattr(quantised, "load_causal_lm", lambda *_: pytest.fail("weights were read"))
    told = r'model.quantise: "nf4" needs .* bitsandbytes, .* pip install "amenable\[quantised\]"'
    settings = ["data.preferences=nowhere.jsonl", "policy.enabled=false"]
    with pytest.raises(ModelError, match=told):
        check_inputs(load_recipe(None, [*settings, "model.quantise=nf4"]))
    with pytest.raises(ModelError, match=told):
        foundation("nf4").role("policy")


def test_a_base_with_transposed_weights_is_refused(tmp_path: Path) -> None:
    for family in ("GPT2", "Llama"):
        build(family).save_pretrained(tmp_path / family)
    check_quantisable(tmp_path / "Llama")
    with pytest.raises(ModelError, match=r"GPT2: .*'gpt2' keeps its weights transposed .* take an"):
        check_quantisable(tmp_path / "GPT2")
