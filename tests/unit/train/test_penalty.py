from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import StageContext
from amenable.config.policy import KLConfig, PolicyConfig
from amenable.train.experience import MicroBatch
from amenable.train.penalty import KLController, KLPenalty
from amenable.train.policy_gradient import GRADIENTS

from .conftest import shake
from .first_update import Floor, episode, make_learner, micro_batch, off_by

PolicyContext = Callable[..., StageContext]
WITH_PLACES = ["ppo", *GRADIENTS]
PLACES = ["none", "reward", "loss", "both"]


def penalty(**kl: Any) -> KLPenalty:
    return KLPenalty(PolicyConfig(kl=KLConfig(**kl)))


def two_completions(token_scores: torch.Tensor | None = None) -> MicroBatch:
    """Of three tokens and of one; log-ratios 0.5, -1, 2 and 1; scores 10 and 20."""
    return micro_batch(
        [[episode(0, 3), episode(0, 1)]],
        [10.0, 20.0],
        logprobs=torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]]),
        token_scores=token_scores,
    )


def test_the_score_falls_on_the_last_token_and_the_penalty_on_each() -> None:
    """-0.1 k1 everywhere, and 10 or 20 at the end."""
    found = penalty(placement="reward").token_rewards(two_completions(), 0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.1, 9.8], [19.9, 0.0, 0.0]]))


@pytest.mark.parametrize("placement", ["loss", "none"])
def test_a_penalty_outside_the_reward_leaves_the_reward_alone(placement: str) -> None:
    found = penalty(placement=placement).token_rewards(two_completions(), 0.1)
    assert found.tolist() == [[0, 0, 10], [20, 0, 0]]


def test_the_reward_takes_the_named_estimator() -> None:
    """k2 = d² / 2: 0.125, 0.5, 2; k3 = exp(-d) - 1 + d: 0.1065, 0.7183, 1.1353."""
    by_name = {"k2": [0.125, 0.5, 2.0], "k3": [0.10653066, 0.71828183, 1.13533528]}
    for name, kl in by_name.items():
        found = penalty(placement="both", estimator=name).token_rewards(two_completions(), 1.0)
        torch.testing.assert_close(found[0], torch.tensor([-kl[0], -kl[1], 10 - kl[2]]))


def test_scores_of_steps_stay_at_their_tokens() -> None:
    """Of the first completion's 10, a step gives 3 at token 0 and another -1 at token 1; the other
    8 are the last token's. Their sum is the score, whatever the steps.
    """
    steps = torch.tensor([[3.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    found = penalty(placement="none").token_rewards(two_completions(steps), 0.1)
    assert found.tolist() == [[3, -1, 8], [20, 0, 0]]
    assert found.sum(1).tolist() == [10, 20]


@pytest.mark.parametrize("name", WITH_PLACES)
def test_places_of_the_kl_add_up(policy_context: PolicyContext, name: str) -> None:
    """On one roll-out batch of a policy that has left its reference: without a place the weight
    does nothing; in the loss the gradient is linear in the weight; both places are the sum of both
    changes; and a place in the reward is another than one in the loss.
    """

    settings = {
        "policy__algorithm": name,
        "policy__samples_per_prompt": 4,
        "policy__minibatches": 1,
        "policy__epochs": 1,
        "policy__max_grad_norm": 1e9,
        "lora__enabled": False,
    }
    floor = Floor.of(policy_context(**settings))
    shake(floor.roles.policy.trainable_parameters(), seed=4, size=0.01)
    start, minibatches = floor.roles.policy.state(), floor.measured()

    def gradient(placement: str, coef: float) -> tuple[torch.Tensor, dict[str, float]]:
        floor.roles.policy.load_state(start)
        ctx = policy_context(kl__placement=placement, **settings)
        floor.learner = make_learner(ctx, floor.roles)
        found = floor.learn(minibatches, kl_coef=coef)
        return floor.gradient(), found

    plain, found = gradient("none", 0.0)
    assert "kl_penalty" not in found
    assert torch.equal(plain, gradient("none", 0.5)[0])
    (rewarded, with_reward), (lost, with_loss), (both, _) = (
        gradient(place, 0.5) for place in ("reward", "loss", "both")
    )
    assert off_by(plain, rewarded) > 1e-3
    assert off_by(plain, lost) > 1e-3
    assert off_by(lost - plain, rewarded - plain) > 0.1
    assert off_by(lost - plain, both - rewarded) < 1e-3
    assert off_by(lost - plain, (gradient("loss", 1.0)[0] - plain) / 2) < 1e-3
    assert "kl_penalty" not in with_reward
    assert with_loss["kl_penalty"] > 0
    auto = gradient("auto", 0.5)[0]
    own = dict(zip(PLACES, (plain, rewarded, lost, both), strict=True))[ALGORITHMS[name].kl]
    assert off_by(own, auto) < 1e-6


def controller(kind: str, **changes: Any) -> KLController:
    kl = {"coef": 0.1, "target": 2.0, "horizon": 100, "controller": kind, **changes}
    return KLController(PolicyConfig(kl=KLConfig(**kl)))


def test_a_fixed_weight_stays() -> None:
    steered = controller("fixed")
    steered.observe(50.0, 10)
    assert steered.coef == 0.1


def test_an_adaptive_weight_is_clipped_at_a_fifth() -> None:
    """0.1 (1 + 0.2 · 10 / 100), then half of the target: -0.2."""
    steered = controller("adaptive")
    steered.observe(50.0, 10)
    assert steered.coef == pytest.approx(0.102)
    steered.observe(1.0, 10)
    assert steered.coef == pytest.approx(0.102 * 0.98)


def test_a_multiplier_sums_the_errors_and_falls_to_zero() -> None:
    """0.1 + 0.1 (4 / 2 - 1) 10 / 100 = 0.11; then eleven times -0.1 · 10 / 100, and never below."""
    steered = controller("target")
    steered.observe(4.0, 10)
    assert steered.coef == pytest.approx(0.11)
    for _ in range(12):
        steered.observe(0.0, 10)
    assert steered.coef == 0.0
    steered.observe(4.0, 50)
    assert steered.coef == pytest.approx(0.05), "steps are of the first weight, so it comes back"


def test_the_score_of_a_step_reaches_ppo_at_its_token(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    """Steps of 5 after the first character and -5 after the last one, λ 0 and no critic yet: the
    advantage of a token is its own reward. The others see the sum, 0, and learn nothing.
    """

    def score(prompts: Any, completions: Any, rows: Any) -> list[Any]:
        return [[[1, 5.0], [len(text), -5.0]] for text in completions]

    policy_reward.score = score  # type: ignore[attr-defined]
    settings = {
        "policy__missing_eos_penalty": 0.0,
        "kl__placement": "none",
        "ppo__gae_lambda": 0.0,
        "ppo__whiten_advantages": False,
    }
    floor = Floor.of(policy_context(**settings))
    lessons, _ = floor.learner._lessons(floor.measured(), 0.0)
    for part in lessons:
        for lesson in part:
            last = lesson.micro.batch.mask.sum(1) - 1
            for row, own in enumerate(lesson.advantages):
                (up,), (down,) = own.eq(5).nonzero(), own.eq(-5).nonzero()
                assert int(own.ne(0).sum()) == 2
                assert int(up) < int(down) <= int(last[row])
    others = Floor.of(policy_context(policy__algorithm="rloo", **settings))
    assert others.learn()["grad_norm"] < 1e-6
