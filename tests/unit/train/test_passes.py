from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amenable.artifacts import StageContext
from amenable.config.policy import KLConfig, PolicyConfig
from amenable.errors import NumericsError
from amenable.train.experience import flat
from amenable.train.passes import (
    Lesson,
    Totals,
    check_ratio,
    clip_sides,
    clipped_surrogate,
    lesson_weights,
    loss_penalty,
    minibatch_order,
    policy_rate,
)

from .first_update import Floor, episode, micro_batch

PolicyContext = Callable[..., StageContext]


def policy(**changes: Any) -> PolicyConfig:
    return PolicyConfig(**changes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.2, 0.28)),
        ({"clip_range": 0.1}, (0.1, 0.1)),
        ({"clip_range": 0.1, "clip_range_high": 0.3}, (0.1, 0.3)),
        ({"clip_range_high": 0.3}, (0.2, 0.3)),
    ],
)
def test_the_recipe_may_set_either_side_of_the_clip(
    settings: dict[str, float], expected: tuple[float, float]
) -> None:
    assert clip_sides(policy(**settings), (0.2, 0.28)) == expected


RATIOS = torch.tensor([[0.5, 1.0, 1.5, 4.0]])
MASK = torch.ones(1, 4).bool()


@pytest.mark.parametrize(
    ("dual", "sign", "losses", "clipped"),
    [
        # advantage 1: -ratio, and not below -1.2
        (0.0, 1.0, [-0.5, -1.0, -1.2, -1.2], [False, False, True, True]),
        # advantage -1: the ratio, and not below 0.8
        (0.0, -1.0, [0.8, 1.0, 1.5, 4.0], [True, False, False, False]),
        # the same, and not above 3
        (3.0, -1.0, [0.8, 1.0, 1.5, 3.0], [True, False, False, True]),
        (3.0, 1.0, [-0.5, -1.0, -1.2, -1.2], [False, False, True, True]),
    ],
)
def test_the_clipped_loss_by_hand(
    dual: float, sign: float, losses: list[float], clipped: list[bool]
) -> None:
    surrogate = clipped_surrogate(policy(dual_clip=dual), "token")
    new, old = RATIOS.log(), torch.zeros(1, 4)
    advantages = torch.full((1, 4), sign)
    torch.testing.assert_close(surrogate.loss(new, old, advantages, MASK)[0], torch.tensor(losses))
    assert surrogate.clipped(new, old, advantages, MASK)[0].tolist() == clipped


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k2", 0.5 * 0.25), ("k3", 0.6065307 - 1 + 0.5), ("weighted-k3", 2 * (0.6065307 - 1 + 0.5))],
)
def test_the_kl_of_the_loss_by_hand(name: Any, expected: float) -> None:
    """d = 0.5 against the reference, and twice as probable as at roll-out."""
    new = torch.tensor([[-1.0]])
    old, ref = new - torch.tensor(2.0).log(), new - 0.5
    found = loss_penalty(policy(kl=KLConfig(loss_estimator=name)))(new, old, ref)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def lessons() -> list[Lesson]:
    """Micro-batches of completions of 1 and 3 tokens, and of 2 and 6; the last learns nothing."""
    micros = [
        micro_batch([[episode(0, 1), episode(0, 3)]], [0.0, 0.0]),
        micro_batch([[episode(1, 2)], [episode(2, 6)]], [0.0, 0.0]),
    ]
    masks = [micro.batch.mask.clone() for micro in micros]
    masks[1][1] = False
    return [
        Lesson(micro, torch.ones(mask.shape), mask)
        for micro, mask in zip(micros, masks, strict=True)
    ]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [[1 / 6, 1 / 6], [1 / 6, 0]]),
        ("sequence", [[1 / 3, 1 / 9], [1 / 6, 0]]),
        ("constant", [[1 / 30, 1 / 30], [1 / 30, 0]]),
    ],
)
def test_weights_are_those_of_the_whole_minibatch(
    aggregation: Any, expected: list[list[float]]
) -> None:
    """Six tokens of three completions count; "constant" divides by ten a completion."""
    for lesson, weights, wanted in zip(
        lessons(), lesson_weights(lessons(), aggregation, 10), expected, strict=True
    ):
        mask = lesson.learnt
        torch.testing.assert_close(weights, mask * torch.tensor(wanted)[:, None])


def test_minibatches_come_in_an_order_of_their_own_in_each_pass() -> None:
    orders = [tuple(minibatch_order(6, 3, update, epoch)) for update in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) == 4
    assert orders[0] == tuple(minibatch_order(6, 3, 0, 0))


def test_the_rate_falls_to_its_last_share() -> None:
    config = policy(updates=4, learning_rate=0.1, final_learning_rate_fraction=0.5)
    assert [policy_rate(config, u) for u in range(4)] == pytest.approx([0.1, 0.0875, 0.075, 0.0625])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e-6])
