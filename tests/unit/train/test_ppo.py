from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from amenable.artifacts import StageContext, read_json, read_jsonl
from amenable.errors import NumericsError, RecipeError
from amenable.models.build import Foundation
from amenable.plan.hardware import resident_bytes
from amenable.train import ppo
from amenable.train.passes import check_ratio
from amenable.train.policy_roles import open_roles
from amenable.train.ppo import HeadCritic, PPOLearner, RoleCritic, make_critic

from .conftest import vowel_share

PolicyContext = Callable[..., StageContext]
LEARNING = {
    "policy__prompts_per_update": 10,
    "policy__samples_per_prompt": 4,
    "policy__checkpoint_every": 100,
    "policy__final_learning_rate_fraction": 1.0,
    "kl__coef": 0.0,
    "policy__missing_eos_penalty": 0.0,
    "ppo__critic_learning_rate": 1e-3,
}


def metrics(ctx: StageContext) -> list[dict[str, float]]:
    return [
        {key.removeprefix("policy/"): value for key, value in row.items()}
        for row in read_jsonl(ctx.log.metrics_path)
    ]


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_first_update_starts_at_ratio_one_and_kl_zero(
    policy_context: PolicyContext, lora: bool, critic: str
) -> None:
    """One pass of one minibatch: all figures are those before the first step."""
    ctx = policy_context(
        reward_model=True,
        sft_model=True,
        lora__enabled=lora,
        ppo__critic=critic,
        policy__epochs=1,
        policy__minibatches=1,
        policy__updates=2,
    )
    ppo.run(ctx)
    for row in metrics(ctx):
        assert row["ratio_max"] == 1.0
        assert row["approx_kl"] == 0.0
        assert row["clip_fraction"] == 0.0
        assert abs(row["policy_loss"]) < 1e-5, "ratio 1: minus the mean whitened advantage"
    assert metrics(ctx)[0]["kl_loss"] == 0.0
    assert metrics(ctx)[1]["kl_loss"] != 0.0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_merged_rollouts_the_gate_holds_and_the_run_ends(
    policy_context: PolicyContext, dtype: str
) -> None:
    ctx = policy_context(
        reward_model=True,
        sft_model=True,
        model__dtype=dtype,
        policy__merged_rollouts=False,
        policy__epochs=1,
        policy__minibatches=1,
        policy__updates=2,
    )
    ppo.run(ctx)
    assert all(check["holds"] for check in read_json(ctx.out / "gate.json")["checks"].values())
    assert [row["ratio_max"] for row in metrics(ctx)] == [1.0, 1.0]


def test_full_fine_tuning_learns_a_tiny_task(policy_context: PolicyContext, lively: Path) -> None:
    """From a share of vowels of 0.15 to more than 0.3 (random text of this vocabulary has 0.25)."""
    ctx = policy_context(
        base=lively,
        lora__enabled=False,
        policy__learning_rate=3e-3,
        policy__updates=10,
        **LEARNING,
    )
    section = ppo.run(ctx)
    assert section["reward_first"] < 0.22
    assert section["reward_last"] > 0.33
    assert section["reward_rise_standard_errors"] > 3


def test_adapters_go_where_the_reward_points(
    policy_context: PolicyContext, lively: Path, tmp_path: Path, policy_reward: types.ModuleType
) -> None:
    """The same run with the reward turned round must end with fewer vowels."""
    shares = {}
    for sign in (1, -1):

        def score(prompts: Any, completions: Any, rows: Any, sign: int = sign) -> list[float]:
            return [sign * share for share in vowel_share(prompts, completions, rows)]

        policy_reward.score = score  # type: ignore[attr-defined]
        ctx = policy_context(
            root=tmp_path / str(sign),
            base=lively,
            policy__learning_rate=1e-2,
            policy__updates=8,
            lora__rank=8,
            **LEARNING,
        )
        ppo.run(ctx)
        shares[sign] = sum(sign * row["reward"] for row in metrics(ctx)[-3:]) / 3
    assert shares[1] > shares[-1] + 0.08


