from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from amenable.artifacts import StageContext
from amenable.data.collate import PromptGroup, collate
from amenable.errors import ModelError
from amenable.models.build import Foundation
from amenable.models.export import export_policy, export_reward, load_reward_head
from amenable.models.heads import ScalarHead

from .conftest import build

MakeContext = Callable[..., StageContext]
BATCH = collate([PromptGroup([5, 9, 300], [[41, 17, 2], [8, 260, 77, 12, 2]])], pad_id=0)


@pytest.fixture
def foundation(make_context: MakeContext) -> Callable[..., Foundation]:
    def make(**changes: Any) -> Foundation:
        return Foundation.open(make_context("policy", **changes).recipe)

    return make


def test_open_reads_the_tokenizer_and_no_weights(foundation: Callable[..., Foundation]) -> None:
    found = foundation(data__instruction="Go.", data__max_completion_tokens=5)
    assert found.renderer.eos_ids == frozenset({2})
    assert (found.renderer.instruction, found.renderer.max_completion_tokens) == ("Go.", 5)
    assert found.dtype is torch.float32
    assert found._shared is None


def test_open_says_what_is_wrong_with_a_folder(
    foundation: Callable[..., Foundation], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="empty"):
        foundation(base=tmp_path / "empty")


def test_lora_roles_share_one_frozen_base(foundation: Callable[..., Foundation]) -> None:
    found = foundation()
    reference = found.role("reference", train=False)
    policy = found.role("policy")
    critic = found.role("critic", head=ScalarHead(64))
    assert len({id(role.plain) for role in (policy, critic)}) == 1
    assert reference.adapter is None
    assert (policy.adapter, critic.adapter) == ("policy", "critic")
    base = [p for key, p in policy.model.named_parameters() if ".lora_" not in key]
    assert base
    assert not any(p.requires_grad for p in base)


def test_the_bare_base_stays_bare_when_adapters_join_later(
    foundation: Callable[..., Foundation],
) -> None:
    """A reference without adapter, opened before the policy's adapter was put on the base."""
    found = foundation()
    reference = found.role("reference", train=False)
    with torch.no_grad():
        before = reference.logprobs(BATCH).logprobs
        policy = found.role("policy")
        assert torch.equal(policy.logprobs(BATCH).logprobs, before)
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
        assert not torch.equal(policy.logprobs(BATCH).logprobs, before)
        assert torch.equal(reference.logprobs(BATCH).logprobs, before)


def test_lora_roles_start_from_a_stages_adapter(
    foundation: Callable[..., Foundation], tmp_path: Path
) -> None:
    first = foundation()
    sft = first.role("sft")
    with torch.no_grad():
        for parameter in sft.trainable_parameters():
            parameter.add_(0.05)
        wanted = sft.logprobs(BATCH).logprobs
    export_policy(sft.model, first.tokenizer, tmp_path / "sft", sft.adapter)
    second = foundation()
    policy = second.role("policy", tmp_path / "sft")
    reference = second.role("reference", tmp_path / "sft", train=False)
    assert isinstance(policy.model, PeftModel)
    assert policy.plain is reference.plain
    with torch.no_grad():
        assert torch.equal(policy.logprobs(BATCH).logprobs, reference.logprobs(BATCH).logprobs)
        torch.testing.assert_close(policy.logprobs(BATCH).logprobs, wanted)


def test_full_fine_tuning_gives_each_role_weights_of_its_own(
    foundation: Callable[..., Foundation],
) -> None:
    found = foundation(lora__enabled=False, model__dtype="bf16")
    policy, reference = found.role("policy"), found.role("reference", train=False)
    assert policy.plain is not reference.plain
    assert policy.adapter is None
    assert policy.plain.dtype is torch.float32, "trained weights are float32"
    with torch.no_grad():
        assert torch.equal(policy.logprobs(BATCH).logprobs, reference.logprobs(BATCH).logprobs)
    products = reference.plain.model.layers[0]
    assert {p.dtype for p in products.mlp.parameters()} == {torch.bfloat16}, "cast once"
    assert not any(p.requires_grad for p in reference.plain.parameters())
    assert (policy.dtype, reference.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPTNeoX", "GPT2"])
def test_roles_start_from_an_exported_reward_model(
    foundation: Callable[..., Foundation], tmp_path: Path, family: str, lora: bool
) -> None:
    """Also where the base's output head is not tied: a reward model has none."""
    from amenable.models.tiny import tiny_tokenizer

    build(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    first = foundation(base=tmp_path / "base", lora__enabled=lora)
    reward = first.role("reward", head=ScalarHead(32, seed=4))
    with torch.no_grad():
        for parameter in reward.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
        wanted = reward.scores(BATCH)
    out = tmp_path / "reward"
    export_reward(reward.model, reward.scalar_head, first.tokenizer, out, reward.adapter, 0.5)
    second = foundation(base=tmp_path / "base", lora__enabled=lora)
    for train in (False, True):
        head, offset = load_reward_head(out)
        role = second.role(f"critic{train}", out, head=head, train=train)
        assert offset == 0.5
        with torch.no_grad():
            torch.testing.assert_close(role.scores(BATCH), wanted, rtol=1e-4, atol=1e-4)
        role.values(BATCH).sum().backward()
