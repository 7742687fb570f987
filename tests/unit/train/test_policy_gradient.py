from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import StageContext
from amenable.train.experience import Minibatches, flat
from amenable.train.policy_gradient import GRADIENTS, Sampled

from .first_update import Floor, off_by, with_scores

PolicyContext = Callable[..., StageContext]
ONE_STEP = {"policy__minibatches": 1, "policy__epochs": 1}


def test_the_two_tables_have_the_same_rows() -> None:
    run = "amenable.train.policy_gradient:run"
    assert set(GRADIENTS) == {name for name, row in ALGORITHMS.items() if row.run == run}


def sampled() -> Sampled:
    """Two prompts: scores 1, 3, 5 and 2, 2; lengths 1, 2, 1, 2, 1. The fourth completion's 2 is a
    reward of -1 at its first token and 3 at its last.
    """
    rewards = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 0.0], [-1.0, 3.0], [2.0, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 0], [1, 1], [1, 0]]).bool()
    return Sampled(rewards, mask, [torch.arange(3), torch.arange(3, 5)])


def of_completions(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None] * sampled().mask


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_scores_in_deviations_of_the_group(name: str) -> None:
    """Mean 3 and sample deviation 2; equal scores give 0."""
    found = GRADIENTS[name].advantages(sampled())
    torch.testing.assert_close(found, of_completions(-1, 0, 1, 0, 0), rtol=1e-4, atol=1e-6)


def test_scores_less_the_mean_of_the_group() -> None:
    found = GRADIENTS["dr-grpo"].advantages(sampled())
    torch.testing.assert_close(found, of_completions(-2, 0, 2, 0, 0))


def test_scores_less_the_mean_of_the_others() -> None:
    """1 - 4, 3 - 3, 5 - 2."""
    found = GRADIENTS["rloo"].advantages(sampled())
    torch.testing.assert_close(found, of_completions(-3, 0, 3, 0, 0))


def test_whitened_returns() -> None:
    """Returns to go 1 | 3 3 | 5 | 2 3 | 2: mean 19/7, variance 61/7 - (19/7)²."""
    returns = torch.tensor([[1.0, 0], [3, 3], [5, 0], [2, 3], [2, 0]])
    scale = (61 / 7 - (19 / 7) ** 2) ** 0.5
    wanted = (returns - 19 / 7) / scale * sampled().mask
    torch.testing.assert_close(GRADIENTS["reinforce++"].advantages(sampled()), wanted)


def test_whitened_scores_less_the_mean_of_the_group() -> None:
    """Over seven tokens -2, 0, 0, 2, 0, 0, 0: mean 0 and variance 8/7."""
    found = GRADIENTS["reinforce++-baseline"].advantages(sampled())
    torch.testing.assert_close(found, of_completions(-2, 0, 2, 0, 0) / (8 / 7) ** 0.5)


@pytest.mark.parametrize(
    ("name", "aggregation", "length", "sides"),
    [
        ("grpo", "sequence", 1, (0.2, 0.2)),
        ("dr-grpo", "constant", 6, (0.2, 0.2)),
        ("dapo", "token", 1, (0.2, 0.28)),
        ("gspo", "sequence", 1, (3e-4, 4e-4)),
        ("rloo", "constant", 1, (0.2, 0.2)),
        ("reinforce++", "token", 1, (0.2, 0.2)),
        ("reinforce++-baseline", "token", 1, (0.2, 0.2)),
    ],
)
def test_clip_range_and_aggregation_of_each_row(
    policy_context: PolicyContext, name: str, aggregation: str, length: int, sides: Sequence[float]
) -> None:
    """Just inside either side a token learns, just outside it does not."""
    surrogate = GRADIENTS[name].surrogate(policy_context(policy__algorithm=name).recipe)
    assert (surrogate.aggregation, surrogate.length) == (aggregation, length)
    mask, old = torch.ones(1, 1).bool(), torch.zeros(1, 1)
    for sign, side in ((-1.0, -sides[0]), (1.0, sides[1])):
        for factor, outside in ((0.9, False), (1.1, True)):
            new = torch.tensor([[1 + side * factor]], dtype=torch.float64).log().requires_grad_()
            loss = surrogate.loss(new, old.double(), torch.tensor([[sign]]).double(), mask)
            loss.sum().backward()
            assert new.grad is not None
            assert (new.grad.abs().item() < 1e-9) == outside, (sign, factor)