@pytest.mark.parametrize(
    ("lora", "critic"), [(True, "adapter"), (True, "head"), (False, "adapter"), (False, "head")]
)
def test_a_resumed_stage_gives_the_same_bits(
    policy_context: PolicyContext, tmp_path: Path, lora: bool, critic: str
) -> None:
    """Policy, critic, both optimizers and the adaptive KL weight."""
    settings: dict[str, Any] = {
        "reward_model": True,
        "sft_model": True,
        "lora__enabled": lora,
        "ppo__critic": critic,
        "policy__updates": 4,
        "policy__learning_rate": 1e-3,
        "kl__controller": "adaptive",
        "kl__target": 0.01,
        "kl__horizon": 100,
    }
    whole = policy_context(root=tmp_path / "whole", **settings)
    section = ppo.run(whole)
    ppo.run(policy_context(root=tmp_path / "part", stop_after=2, **settings))
    rest = policy_context(root=tmp_path / "part", **settings)
    assert ppo.run(rest) == section
    tuned = [ctx.folder.models / "tuned" / "model.safetensors" for ctx in (rest, whole)]
    assert tuned[0].read_bytes() == tuned[1].read_bytes()
    last = [ctx.out / "checkpoints" / f"step-{section['updates']:06d}" for ctx in (rest, whole)]
    for name in ("policy", "critic", "policy_optimizer", "critic_optimizer"):
        one, other = (load_file(path / f"{name}.safetensors") for path in last)
        assert one.keys() == other.keys()
        assert one
        assert all(torch.equal(one[key], other[key]) for key in one), name
    coefs = [read_json(path / "numbers.json")["kl_coef"] for path in last]
    assert coefs[0] == coefs[1]
    assert coefs[0] != 0.05, "the controller must have moved the weight"


def test_the_adaptive_weight_follows_ziegler(policy_context: PolicyContext) -> None:
    """coef (1 + clip(kl / target - 1, ±0.2) · 8 episodes / 100); update 0 has KL 0, so -0.2."""
    ctx = policy_context(
        policy__updates=4, kl__controller="adaptive", kl__target=0.02, kl__horizon=100, kl__coef=0.1
    )
    ppo.run(ctx)
    rows = metrics(ctx)
    coef = 0.1
    for row in rows:
        assert row["kl_coef"] == pytest.approx(coef)
        objective = row["reward"] - coef * row["kl_loss"]
        assert row["objective"] == pytest.approx(objective, abs=1e-6)
        coef *= 1 + max(-0.2, min(0.2, row["kl_loss"] / 0.02 - 1)) * 8 / 100
    assert rows[1]["kl_coef"] == pytest.approx(0.0984)


def test_a_fixed_weight_stays(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__updates=3, kl__coef=0.07)
    ppo.run(ctx)
    assert [row["kl_coef"] for row in metrics(ctx)] == [0.07] * 3


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_training_leaves_reference_and_reward_model_alone(
    policy_context: PolicyContext, critic: str, lora: bool
) -> None:
    ctx = policy_context(reward_model=True, sft_model=True, ppo__critic=critic, lora__enabled=lora)
    roles = open_roles(ctx)
    learner = PPOLearner(ctx, roles)
    loop = ppo_loop(ctx, roles, learner)
    assert roles.reward_role is not None
    frozen = {"reference": roles.reference, "reward": roles.reward_role}
    moving = {"policy": roles.policy, "critic": learner._critic.role}
    before = {name: role.state() for name, role in (frozen | moving).items()}
    loop._update(0)

    def unchanged(name: str) -> bool:
        state = (frozen | moving)[name].state()
        assert state
        return all(torch.equal(state[key], before[name][key]) for key in state)

    assert {name: unchanged(name) for name in frozen} == dict.fromkeys(frozen, True)
    assert {name: unchanged(name) for name in moving} == dict.fromkeys(moving, False)


def ppo_loop(ctx: StageContext, roles: Any, learner: PPOLearner) -> Any:
    from amenable.train.on_policy import _OnPolicyLoop

    return _OnPolicyLoop(ctx, roles, learner)


