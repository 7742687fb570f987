"""Planted faults for the numerics gate: each breaks the real code or the loaded model.

A fault is undone by the monkeypatch that it gets. The tests plant them in tiny models,
`benchmarks/gate.py` in the demo's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from amenable.artifacts import StageContext
from amenable.data import collate as collating
from amenable.data.collate import GroupBatch
from amenable.data.render import Renderer
from amenable.data.schemas import Prompt
from amenable.models import adapters, logprobs, roles
from amenable.models.build import Foundation
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role
from amenable.rollout import transformers_engine as engines
from amenable.rollout.lean_llama import LeanLlama
from amenable.rollout.transformers_engine import RolloutCopy, TransformersEngine
from amenable.train.gate import run_gate
from amenable.train.policy_roles import PolicyRoles


@dataclass
class World:
    """What the loop hands to the gate."""

    ctx: StageContext
    roles: PolicyRoles
    engine: TransformersEngine
    copy: RolloutCopy
    critic: Role | None
    prompts: Sequence[Prompt]
    served: Any = None

    def look(self, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """Run the gate."""
        policy = replace(self.ctx.recipe.policy, gate_skip=skip)
        ctx = replace(self.ctx, recipe=replace(self.ctx.recipe, policy=policy))
        return run_gate(
            ctx,
            self.roles,
            self.engine,
            self.prompts,
            copy=self.copy,
            critic=self.critic,
            served=self.served,
        )


def build_world(ctx: StageContext, prompts: Sequence[Prompt], *, reward: bool = True) -> World:
    """Policy, reference, a fresh reward model and a critic of its own trunk."""
    foundation = Foundation.open(ctx.recipe)
    policy, reference = foundation.role("policy"), foundation.role("reference", train=False)
    width = policy.plain.config.get_text_config().hidden_size
    scorer = critic = None
    if reward:
        scorer = foundation.role("reward", head=ScalarHead(width, seed=3))
        critic = foundation.role("critic", head=ScalarHead.from_weight(torch.zeros(1, width)))
    copy = RolloutCopy(policy)
    engine = TransformersEngine(
        copy.model,
        eos_ids=foundation.renderer.eos_ids,
        pad_id=foundation.renderer.pad_id,
        dtype=foundation.dtype,
    )
    everyone = PolicyRoles(foundation, policy, reference, None, None, scorer)
    return World(ctx, everyone, engine, copy, critic, prompts)


Patch = pytest.MonkeyPatch


def trainer_without_temperature(patch: Patch, world: World) -> None:
    """The learners' log-probabilities leave policy.temperature out."""
    real = roles.completion_logprobs

    def wrong(*given: Any, temperature: float, **more: Any) -> Any:
        return real(*given, temperature=1.0, **more)

    patch.setattr(roles, "completion_logprobs", wrong)


def sampler_without_temperature(patch: Patch, world: World) -> None:
    """Tokens are drawn at temperature 1."""
    real = engines.draw_tokens

    def wrong(logits: Any, sampling: Any, noise: Any) -> Any:
        hot = sampling if sampling.temperature == 0 else replace(sampling, temperature=1.0)
        return real(logits, hot, noise)

    patch.setattr(engines, "draw_tokens", wrong)


def dropout_on(patch: Patch, world: World) -> None:
    """Attention drops a tenth, in training mode."""
    for module in world.roles.policy.plain.modules():
        patch.setattr(module, "training", True)
        if hasattr(module, "attention_dropout"):
            patch.setattr(module, "attention_dropout", 0.1)


def _change_batch(patch: Patch, change: Callable[[GroupBatch], GroupBatch]) -> None:
    real = logprobs.hidden_states
    patch.setattr(logprobs, "hidden_states", lambda model, batch: real(model, change(batch)))


def positions_with_a_gap(patch: Patch, world: World) -> None:
    """Completions begin one position after the prompt's end."""

    def change(batch: GroupBatch) -> GroupBatch:
        first = torch.zeros_like(batch.position_ids[:, 0])
        first[batch.rows] = batch.sources[:, 0]
        moved = batch.position_ids > first[:, None]
        return replace(batch, position_ids=batch.position_ids + moved)

    _change_batch(patch, change)


def positions_not_reset(patch: Patch, world: World) -> None:
    """A second completion goes on counting where the first has ended."""

    def change(batch: GroupBatch) -> GroupBatch:
        return replace(
            batch,
            position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids),
        )

    _change_batch(patch, change)


def completions_see_each_other(patch: Patch, world: World) -> None:
    """The mask of a shared row is plainly causal."""

    def causal(segments: Any) -> Any:
        rows, size = segments.shape
        return torch.ones(size, size, dtype=torch.bool).tril().expand(rows, 1, size, size)

    def whole(groups: Any) -> Any:
        start = 0
        for group in groups:
            yield collating.Span(start, start + group.tokens)
            start += group.tokens

    patch.setattr(collating, "_group_attention", causal)
    patch.setattr(collating, "_spans", whole)


