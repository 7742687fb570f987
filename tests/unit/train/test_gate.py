"""The numerics gate: no false alarm on sound models, and each planted fault by its name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from amenable.artifacts import StageContext
from amenable.config.policy import GATE_CHECKS
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import NumericsError, RecipeError
from amenable.models.heads import ScalarHead
from amenable.models.tiny import VOCAB_SIZE, tiny_tokenizer
from amenable.train.gate.findings import CHECKS, Finding, refusal

PolicyContext = Callable[..., StageContext]


def _beside(name: str) -> ModuleType:
    """A module beside this file; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


faults = _beside("gate_faults")
others = _beside("other_engine")

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma2": {**SIZES, "head_dim": 8},
    "Gemma3": {**SIZES, "head_dim": 8},
    "GPTNeoX": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "GPT2": {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel"}


def random_model(family: str, folder: Path) -> Path:
    """A folder with a random model of the family, whose answers differ clearly."""
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(
        **SHAPES[family], **ids, bos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, MODELS.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def world_of(policy_context: PolicyContext, **changes: Any) -> Any:
    settings = {"policy__temperature": 0.7, "data__max_completion_tokens": 12, **changes}
    ctx = policy_context(**settings)
    return faults.build_world(ctx, open_prompts(ctx.folder.data / "prompts.train.jsonl"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_tiny_model_passes(policy_context: PolicyContext, lora: bool, dtype: str) -> None:
    found = world_of(policy_context, lora__enabled=lora, model__dtype=dtype).look()
    assert set(found["checks"]) == set(CHECKS)
    assert all(check["holds"] for check in found["checks"].values())
    assert found["dtype"] == dtype
    assert found["rows"]["prompts"] == 4
    assert ("logprobs" in found["noise"]) == (dtype == "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", SHAPES)
def test_other_architectures_pass(
    policy_context: PolicyContext, tmp_path: Path, family: str, dtype: str
) -> None:
    base = random_model(family, tmp_path / "base")
    found = world_of(policy_context, base=base, model__dtype=dtype).look()
    assert all(check["holds"] for check in found["checks"].values())


@pytest.mark.parametrize("planted", faults.FAULTS, ids=lambda planted: planted.name)
def test_a_planted_fault_is_named(
    policy_context: PolicyContext, lively: Path, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(policy_context, base=lively)
    planted.plant(monkeypatch, world)
    with pytest.raises(NumericsError, match=rf"\n  {planted.check}: "):
        world.look()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "fault", [{}, {"stale": True}, {"off": 0.01}], ids=["sound", "stale", "off"]
)
def test_another_engine_is_held_against_the_trainer(
    policy_context: PolicyContext, lively: Path, fault: dict[str, Any], lora: bool
) -> None:
    world = world_of(policy_context, base=lively, lora__enabled=lora)
    world.served = others.OtherCopy(world.roles.policy, **fault)
    if not fault:
        assert world.look()["checks"]["roll-out"]["holds"]
        assert world.served.syncs == 2, "shifted, and back"
        return
    with pytest.raises(NumericsError, match=r"\n  roll-out: engine against trainer, nats: "):
        world.look()


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX"])
def test_the_sampler_s_positions_matter_elsewhere_too(
    policy_context: PolicyContext, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 has absolute positions: a column of padding is another position."""
    world = world_of(policy_context, base=random_model(family, tmp_path / "base"))
    faults.sampler_positions_count_padding(monkeypatch, world)
    with pytest.raises(NumericsError, match="roll-out: "):
        world.look()


@pytest.mark.parametrize("lora", [True, False])
def test_nothing_is_left_changed(policy_context: PolicyContext, lora: bool) -> None:
    """Weights, gradients, flags, the roll-out copy and the random state, to the last bit."""
    world = world_of(policy_context, lora__enabled=lora)
    world.copy.sync()
    modules = [role.model for role in (world.roles.policy, world.roles.reference, world.critic)]
    modules += [world.engine.model, world.roles.reward_role.model, world.critic.head]
    parameters = [p for module in modules for p in module.parameters()]
    parameters[0].grad = torch.ones_like(parameters[0])
    before = [p.detach().clone() for p in parameters]
    flags = [p.requires_grad for p in parameters]
    state = torch.get_rng_state()
    world.look()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert [p.requires_grad for p in parameters] == flags
    assert torch.equal(_gradient(parameters[0]), torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters if p is not parameters[0])


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_a_failure_leaves_nothing_changed_either(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(policy_context)
    before = world.roles.policy.state()
    faults.completions_see_each_other(monkeypatch, world)
    with pytest.raises(NumericsError):
        world.look()
    assert all(torch.equal(before[key], new) for key, new in world.roles.policy.state().items())


def test_every_failing_check_is_listed_with_what_to_do(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(policy_context)
    faults.completions_see_each_other(monkeypatch, world)
    faults.eos_not_trained(monkeypatch, world)
    with pytest.raises(NumericsError) as caught:
        world.look()
    text = str(caught.value)
    assert "  eos: ways in which stopping is not trained: 1, allowed 0" in text
    assert "  group: a shared row against rows alone, nats: " in text
    assert "Likely: completions that share a prompt's row see each other" in text
    assert 'policy.gate_skip = ["eos", "group"' in text


def test_a_named_check_is_measured_but_not_held_to(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(policy_context)
    faults.eos_not_trained(monkeypatch, world)
    found = world.look(skip=("eos",))
    assert found["checks"]["eos"]["skipped"]
    assert not found["checks"]["eos"]["holds"]
    assert "not held to: eos (fails)" in said(world.ctx)


def said(ctx: StageContext) -> str:
    return str(ctx.progress._stream.getvalue())  # type: ignore[attr-defined]


def test_an_unknown_name_is_refused(policy_context: PolicyContext) -> None:
    with pytest.raises(RecipeError, match="no check of the gate: grup; the checks are finite, "):
        world_of(policy_context).look(skip=("grup",))


def test_one_prompt_and_no_reward_model_are_enough(policy_context: PolicyContext) -> None:
    ctx = policy_context(data__max_completion_tokens=1)
    prompts = open_prompts(ctx.folder.data / "prompts.train.jsonl")
    found = faults.build_world(ctx, [prompts[0]], reward=False).look()
    assert "reward" not in found["checks"]
    assert "critic" not in found["checks"]
    assert found["rows"] == {"prompts": 1, "prompt_tokens": 21, "completion_tokens": 2}


def test_a_number_that_is_none_fails() -> None:
    assert not Finding("ratio", "x", float("nan"), 1.0).holds
    assert Finding("ratio", "x", 1.0, 1.0).holds
    assert "ratio: x: nan, allowed 1" in refusal([Finding("ratio", "x", float("nan"), 1.0)])


def test_a_sampler_that_is_the_reference_passes(policy_context: PolicyContext) -> None:
    """Best of n samples from a policy that never moves."""
    from amenable.rollout.transformers_engine import RolloutCopy, TransformersEngine

    world = world_of(policy_context)
    world.copy = RolloutCopy(world.roles.reference)
    renderer = world.roles.foundation.renderer
    world.engine = TransformersEngine(
        world.copy.model, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id
    )
    assert all(check["holds"] for check in world.look()["checks"].values())


def test_a_critic_on_the_reward_model_s_states_passes(policy_context: PolicyContext) -> None:
    """Its head may be zero, and it shares the reward model's pass."""
    world = world_of(policy_context)
    scorer = world.roles.reward_role
    world.critic = replace(scorer, head=ScalarHead.from_weight(torch.zeros(1, 64)))
    checks = world.look()["checks"]
    assert checks["critic"]["holds"]
    assert any(row["figure"] > 0 for row in checks["critic"]["figures"]), "a zero head says nothing"


@pytest.mark.parametrize(
    "plant",
    [
        faults.trainer_pads_left_without_a_mask,
        faults.sampler_attends_to_padding,
        faults.sampler_positions_count_padding,
    ],
)
def test_equally_long_prompts_are_made_unequal(
    policy_context: PolicyContext, lively: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding none of these would be seen."""
    world = world_of(policy_context, base=lively)
    world.prompts = [
        Prompt(messages=(Message(Speaker.USER, f"{digit}" * 80),), id=f"{digit}", group=f"{digit}")
        for digit in range(8)
    ]
    sizes = {len(world.roles.foundation.renderer.prompt_ids(p)) for p in world.prompts}
    assert len(sizes) == 1
    plant(monkeypatch, world)
    with pytest.raises(NumericsError, match=r"neighbours: |roll-out: "):
        world.look()


def test_the_recipe_knows_the_checks() -> None:
    assert tuple(CHECKS) == GATE_CHECKS