def test_an_adapter_critic_starts_as_the_centred_reward_model(
    policy_context: PolicyContext,
) -> None:
    """It says of every state what the reward model would, less the offset of 0.25."""
    ctx = policy_context(reward_model=True, sft_model=True)
    roles = open_roles(ctx)
    critic = make_critic(ctx, roles)
    assert isinstance(critic, RoleCritic)
    micro = first_micro(ctx, roles)
    assert roles.reward_role is not None
    with torch.no_grad():
        states = roles.reward_role.states(micro.batch).before
        wanted = states @ roles.reward_role.scalar_head.weight[0] - 0.25
        found = critic.values(micro)
    torch.testing.assert_close(found[micro.batch.mask], wanted, rtol=1e-4, atol=1e-5)
    assert found[~micro.batch.mask].abs().sum() == 0
    assert len(critic.role.trainable_parameters()) == 29


def test_a_head_critic_starts_at_zero_on_the_reward_models_states(
    policy_context: PolicyContext,
) -> None:
    ctx = policy_context(reward_model=True, sft_model=True, ppo__critic="head")
    roles = open_roles(ctx)
    critic = make_critic(ctx, roles)
    assert isinstance(critic, HeadCritic)
    (weight,) = critic.role.trainable_parameters()
    micro = first_micro(ctx, roles)
    assert critic.values(micro).abs().sum() == 0
    weight.data[0, 5] = 2.0
    assert roles.reward_role is not None
    with torch.no_grad():
        states = roles.reward_role.states(micro.batch).before
    found = critic.values(micro)
    torch.testing.assert_close(found[micro.batch.mask].detach(), 2.0 * states[:, 5])
    assert found[~micro.batch.mask].abs().sum() == 0


def first_micro(ctx: StageContext, roles: Any) -> Any:
    """The first two completions of the first update."""
    loop = ppo_loop(ctx, roles, PPOLearner.__new__(PPOLearner))
    return loop._micro_batches([tuple(loop._sample(0)[:2])])[0]


def test_without_a_reward_model_the_critic_starts_at_zero(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__updates=1, policy__epochs=1)
    ppo.run(ctx)
    (row,) = metrics(ctx)
    assert row["explained_variance"] == 0.0, "a constant explains nothing"


def test_a_head_critic_needs_the_runs_reward_model(policy_context: PolicyContext) -> None:
    ctx = policy_context(ppo__critic="head")
    with pytest.raises(RecipeError, match=r'set policy.ppo.critic = "adapter"'):
        make_critic(ctx, open_roles(ctx))