def test_gspo_has_one_ratio_a_completion(policy_context: PolicyContext) -> None:
    """Ratios 1.5 and 0.5 of two tokens: the geometric mean 0.866 is below the range on both."""
    new = torch.tensor([[1.5, 0.5, 9.0]]).log()
    mask, old = torch.tensor([[True, True, False]]), torch.zeros(1, 3)
    recipe = policy_context(policy__algorithm="gspo").recipe
    surrogate = GRADIENTS["gspo"].surrogate(recipe)
    up, down = torch.ones(1, 3), -torch.ones(1, 3)
    mean = torch.full((2,), 0.75**0.5)
    torch.testing.assert_close(surrogate.loss(new, old, up, mask)[0, :2], -mean)
    torch.testing.assert_close(
        surrogate.loss(new, old, down, mask)[0, :2], torch.full((2,), 1 - 3e-4)
    )
    assert surrogate.clipped(new, old, down, mask)[0, :2].tolist() == [True, True]
    assert surrogate.clipped(new, old, up, mask)[0, :2].tolist() == [False, False]


def without_spread(minibatches: Minibatches, group: int) -> Minibatches:
    """Scores that differ within every prompt but this one."""
    return with_scores(minibatches, lambda e: 1.0 if e.group == group else float(len(set(e.text))))


def step(floor: Floor, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
    found = floor.learn(minibatches)
    return floor.gradient(), found


@pytest.mark.parametrize(("name", "share"), [("dapo", 1.0), ("grpo", 0.75), ("dr-grpo", 0.75)])
def test_a_prompt_of_equal_scores_counts_or_not(
    policy_context: PolicyContext, name: str, share: float
) -> None:
    """One prompt of four has equal scores. DAPO's step is the one without that prompt; the others
    divide by its completions as well, which leaves three quarters of it.
    """
    settings = {"policy__algorithm": name, "policy__samples_per_prompt": 4, **ONE_STEP}
    floor, fewer = (Floor.of(policy_context(**settings)) for _ in range(2))
    episodes = floor.loop._sample(0)
    all_four = without_spread(floor.measured(episodes), 2)
    others = fewer.measured([episode for episode in episodes if episode.group != 2])
    whole, found = step(floor, all_four)
    alone, _ = step(fewer, without_spread(others, -1))
    assert off_by(alone * share, whole) < 1e-4
    assert found["without_spread"] == 0.25


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_an_update_of_equal_scores_moves_nothing(policy_context: PolicyContext, name: str) -> None:
    floor = Floor.of(policy_context(policy__algorithm=name, kl__placement="none"))
    before = floor.roles.policy.state()
    found = floor.learn(with_scores(floor.measured(), lambda e: 3.0))
    after = floor.roles.policy.state()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert found["without_spread"] == 1.0


def test_a_minibatch_of_equal_scores_is_no_step_of_dapo(policy_context: PolicyContext) -> None:
    """Of two minibatches one is left, so one step a pass."""
    floor = Floor.of(policy_context(policy__algorithm="dapo", policy__epochs=1))
    minibatches = floor.measured()
    equal = {e.group for micro in minibatches[0] for e in micro.episodes}
    mixed = with_scores(
        minibatches, lambda e: 0.0 if e.group in equal else float(len(set(e.text)) + hash_of(e))
    )
    floor.learn(mixed)
    counts = {
        int(value)
        for key, value in floor.learner.state()[0]["policy_optimizer"].items()
        if key.endswith(".step")
    }
    assert counts == {1}


def hash_of(episode: object) -> float:
    return sum(map(ord, str(episode))) % 97 / 97


def test_groups_may_differ_in_size(policy_context: PolicyContext) -> None:
    """Baselines are those of each prompt's own completions: 4, 3 and 2 of them."""
    floor = Floor.of(policy_context(policy__algorithm="rloo", policy__samples_per_prompt=4))
    kept = [e for n, e in enumerate(floor.loop._sample(0)) if n not in (4, 8, 9)]
    minibatches = floor.measured(kept)
    sizes = sorted(own.stop - own.start for micro in flat(minibatches) for own in micro.groups())
    assert sizes == [2, 3, 4, 4]
    assert floor.learn(minibatches)["grad_norm"] > 0


def test_one_sample_a_prompt_is_enough_without_groups(policy_context: PolicyContext) -> None:
    """And says nothing of spread within a prompt, which one completion cannot have."""
    ctx = policy_context(policy__algorithm="reinforce++", policy__samples_per_prompt=1)
    found = Floor.of(ctx).learn()
    assert found["grad_norm"] > 0
    assert found.get("without_spread", 0.0) == 0.0
