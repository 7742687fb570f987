from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from amenable.artifacts import StageContext, read_jsonl
from amenable.config.rewards import RewardPart
from amenable.errors import StageError
from amenable.train.experience import flat
from amenable.train.registry import run_policy
from amenable.train.scoring import Scorer

from .conftest import SCORE, vowel_share
from .first_update import Floor, episode, figures

PolicyContext = Callable[..., StageContext]


def shaped(ctx: StageContext, scores: Sequence[float], ended: Sequence[bool]) -> list[float]:
    scorer: Any = types.SimpleNamespace(_config=ctx.recipe.policy)
    episodes = [episode(0, ended=end) for end in ended]
    return Scorer._shaped(scorer, torch.tensor(scores), episodes)[0].tolist()


@pytest.mark.parametrize(
    ("rule", "expected"), [("subtract", [1.0, 2.5, -3.0]), ("replace", [1.0, -0.5, -3.0])]
)
def test_a_missing_end_costs_or_decides(
    policy_context: PolicyContext, rule: str, expected: list[float]
) -> None:
    ctx = policy_context(policy__missing_eos=rule, policy__missing_eos_penalty=0.5)
    assert shaped(ctx, [1.0, 3.0, -3.0], [True, False, True]) == expected


def test_whitening_divides_by_the_deviation_and_keeps_the_mean(
    policy_context: PolicyContext,
) -> None:
    """Mean 3 and deviation 2; the price of a missing end comes after it."""
    ctx = policy_context(policy__whiten_scores=True, policy__missing_eos_penalty=0.5)
    found = shaped(ctx, [1.0, 5.0, 1.0, 5.0], [True, True, False, True])
    assert found == pytest.approx([2.0, 4.0, 1.5, 4.0])


def test_clipping_comes_before_whitening(policy_context: PolicyContext) -> None:
    """±9 become ±2, whose deviation is 2."""
    ctx = policy_context(policy__whiten_scores=True, policy__score_clip=2.0)
    assert shaped(ctx, [9.0, -9.0], [True, True]) == pytest.approx([1.0, -1.0])


