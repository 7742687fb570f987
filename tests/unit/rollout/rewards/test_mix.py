from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from amenable.config.policy import PolicyConfig
from amenable.config.rewards import RewardPart
from amenable.errors import StageError
from amenable.rollout.rewards import (
    Failed,
    FolderReward,
    FunctionReward,
    HttpReward,
    Judgement,
    Normaliser,
    RuleReward,
    TextRewards,
    Verdict,
    WeightedReward,
    open_rewards,
)

from .samples import FUNCTIONS, PROMPTS, TEXTS, ends_of_letters, write_bert

LIMITS = {"max_prompt_tokens": 64, "max_completion_tokens": 32}
OUT = Failed("was out")


@dataclass
class Given:
    """Answers what it was told, one batch after the other."""

    answers: list[list[Verdict]]

    def judge(self, prompts: object, texts: Sequence[str]) -> list[Verdict]:
        return self.answers.pop(0)


def part(
    name: str, *answers: list[Verdict], weight: float = 1.0, running: bool = False
) -> WeightedReward:
    return WeightedReward(name, weight, Given(list(answers)), Normaliser(running))


def judge(rewards: TextRewards) -> Judgement:
    return rewards.judge(PROMPTS, TEXTS, ends_of_letters(TEXTS))


def numbers(tensor: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in tensor.tolist()]


def test_scores_are_the_weighted_sum_and_parts_stay_raw() -> None:
    first = part("a", [1.0, 2.0, 3.0, 4.0], weight=2.0)
    second = part("b", [0.5, 0.0, -1.0, 8.0], weight=-0.5)
    found = judge(TextRewards([first, second]))
    assert found.scores.tolist() == [1.75, 4.0, 6.5, 4.0]
    assert found.scores.dtype is torch.float32
    assert {name: numbers(scores) for name, scores in found.parts.items()} == {
        "a": [1.0, 2.0, 3.0, 4.0],
        "b": [0.5, 0.0, -1.0, 8.0],
    }
    assert found.steps is None
    assert found.reasons == [""] * 4


def test_what_one_reward_cannot_score_is_left_out_and_told() -> None:
    first = part("a", [1.0, OUT, 3.0, OUT])
    second = part("b", [1.0, 1.0, 1.0, Failed("no network")])
    found = judge(TextRewards([first, second]))
    assert numbers(found.scores) == [2.0, None, 4.0, None]
    assert numbers(found.parts["a"]) == [1.0, None, 3.0, None]
    assert numbers(found.parts["b"]) == [1.0, 1.0, 1.0, None]
    assert found.reasons == ["", "a: was out", "", "a: was out; b: no network"]


def test_running_normalisation_is_over_what_was_seen_without_failures() -> None:
    """First batch: mean 2, deviation 1. Then 1, 3, 0, 4: mean 2, deviation sqrt(10 / 4)."""
    rewards = TextRewards([part("a", [1.0, 3.0, OUT, OUT], [OUT, OUT, 0.0, 4.0], running=True)])
    assert numbers(judge(rewards).scores) == [-1.0, 1.0, None, None]
    again = judge(rewards)
    assert numbers(again.scores)[2:] == pytest.approx([-2 / 2.5**0.5, 2 / 2.5**0.5])
    assert numbers(again.parts["a"]) == [None, None, 0.0, 4.0]


def test_a_reward_of_weight_0_is_only_watched() -> None:
    watched = part("b", [OUT, 1.0, ((1, 9.0),), OUT], weight=0.0)
    found = judge(TextRewards([part("a", [1.0, 2.0, 3.0, 4.0]), watched]))
    assert found.scores.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found.reasons == [""] * 4
    assert found.steps is None
    assert numbers(found.parts["b"]) == [None, 1.0, 9.0, None]


def test_steps_land_on_the_token_in_which_they_end() -> None:
    """Tokens of 3, 2 and 4 characters and an end mark; steps that end at 0, 3, 4, 5 and 9."""
    steps: Verdict = ((0, 1.0), (3, 2.0), (4, 4.0), (5, 8.0), (9, 16.0))
    rewards = TextRewards([part("a", [steps], weight=0.5)])
    found = rewards.judge(PROMPTS[:1], ["The river"], [[3, 5, 9, 9]])
    assert found.steps == [[(0, 1.5), (1, 6.0), (2, 8.0)]]
    assert found.scores.tolist() == [15.5]
    assert found.parts["a"].tolist() == [31.0]


def test_steps_are_summed_for_whoever_has_no_tokens() -> None:
    found = TextRewards([part("a", [((0, 1.0), (3, 2.0))])]).judge(PROMPTS[:1], ["The river"])
    assert found.scores.tolist() == [3.0]
    assert found.steps is None


def test_step_behind_the_last_token_lands_on_it() -> None:
    rewards = TextRewards([part("a", [((9, 1.0),)])])
    assert rewards.judge(PROMPTS[:1], ["The river"], [[3, 5]]).steps == [[(1, 1.0)]]


