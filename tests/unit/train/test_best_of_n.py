from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from amenable.artifacts import StageContext
from amenable.train.best_of_n import best_tokens
from amenable.train.experience import flat
from amenable.train.registry import run_policy

from .conftest import shake
from .first_update import Floor, episode, figures, micro_batch, with_scores

PolicyContext = Callable[..., StageContext]
SETTINGS = {"policy__algorithm": "best-of-n", "policy__minibatches": 1, "policy__epochs": 1}


def test_the_best_of_each_prompt_is_learnt_with_its_end() -> None:
    """The second of three, the first of two that are equal; of 3 and of 2 real tokens."""
    groups = [[episode(0, 1), episode(0, 3), episode(0, 2)], [episode(1, 2), episode(1, 4)]]
    found = best_tokens(micro_batch(groups, [1.0, 3.0, 2.0, 5.0, 5.0]))
    assert found.sum(1).tolist() == [0, 3, 0, 2, 0]
    assert found[1].tolist() == [True, True, True, False]


def test_the_step_is_that_of_the_mean_cross_entropy(policy_context: PolicyContext) -> None:
    """Over the tokens of the best completions alone, whatever the KL's weight."""
    floor = Floor.of(policy_context(**SETTINGS, policy__samples_per_prompt=3))
    minibatches = with_scores(floor.measured(), lambda e: float(len(set(e.text))))
    policy, total, tokens = floor.roles.policy, torch.zeros(()), 0
    best = []
    for micro in flat(minibatches):
        logprobs = policy.logprobs(micro.batch).logprobs
        for own in micro.groups():
            row = max(range(own.start, own.stop), key=lambda n: (float(micro.scores[n]), -n))
            best.append(float(micro.scores[row]))
            total = total - logprobs[row][micro.batch.mask[row]].sum()
            tokens += int(micro.batch.mask[row].sum())
    grads = torch.autograd.grad(total / tokens, policy.trainable_parameters())
    norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
    found = floor.learn(minibatches, kl_coef=9.0)
    assert found["policy_loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert found["best_score"] == pytest.approx(sum(best) / len(best))


@pytest.mark.parametrize("sampler", ["policy", "reference"])
def test_the_recipe_says_who_samples(policy_context: PolicyContext, sampler: str) -> None:
    """A policy that has left the reference samples other completions; the reference's stay."""
    floor = Floor.of(policy_context(**SETTINGS, best_of_n__sampler=sampler))
    before = [episode.rollout for episode in floor.loop._sample(0)]
    shake(floor.roles.policy.trainable_parameters(), seed=4, size=0.3)
    after = [episode.rollout for episode in floor.loop._sample(0)]
    assert (before == after) == (sampler == "reference")


def rewards(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["reward"] for row in rows]


def test_samples_of_the_reference_are_no_measure_of_the_policys_kl(
    policy_context: PolicyContext, lively: Path
) -> None:
    """The policy has moved, so KL(policy || reference) is above 0; over the reference's samples the
    mean log-ratio is -KL(reference || policy), which is below.
    """
    ctx = policy_context(
        base=lively,
        lora__enabled=False,
        policy__algorithm="best-of-n",
        policy__updates=3,
        policy__prompts_per_update=10,
        policy__samples_per_prompt=4,
        policy__learning_rate=5e-3,
        policy__gate=False,
        best_of_n__sampler="reference",
    )
    run_policy(ctx)
    rows = figures(ctx)
    assert rows[0]["kl_loss"] == 0.0
    assert all(row["kl_loss"] > 0 for row in rows[1:])