def trainer_pads_left_without_a_mask(patch: Patch, world: World) -> None:
    """Rows end in the last column, and nothing hides the padding before them."""
    real = logprobs.hidden_states

    def wrong(model: Any, batch: GroupBatch) -> Any:
        if batch.attention_mask is not None:
            return real(model, batch)
        width = batch.input_ids.shape[1]
        gaps = width - 1 - batch.last
        places = (torch.arange(width) - gaps[:, None]) % width
        moved = replace(batch, input_ids=batch.input_ids.gather(1, places))
        back = (torch.arange(width) + gaps[:, None]) % width
        hidden = real(model, moved)
        return hidden.gather(1, back[..., None].expand_as(hidden))

    patch.setattr(logprobs, "hidden_states", wrong)


def sampler_attends_to_padding(patch: Patch, world: World) -> None:
    """Prompts are padded on the left and the mask says that all is real."""
    patch.setattr(engines, "is_lean", lambda model: False)
    real = TransformersEngine._encode

    def wrong(self: Any, prompts: Any) -> Any:
        width, pad = max(map(len, prompts)), world.engine.pad_id
        return real(self, [(pad,) * (width - len(prompt)) + prompt for prompt in prompts])

    patch.setattr(TransformersEngine, "_encode", wrong)


def sampler_positions_count_padding(patch: Patch, world: World) -> None:
    """The prompt's positions are its columns."""
    patch.setattr(engines, "is_lean", lambda model: False)
    real = TransformersEngine._forward

    def wrong(self: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        if ids.shape[1] > 1:
            positions = torch.arange(ids.shape[1]).expand_as(positions)
        return real(self, ids, mask, positions, cache)

    patch.setattr(TransformersEngine, "_forward", wrong)


def prompts_count_on(patch: Patch, world: World) -> None:
    """Positions go on from one prompt to the next that is read in the same pass."""
    real = LeanLlama._hidden

    def wrong(self: Any, ids: Any, positions: Any, *rest: Any) -> Any:
        if len(ids) > len(positions.unique()) and int(positions[0]) == 0:
            positions = torch.arange(len(ids))
        return real(self, ids, positions, *rest)

    patch.setattr(LeanLlama, "_hidden", wrong)


def stale_copy(patch: Patch, world: World) -> None:
    """The roll-out copy never takes over the policy's weights."""
    patch.setattr(RolloutCopy, "sync", lambda self: self.model)


def merged_with_half_the_scale(patch: Patch, world: World) -> None:
    """The copy holds W + scale / 2 · B A."""
    real = adapters.merged_weights

    def wrong(model: Any, name: str) -> Iterator[tuple[str, Any]]:
        modules = dict(model.get_base_model().named_modules())
        for key, weight in real(model, name):
            base = modules[key].get_base_layer().weight
            yield key, ((base.float() + weight.float()) / 2).to(weight.dtype)

    patch.setattr(adapters, "merged_weights", wrong)


def sampler_in_bf16(patch: Patch, world: World) -> None:
    """The sampler computes in bf16, the trainer in fp32."""
    patch.setattr(world.engine, "dtype", torch.bfloat16)


def _shaken(patch: Patch, parameter: torch.nn.Parameter, size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(parameter.shape, generator=generator).to(parameter) * size
    patch.setattr(parameter, "data", parameter.data + noise)


def policy_is_not_the_reference(patch: Patch, world: World) -> None:
    """One matrix of the policy's adapter has changed since the reference was made."""
    name = "lora_B.policy"
    one = next(p for key, p in world.roles.policy.model.named_parameters() if name in key)
    _shaken(patch, one, 0.003)


def reference_is_the_policy(patch: Patch, world: World) -> None:
    """Both roles have one adapter: the KL would stay 0 however far the policy goes."""
    patch.setattr(world, "roles", replace(world.roles, reference=world.roles.policy))


def pad_is_eos(patch: Patch, world: World) -> None:
    """The tokenizer pads with its end-of-sequence token."""
    tokenizer = world.roles.foundation.tokenizer
    patch.setitem(tokenizer._special_tokens_map, "pad_token", tokenizer.eos_token)


def eos_outside_the_vocabulary(patch: Patch, world: World) -> None:
    """The sampler waits for an id that the model does not have."""
    patch.setattr(
        world.engine, "eos_ids", frozenset({world.roles.policy.plain.config.vocab_size + 3})
    )


def eos_cannot_be_drawn(patch: Patch, world: World) -> None:
    """The output layer hides the ends of sequences."""
    for model in (world.roles.policy.plain, world.engine.model):
        head = model.get_output_embeddings()
        real = head.forward

        def wrong(states: Any, real: Callable[[Any], Any] = real) -> Any:
            logits = real(states).clone()
            logits[..., sorted(world.roles.foundation.renderer.eos_ids)] = -torch.inf
            return logits

        patch.setattr(head, "forward", wrong)


def eos_not_trained(patch: Patch, world: World) -> None:
    """Answers are rendered without their end."""
    real = Renderer.completion_ids
    patch.setattr(Renderer, "completion_ids", lambda self, text: real(self, text)[:-1])


def base_weight_trainable(patch: Patch, world: World) -> None:
    """A matrix of the frozen base asks for gradients."""
    base = world.roles.policy.plain
    one = next(p for name, p in base.named_parameters() if "lora" not in name and p.dim() == 2)
    patch.setattr(one, "requires_grad", True)


def trained_parameter_frozen(patch: Patch, world: World) -> None:
    """A matrix that the optimizer holds gets no gradient."""
    real = Role.active

    @contextmanager
    def wrong(self: Role) -> Iterator[Any]:
        with real(self) as model:
            world.roles.policy.trainable_parameters()[1].requires_grad_(False)
            yield model

    patch.setattr(Role, "active", wrong)


def optimizer_misses_a_parameter(patch: Patch, world: World) -> None:
    """A matrix that gets a gradient is not in the optimizer."""
    real = Role.trainable_parameters
    patch.setattr(Role, "trainable_parameters", lambda self: real(self)[:-1])


def graph_cut(patch: Patch, world: World) -> None:
    """Hidden states are detached."""
    real = logprobs.hidden_states
    patch.setattr(logprobs, "hidden_states", lambda *given: real(*given).detach())


def _change_places(patch: Patch, change: Callable[[GroupBatch], GroupBatch]) -> None:
    real = roles.completion_states
    patch.setattr(roles, "completion_states", lambda model, batch: real(model, change(batch)))


def score_one_token_early(patch: Patch, world: World) -> None:
    """The score is read at the last token but one."""
    _change_places(patch, lambda batch: replace(batch, last=batch.last - 1))


def score_at_the_padding(patch: Patch, world: World) -> None:
    """The score is read in the last column, which is padding in shorter rows."""

    def change(batch: GroupBatch) -> GroupBatch:
        return replace(batch, last=torch.full_like(batch.last, batch.input_ids.shape[1] - 1))

    _change_places(patch, change)


def reward_reads_the_policys_adapter(patch: Patch, world: World) -> None:
    """Scores move with the policy."""
    assert world.roles.reward_role is not None
    wrong = replace(world.roles.reward_role, adapter=world.roles.policy.adapter)
    patch.setattr(world, "roles", replace(world.roles, reward_role=wrong))


def values_one_token_late(patch: Patch, world: World) -> None:
    """The critic has seen the token whose value it gives."""
    real = roles.completion_values

    def wrong(model: Any, head: Any, batch: GroupBatch) -> Any:
        return real(model, head, replace(batch, sources=batch.sources + 1))

    patch.setattr(roles, "completion_values", wrong)


def weight_is_nan(patch: Patch, world: World) -> None:
    """One number of the base is NaN."""
    one = next(p for p in world.roles.policy.plain.parameters() if p.dim() == 2)
    broken = one.data.clone()
    broken[7, 0] = torch.nan
    patch.setattr(one, "data", broken)


@dataclass(frozen=True)
class Planted:
    """A fault and the check that must name it."""

    plant: Callable[[Patch, World], None]
    check: str
    bf16: bool = True
    """Whether it must be caught in bf16 as well."""

    @property
    def name(self) -> str:
        """Of the fault."""
        return self.plant.__name__


FAULTS = [
    Planted(trainer_without_temperature, "temperature"),
    Planted(sampler_without_temperature, "temperature"),
    Planted(dropout_on, "dropout"),
    Planted(positions_with_a_gap, "temperature", bf16=False),
    Planted(positions_not_reset, "group", bf16=False),
    Planted(completions_see_each_other, "group"),
    Planted(trainer_pads_left_without_a_mask, "neighbours"),
    Planted(sampler_attends_to_padding, "roll-out"),
    Planted(sampler_positions_count_padding, "roll-out"),
    Planted(prompts_count_on, "roll-out"),
    Planted(stale_copy, "roll-out"),
    Planted(merged_with_half_the_scale, "roll-out"),
    Planted(sampler_in_bf16, "roll-out", bf16=False),
    Planted(policy_is_not_the_reference, "reference"),
    Planted(reference_is_the_policy, "reference"),
    Planted(pad_is_eos, "pad"),
    Planted(eos_outside_the_vocabulary, "eos"),
    Planted(eos_cannot_be_drawn, "eos"),
    Planted(eos_not_trained, "eos"),
    Planted(base_weight_trainable, "gradient"),
    Planted(trained_parameter_frozen, "gradient"),
    Planted(optimizer_misses_a_parameter, "gradient"),
    Planted(graph_cut, "gradient"),
    Planted(score_one_token_early, "reward"),
    Planted(score_at_the_padding, "reward"),
    Planted(reward_reads_the_policys_adapter, "reward"),
    Planted(values_one_token_late, "critic"),
    Planted(weight_is_nan, "finite"),
]