def test_the_critic_learns_a_constant_reward(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    """Every completion scores 1: the values go from 0 towards 1, their squared error falls."""

    def one(prompts: Any, completions: Any, rows: Any) -> list[float]:
        return [1.0] * len(completions)

    policy_reward.score = one  # type: ignore[attr-defined]
    settings = {**LEARNING, "ppo__critic_learning_rate": 3e-2, "ppo__value_clip_range": 10.0}
    ctx = policy_context(policy__updates=6, policy__learning_rate=1e-5, **settings)
    ppo.run(ctx)
    losses = [row["value_loss"] for row in metrics(ctx)]
    assert losses[0] > 0.2
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("whiten", [True, False])
def test_the_recipe_decides_on_whitening(policy_context: PolicyContext, whiten: bool) -> None:
    ctx = policy_context(ppo__whiten_advantages=whiten)
    roles = open_roles(ctx)
    learner = PPOLearner(ctx, roles)
    loop = ppo_loop(ctx, roles, learner)
    lessons, targets = learner._lessons(measured(loop), 0.05)
    flat = torch.cat(
        [row.advantages[row.micro.batch.mask] for minibatch in lessons for row in minibatch]
    )
    assert len(lessons) == len(targets) == 2
    assert (abs(flat.square().mean().item() - 1.0) < 1e-3) == whiten
    parts = [
        torch.cat([row.advantages[row.micro.batch.mask] for row in minibatch])
        for minibatch in lessons
    ]
    assert all(abs(part.mean().item()) > 1e-4 for part in parts), "whitened together, not apart"


def test_passes_stop_when_the_policy_has_moved_far(policy_context: PolicyContext) -> None:
    far = policy_context(
        policy__updates=1, policy__learning_rate=1e-1, policy__epochs=5, policy__max_approx_kl=1e-4
    )
    ppo.run(far)
    assert metrics(far)[0]["passes"] == 1.0


def measured(loop: Any) -> Any:
    """The micro-batches of the first update, with scores."""
    episodes, _ = loop._scorer.judge(loop._sample(0), 0)
    return loop._measure(loop._usable(episodes, 0), 0)


def test_a_forward_pass_that_is_not_repeatable_is_noticed() -> None:
    micro: Any = types.SimpleNamespace(logprobs=torch.zeros(1, 2))
    check_ratio(torch.full((1, 2), 5e-7), micro)
    with pytest.raises(NumericsError, match=r"differ by 2e-06 nats \(allowed: 1e-06\)"):
        check_ratio(torch.tensor([[0.0, 2e-6]]), micro)


def test_gradients_do_not_depend_on_micro_batches(policy_context: PolicyContext) -> None:
    """One optimizer step from rows one by one and from all rows at once: the same norms."""
    found = []
    for budget in (1, 100_000):
        ctx = policy_context(
            reward_model=True,
            policy__micro_batch_tokens=budget,
            policy__minibatches=1,
            policy__epochs=1,
            policy__updates=1,
        )
        roles = open_roles(ctx)
        learner = PPOLearner(ctx, roles)
        loop = ppo_loop(ctx, roles, learner)
        minibatches = measured(loop)
        assert len(minibatches[0]) == (4 if budget == 1 else 1)
        found.append(learner.learn(minibatches, 0, 0.05))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
    assert found[0]["grad_norm"] > 0


def test_foundation_is_shared_by_all_four_roles(policy_context: PolicyContext) -> None:
    ctx = policy_context(reward_model=True, sft_model=True)
    roles = open_roles(ctx)
    critic = make_critic(ctx, roles)
    assert roles.reward_role is not None
    everyone = [roles.policy, roles.reference, roles.reward_role, critic.role]
    assert len({id(role.plain) for role in everyone}) == 1
    assert isinstance(roles.foundation, Foundation)


def test_adams_epsilon_is_that_of_the_published_runs(policy_context: PolicyContext) -> None:
    learner = PPOLearner(ctx := policy_context(), open_roles(ctx))
    for optimizer in (learner._passes.optimizer, learner._critic_optimizer):
        assert [group["eps"] for group in optimizer._adam.param_groups] == [1e-5]


def test_a_critic_that_warms_up_leaves_the_policy_alone(policy_context: PolicyContext) -> None:
    ctx = policy_context(
        policy__updates=3, ppo__critic_warmup_updates=2, policy__learning_rate=1e-2
    )
    ppo.run(ctx)
    rows = metrics(ctx)
    assert [row["kl_loss"] == 0.0 for row in rows] == [True, True, True], "measured before learning"
    assert ["policy_loss" in row for row in rows] == [False, False, True]
    assert all(row["critic_grad_norm"] > 0 for row in rows)


@pytest.mark.skipif(not resident_bytes(), reason="the system does not tell a process's memory")
@pytest.mark.parametrize("lora", [True, False])
def test_memory_does_not_grow_with_the_updates(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """200 updates: after the first 50 the process stays as large as it is.

    What is kept of an update, its metrics, is some kilobytes. Were its micro-batches kept, with
    their log-probabilities and hidden states, 150 updates would be 40 MB.
    """
    ctx = policy_context(
        reward_model=True,
        lora__enabled=lora,
        policy__updates=200,
        policy__checkpoint_every=100,
        policy__gate=False,
        policy__epochs=1,
        policy__minibatches=1,
        policy__prompts_per_update=8,
        policy__samples_per_prompt=8,
        policy__learning_rate=1e-5,
    )
    sizes: list[int] = []
    write = ctx.log.write

    def watched(step: int, **figures: float) -> None:
        write(step, **figures)
        sizes.append(resident_bytes())

    monkeypatch.setattr(ctx.log, "write", watched)
    ppo.run(ctx)
    assert len(sizes) == 200
    assert max(sizes[150:]) - min(sizes[50:60]) < 12e6
