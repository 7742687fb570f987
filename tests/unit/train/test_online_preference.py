from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amenable.artifacts import StageContext
from amenable.config.load import load_recipe
from amenable.errors import RecipeError
from amenable.train.experience import flat
from amenable.train.online_preference import pair_places

from .first_update import Floor, episode, micro_batch, off_by, with_scores

PolicyContext = Callable[..., StageContext]
SETTINGS = {
    "policy__algorithm": "online-dpo",
    "policy__samples_per_prompt": 4,
    "policy__minibatches": 1,
    "policy__epochs": 1,
}


def test_completions_are_paired_within_their_prompt() -> None:
    """Four, three and one completions: two pairs, one pair, none."""
    groups = [[episode(g) for _ in range(size)] for g, size in enumerate((4, 3, 1))]
    micro = micro_batch(groups, [0.0] * 8)
    assert pair_places(micro).tolist() == [[0, 1], [2, 3], [4, 5]]
    alone = micro_batch([[episode(0)]], [0.0])
    assert pair_places(alone).shape == (0, 2)


def test_the_first_loss_is_log_two(policy_context: PolicyContext) -> None:
    """The policy is the reference, so no lead, whatever the labels."""
    for labels in ("soft", "sampled"):
        floor = Floor.of(policy_context(**SETTINGS, online_dpo__labels=labels))
        assert floor.learn()["policy_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_step_is_that_of_the_soft_dpo_loss(policy_context: PolicyContext) -> None:
    """Where the lead is 0, the loss of a pair falls by beta (p - 1/2) of the lead's gradient."""
    beta, floor = 0.3, Floor.of(policy_context(**SETTINGS))
    minibatches = with_scores(floor.measured(), lambda e: 3.0 * len(set(e.text)))
    policy, total, pairs = floor.roles.policy, torch.zeros(()), 0
    for micro in flat(minibatches):
        sums = policy.logprobs(micro.batch).logprobs.sum(1)
        for a, b in pair_places(micro).tolist():
            wanted = 1 / (1 + math.exp(float(micro.scores[b] - micro.scores[a])))
            total = total - beta * (wanted - 0.5) * (sums[a] - sums[b])
            pairs += 1
    assert pairs == 8
    parameters = policy.trainable_parameters()
    grads = torch.autograd.grad(total / pairs, parameters)
    norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
    assert floor.learn(minibatches, kl_coef=beta)["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_sampled_labels_follow_bradley_and_terry(policy_context: PolicyContext) -> None:
    """Scores apart by log 3: the better one is preferred in three of four draws."""
    floor = Floor.of(
        policy_context(
            **{**SETTINGS, "policy__prompts_per_update": 20, "policy__samples_per_prompt": 20},
            online_dpo__labels="sampled",
        )
    )
    wins, pairs = 0.0, 0
    for micro in flat(floor.measured()):
        places = pair_places(micro)
        scores = torch.zeros_like(micro.scores)
        scores[places[:, 0]] = math.log(3)
        floored = with_scores([[micro]], lambda e: 0.0)[0][0]
        object.__setattr__(floored, "scores", scores)
        for update in range(5):
            labels = floor.learner._labels(floored, places, update)
            assert set(labels.tolist()) <= {0.0, 1.0}
            wins, pairs = wins + float(labels.sum()), pairs + len(labels)
    assert pairs == 1000
    assert abs(wins / pairs - 0.75) < 4 * math.sqrt(0.75 * 0.25 / pairs)


def test_sampled_labels_do_not_depend_on_micro_batches(policy_context: PolicyContext) -> None:
    """Nor do two prompts, or a prompt that comes twice, share their draws."""
    gradients = []
    for budget in (1, 100_000):
        ctx = policy_context(
            **{**SETTINGS, "policy__prompts_per_update": 10},
            policy__micro_batch_tokens=budget,
            online_dpo__labels="sampled",
        )
        floor = Floor.of(ctx)
        floor.learn()
        gradients.append(floor.gradient())
    assert off_by(*gradients) < 1e-3


def test_a_prompt_that_comes_twice_has_labels_of_its_own(policy_context: PolicyContext) -> None:
    """Twenty prompts of which ten are the same: equal scores, so labels are fair coins."""
    ctx = policy_context(
        **{**SETTINGS, "policy__prompts_per_update": 20, "policy__samples_per_prompt": 16},
        policy__micro_batch_tokens=1,
        online_dpo__labels="sampled",
    )
    floor = Floor.of(ctx)
    by_prompt: dict[str, list[tuple[float, ...]]] = {}
    for micro in flat(with_scores(floor.measured(), lambda e: 0.0)):
        labels = floor.learner._labels(micro, pair_places(micro), 0)
        by_prompt.setdefault(micro.episodes[0].prompt.id, []).append(tuple(labels.tolist()))
    assert all(len(found) == 2 for found in by_prompt.values())
    assert sum(one == other for one, other in by_prompt.values()) <= 1


def test_the_lead_grows_towards_the_labels(policy_context: PolicyContext) -> None:
    """Over the mean of twelve passes the loss is below that of no lead, log 2."""
    ctx = policy_context(**{**SETTINGS, "policy__epochs": 12}, policy__learning_rate=1e-2)
    floor = Floor.of(ctx)
    minibatches = with_scores(floor.measured(), lambda e: 5.0 * len(set(e.text)))
    found = floor.learn(minibatches, kl_coef=0.3)
    assert found["policy_loss"] < 0.9 * math.log(2)
    assert found["pair_accuracy"] > 0.8
    assert found["passes"] == 12.0


def test_a_minibatch_without_a_pair_is_no_step(policy_context: PolicyContext) -> None:
    floor = Floor.of(policy_context(**SETTINGS))
    alone = [e for n, e in enumerate(floor.loop._sample(0)) if n % 4 == 0]
    minibatches = floor.loop._micro_batches([(e,) for e in alone])
    found = floor.learn([minibatches])
    assert (found["policy_loss"], found["grad_norm"]) == (0.0, 0.0)


def test_a_beta_of_zero_is_refused_at_the_start(tmp_path: Path) -> None:
    """The KL weight is DPO's beta, by which the implied reward is multiplied."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nbase = "tiny"\n[data]\nprompts = ["p.jsonl"]\ndemonstrations = ["p.jsonl"]\n'
        '[policy]\nalgorithm = "online-dpo"\nreward = "m:f"\n[policy.kl]\ncoef = 0.0\n',
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match=r"policy\.kl\.coef"):
        load_recipe(path)