def test_a_first_ratio_that_is_not_one_is_noticed(value: float) -> None:
    micro = micro_batch([[episode(0, 2)]], [0.0])
    check_ratio(torch.tensor([[0.0, 5e-7]]), micro)
    with pytest.raises(NumericsError, match="forward pass is not repeatable"):
        check_ratio(torch.tensor([[0.0, value]]), micro)


def test_totals_are_means_over_tokens_of_all_minibatches() -> None:
    totals, mask = Totals(), torch.tensor([[True, True, False]])
    totals.add("approx_kl", torch.tensor([[1.0, 2.0, 99.0]]), mask)
    totals.share()
    totals.start_minibatch()
    totals.add("approx_kl", torch.tensor([[5.0, 99.0, 99.0]]), torch.tensor([[True, False, False]]))
    totals.share()
    totals.norms += [1.0, 3.0]
    assert totals.approx_kl_of_minibatch() == 5.0
    assert totals.metrics() == {"approx_kl": 8 / 3, "ratio_max": 0.0, "grad_norm": 2.0}


@pytest.mark.parametrize("coef", [0.5, 0.0])
def test_an_entropy_bonus_raises_entropy(
    policy_context: PolicyContext, lively: Path, coef: float
) -> None:
    """All advantages are 0, so that nothing but the bonus moves the policy."""
    ctx = policy_context(
        base=lively,
        lora__enabled=False,
        policy__algorithm="reinforce++",
        policy__entropy_coef=coef,
        policy__learning_rate=1e-3,
        policy__max_approx_kl=10.0,
        kl__placement="none",
    )
    floor = Floor.of(ctx)
    minibatches = [
        [dataclasses.replace(micro, scores=torch.zeros_like(micro.scores)) for micro in part]
        for part in floor.measured()
    ]
    floor.learn(minibatches)
    rises = []
    for micro in flat(minibatches):
        now = floor.roles.policy.logprobs(micro.batch, with_entropy=True).entropy
        assert now is not None
        rises.append(float((now.detach() - micro.entropy).sum() / micro.batch.mask.sum()))
    assert all(rise > 0.02 for rise in rises) if coef else rises == [0.0] * len(rises)


@pytest.mark.parametrize("most", [10.0, 1e-4])
def test_passes_end_when_the_policy_has_moved_far(
    policy_context: PolicyContext, most: float
) -> None:
    ctx = policy_context(
        policy__algorithm="grpo",
        policy__learning_rate=3e-2,
        policy__epochs=4,
        policy__max_approx_kl=most,
    )
    assert Floor.of(ctx).learn()["passes"] == (4.0 if most == 10.0 else 1.0)


def test_a_critic_that_warms_up_leaves_the_policy_still(policy_context: PolicyContext) -> None:
    """Update 0 moves the critic alone, update 1 both."""
    floor = Floor.of(policy_context(reward_model=True, ppo__critic_warmup_updates=1))
    minibatches = floor.measured()
    roles = {"policy": floor.roles.policy, "critic": floor.learner._critic.role}

    def moved(update: int) -> dict[str, bool]:
        before = {name: role.state() for name, role in roles.items()}
        floor.learner.learn(minibatches, update, 0.05)
        after = {name: role.state() for name, role in roles.items()}
        return {
            name: any(not torch.equal(after[name][key], value) for key, value in state.items())
            for name, state in before.items()
        }

    assert moved(0) == {"policy": False, "critic": True}
    assert moved(1) == {"policy": True, "critic": True}


@pytest.mark.parametrize(
    ("cap", "factor"), [(2.0, 1.5), (1.25, 1.25), (0.0, 1.0)], ids=["weight", "cap", "off"]
)
def test_samples_of_another_engine_are_weighed(
    policy_context: PolicyContext, cap: float, factor: float
) -> None:
    """It drew each token with 2 / 3 of the trainer's probability: gradients count 1.5 times."""
    found = []
    for said in (False, True):
        ctx = policy_context(
            policy__algorithm="rloo",
            policy__epochs=1,
            policy__minibatches=1,
            policy__max_grad_norm=1e9,
            vllm__ratio_cap=cap,
            kl__placement="none",
        )
        floor = Floor.of(ctx)
        minibatches = floor.measured()
        if said:
            minibatches = [
                [
                    dataclasses.replace(m, sampler_logprobs=m.logprobs - torch.tensor(1.5).log())
                    for m in part
                ]
                for part in minibatches
            ]
        floor.learn(minibatches)
        found.append(floor.gradient())
    assert float(found[0].norm()) > 1e-3
    torch.testing.assert_close(found[1], factor * found[0], atol=1e-6, rtol=1e-3)