def test_scores_of_steps_fall_on_the_tokens_that_hold_them(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    """A step ends behind every vowel, with the vowel's place as its score."""

    def steps(prompts: Any, completions: Sequence[str], rows: Any) -> list[Any]:
        return [
            [[i + 1, float(i)] for i, c in enumerate(text) if c in "aeiou"] or 0.0
            for text in completions
        ]

    policy_reward.score = steps  # type: ignore[attr-defined]
    floor = Floor.of(policy_context(policy__missing_eos_penalty=0.0))
    text = floor.roles.foundation.renderer.completion_text
    seen = 0
    for micro in flat(floor.measured()):
        assert micro.token_scores is not None
        for row, one in enumerate(micro.episodes):
            ids, wanted = one.rollout.completion_ids, [0.0] * micro.batch.mask.shape[1]
            for i, character in enumerate(one.text):
                if character in "aeiou":
                    ends = [len(text(ids[: t + 1])) for t in range(len(ids))]
                    wanted[min(t for t, end in enumerate(ends) if end > i)] += i
                    seen += 1
            assert micro.token_scores[row].tolist() == pytest.approx(wanted)
            assert float(micro.scores[row]) == pytest.approx(sum(wanted), abs=1e-5)
    assert seen > 8


def test_shaping_a_score_shapes_its_steps(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    """The whole score is given at the first character, so what whitening makes of it belongs there
    too: it arrives divided by the deviation, and the last token gets what keeps the mean, which is
    the same for all.
    """

    def first(prompts: Any, completions: Sequence[str], rows: Any) -> list[Any]:
        shares = vowel_share(prompts, completions, rows)
        return [[[1, 100 * share]] for share in shares]

    policy_reward.score = first  # type: ignore[attr-defined]
    floor = Floor.of(policy_context(policy__missing_eos_penalty=0.0, policy__whiten_scores=True))
    micros = flat(floor.measured())
    raw = torch.tensor([100 * vowel_share([], [e.text], [])[0] for m in micros for e in m.episodes])
    ends, steps = [], []
    for micro in micros:
        rewards = floor.learner._penalty.token_rewards(micro, 0.0)
        last = micro.batch.mask.sum(1, keepdim=True) - 1
        ends.append(rewards.gather(1, last)[:, 0])
        steps.append(rewards.sum(1) - ends[-1])
    assert torch.cat(ends).tolist() == pytest.approx([float(torch.cat(ends)[0])] * 8, abs=1e-3)
    torch.testing.assert_close(torch.cat(steps), raw / raw.std(correction=0), rtol=1e-3, atol=1e-3)


def test_a_replaced_score_has_no_steps(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    """A completion that was cut off scores minus the penalty, at its end, and nothing before."""

    def first(prompts: Any, completions: Sequence[str], rows: Any) -> list[Any]:
        return [[[1, 7.0]] for _ in completions]

    policy_reward.score = first  # type: ignore[attr-defined]
    floor = Floor.of(policy_context(policy__missing_eos="replace", policy__missing_eos_penalty=2.0))
    for micro in flat(floor.measured()):
        rewards = floor.learner._penalty.token_rewards(micro, 0.0)
        for row, one in enumerate(micro.episodes):
            assert not one.rollout.ended
            length = int(micro.batch.mask[row].sum())
            assert rewards[row, :length].tolist() == [0.0] * (length - 1) + [-2.0]


def test_a_failure_is_a_sample_with_its_reason(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    """One of eight fails in each update."""
    asked: list[int] = []

    def score(prompts: Any, completions: Sequence[str], rows: Any) -> list[Any]:
        asked.append(len(completions))
        shares: list[Any] = list(vowel_share(prompts, completions, rows))
        return [{"score": None, "reason": "too odd"}, *shares[1:]]

    policy_reward.score = score  # type: ignore[attr-defined]
    ctx = policy_context(policy__algorithm="reinforce++", policy__updates=2, policy__gate=False)
    run_policy(ctx)
    assert asked == [8, 8]
    rows = list(read_jsonl(ctx.log.samples_path))
    failed = [row for row in rows if row["score"] is None]
    assert [row["step"] for row in failed] == [0, 1]
    assert all(row["reason"].endswith("too odd") for row in failed)
    assert len(rows) == 16
    for row in figures(ctx):
        assert row["reward_failures"] == 1 / 8
        assert row["left_out"] == 1 / 8
    own = [row["score"] for row in rows if row["step"] == 0 and row["score"] is not None]
    assert figures(ctx)[0]["reward"] == pytest.approx(sum(own) / 7, abs=1e-5)


def test_a_group_of_which_one_is_left_is_left_out_too(
    policy_context: PolicyContext, policy_reward: types.ModuleType
) -> None:
    def score(prompts: Any, completions: Sequence[str], rows: Any) -> list[Any]:
        return [None, *vowel_share(prompts, completions, rows)[1:]]

    policy_reward.score = score  # type: ignore[attr-defined]
    for name, left in (("rloo", 6), ("reinforce++", 7)):
        floor = Floor.of(policy_context(policy__algorithm=name))
        assert sum(len(micro.episodes) for micro in flat(floor.measured())) == left


def test_nothing_to_learn_from_is_told(policy_context: PolicyContext) -> None:
    """Six tokens are too few for any completion to end."""
    floor = Floor.of(policy_context(policy__missing_eos="filter"))
    with pytest.raises(StageError, match=r"no completion of update 0 can be learnt from.*filter"):
        floor.measured()


def test_rewards_are_weighted_and_told_apart(policy_context: PolicyContext) -> None:
    """The run's own model at half weight, and twice the vowels; each is logged as it came."""
    parts = (
        RewardPart(source="own", name="model", weight=0.5),
        RewardPart(source=SCORE, name="vowels", weight=2.0),
    )
    ctx = policy_context(
        reward_model=True,
        policy__rewards=parts,
        policy__missing_eos_penalty=0.0,
    )
    floor = Floor.of(ctx)
    micros = flat(floor.measured())
    role = floor.roles.reward_role
    assert role is not None
    models, vowels = [], []
    for micro in micros:
        with torch.no_grad():
            own = role.scores(micro.batch) - 0.25
        share = torch.tensor(vowel_share([], [e.text for e in micro.episodes], []))
        torch.testing.assert_close(micro.scores, 0.5 * own + 2 * share, rtol=1e-4, atol=1e-5)
        models.append(own)
        vowels.append(share)
    found = floor.loop._scorer.metrics()
    assert found["reward_model"] == pytest.approx(float(torch.cat(models).mean()), abs=1e-5)
    assert found["reward_vowels"] == pytest.approx(float(torch.cat(vowels).mean()), abs=1e-5)


def test_running_normalisers_are_in_the_state(policy_context: PolicyContext) -> None:
    parts = (
        RewardPart(source="own", name="model", normalise="running"),
        RewardPart(source=SCORE, name="vowels", normalise="running"),
    )
    settings = {"reward_model": True, "policy__rewards": parts}
    seen, fresh = (Floor.of(policy_context(**settings)).loop for _ in range(2))
    episodes = seen._sample(0)

    def scores(loop: Any) -> torch.Tensor:
        kept, _ = loop._scorer.judge(episodes, 0)
        return torch.cat([m.scores for m in flat(loop._measure(loop._usable(kept, 0), 0))])

    first = scores(seen)
    assert abs(float(first.mean()) + 1.0) < 1e-4, "both have mean 0; every end is missing"
    later = Floor.of(policy_context(**settings)).loop
    later._scorer.load_state(seen._scorer.state())
    assert later._scorer.state() == seen._scorer.state() != fresh._scorer.state()
    torch.testing.assert_close(scores(later), scores(seen))