def test_steps_of_several_rewards_are_added_and_failed_completions_have_none() -> None:
    first = part("a", [((1, 1.0),), ((1, 1.0),), 5.0, 1.0], weight=2.0)
    second = part("b", [((1, 0.25), (2, 3.0)), OUT, ((2, 1.0),), 1.0])
    found = judge(TextRewards([first, second]))
    assert found.steps == [[(0, 2.25), (1, 3.0)], [], [(1, 1.0)], []]
    assert numbers(found.scores) == [5.25, None, 11.0, 3.0]


def test_normalised_steps_are_scaled_and_the_mean_stays_with_the_whole() -> None:
    """Sums 2 and 6: mean 4, deviation 2; so each step is half of what it was."""
    rewards = TextRewards([part("a", [((1, 2.0),), ((1, 1.0), (2, 5.0))], running=True)])
    found = rewards.judge(PROMPTS[:2], TEXTS[:2], ends_of_letters(TEXTS[:2]))
    assert found.steps == [[(0, 1.0)], [(0, 0.5), (1, 2.5)]]
    assert found.scores.tolist() == [-1.0, 1.0]


def test_too_many_failures_end_the_stage_with_the_commonest_reasons() -> None:
    answers: list[Verdict] = [Failed("odd"), OUT, 1.0, OUT]
    with pytest.raises(StageError) as caught:
        judge(TextRewards([part("a", answers)], max_failures=0.5))
    assert str(caught.value) == (
        "rewards failed for 3 of 4 completions, more than policy.max_reward_failures = 0.5 allows."
        " a: was out (2 times); a: odd (1 times). Run again where the fault has passed: the stage"
        " goes on from its last checkpoint; a corrected function or recipe starts the stage afresh"
    )
    assert judge(TextRewards([part("a", answers)], max_failures=0.75)).reasons[2] == ""


def test_a_batch_of_which_nothing_is_left_ends_the_stage_whatever_the_limit() -> None:
    rewards = TextRewards([part("a", [OUT] * 4)], max_failures=1.0)
    with pytest.raises(StageError, match=r"4 of 4 completions, which leaves nothing .* a: was out"):
        judge(rewards)


def test_failures_may_be_left_to_the_caller() -> None:
    rewards = TextRewards([part("a", [OUT] * 4)])
    found = rewards.judge(PROMPTS, TEXTS, all_may_fail=True)
    assert found.reasons == ["a: was out"] * 4
    assert found.scores.isnan().all()


def test_state_survives_json_and_continues_to_the_bit() -> None:
    batches: list[list[Verdict]] = [[0.1, 0.7, -2.3, 4.0], [1.0, 2.0, 3.5, 0.25]]
    first = TextRewards([part("a", *batches, running=True), part("b", *batches)])
    judge(first)
    second = TextRewards([part("a", batches[1], running=True), part("b", batches[1])])
    second.load_state(json.loads(json.dumps(first.state())))
    assert torch.equal(judge(first).scores, judge(second).scores)


def config(**changes: Any) -> PolicyConfig:
    return PolicyConfig(**changes)


def test_without_a_word_in_the_recipe_it_is_the_own_model() -> None:
    texts, own = open_rewards(config(), **LIMITS)
    assert texts is None
    assert own is not None
    assert (own.name, own.weight, own.normaliser.spread) == ("reward_model", 1.0, 1.0)
    scores = torch.tensor([1.0, 5.0])
    assert own.apply(scores) is scores


def test_one_ready_reward_is_a_mix_of_one() -> None:
    texts, own = open_rewards(config(reward="rule:json"), **LIMITS)
    assert own is None
    assert texts is not None
    assert texts.names == ("json",)
    assert texts.judge(PROMPTS[:2], ["{}", "no"], [[2], [2]]).scores.tolist() == [1.0, 0.0]


def test_every_kind_of_source_is_opened(tmp_path: Any) -> None:
    parts = (
        RewardPart(source="own", weight=0.5, normalise="running"),
        RewardPart(source=str(write_bert(tmp_path / "judge-b"))),
        RewardPart(source=f"{FUNCTIONS}:vowels", weight=2.0),
        RewardPart(source="http://127.0.0.1:9/score"),
        RewardPart(source="rule:length", max_words=3, name="short"),
    )
    texts, own = open_rewards(config(rewards=parts), **LIMITS)
    assert texts is not None
    assert texts.names == ("judge_b", "vowels", "http", "short")
    kinds = [FolderReward, FunctionReward, HttpReward, RuleReward]
    assert [type(found.reward) for found in texts._parts] == kinds
    assert [found.weight for found in texts._parts] == [1.0, 2.0, 1.0, 1.0]
    assert own is not None
    assert (own.name, own.weight) == ("reward_model", 0.5)
    assert own.apply(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]


def test_limit_of_the_recipe_is_kept() -> None:
    function = RewardPart(source=f"{FUNCTIONS}:all_but_first")
    texts, _ = open_rewards(config(rewards=(function,), max_reward_failures=0.2), **LIMITS)
    assert texts is not None
    with pytest.raises(StageError, match=r"1 of 4 completions, more than .* = 0.2 allows"):
        judge(texts)
