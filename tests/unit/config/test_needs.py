from __future__ import annotations

import pytest

from amenable.config.load import load_recipe
from amenable.config.needs import (
    collects,
    follows_reward,
    learns_from_preferences,
    needs_preferences,
    trains_reward,
    unread_keys,
)
from amenable.errors import RecipeError
from amenable.pipeline.stages import STAGES

RULES = (follows_reward, learns_from_preferences, trains_reward, needs_preferences, collects)
PAIRS = "data.preferences=pairs.jsonl"
SIMULATED = "collect.annotator=simulated"
PROMPTS = "data.prompts=prompts.jsonl"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((PAIRS,), (True, False, True, True, False)),
        ((PROMPTS, SIMULATED), (True, False, True, True, True)),
        ((PROMPTS, "policy.reward=a:b"), (True, False, False, False, False)),
        ((PROMPTS, SIMULATED, "policy.reward=a:b"), (True, False, False, False, False)),
        ((PAIRS, "policy.algorithm=dpo"), (False, True, True, True, False)),
        (
            (PAIRS, "policy.algorithm=dpo", "reward.enabled=false"),
            (False, True, False, True, False),
        ),
        (
            (PROMPTS, SIMULATED, "policy.algorithm=kto", "reward.enabled=false"),
            (False, True, False, True, True),
        ),
        (
            (PROMPTS, SIMULATED, "policy.algorithm=kto", "policy.reward=a:b"),
            (False, True, False, True, True),
        ),
        (
            (PAIRS, "policy.algorithm=dpo", "policy.enabled=false", "reward.enabled=false"),
            (False, False, False, False, False),
        ),
    ],
)
def test_who_needs_what(settings: tuple[str, ...], expected: tuple[bool, ...]) -> None:
    recipe = load_recipe(None, settings)
    assert tuple(rule(recipe) for rule in RULES) == expected


def test_a_policy_on_pairs_needs_no_reward_stage() -> None:
    settings = (PROMPTS, SIMULATED, "policy.algorithm=dpo", "reward.enabled=false")
    recipe = load_recipe(None, settings)
    on = [stage.name for stage in STAGES if not stage.off(recipe)]
    assert on == ["data", "collect", "policy", "evaluate", "report"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((PROMPTS, "policy.algorithm=dpo"), "data.preferences: is empty, so that dpo has nothing"),
        (
            (PROMPTS, "policy.algorithm=dpo", "reward.enabled=false"),
            "data.preferences: is empty, so that dpo has nothing",
        ),
        ((PROMPTS,), "the reward model has nothing to learn from"),
        (
            (PAIRS, "policy.algorithm=kto", "policy.preference.batch_size=1"),
            "policy.preference.batch_size: 1 leaves kto",
        ),
        (
            (PAIRS, "policy.preference.flip_rate=0.5"),
            "policy.preference.flip_rate: must be at least 0 and below 0.5, not 0.5",
        ),
        ((PAIRS, "policy.preference.label_smoothing=0.5"), "below 0.5"),
    ],
)
def test_what_is_missing_is_named(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ((), []),
        (("policy.ppo.gamma=0.9", "policy.kl.loss_estimator=k2"), ["policy.kl.loss_estimator"]),
        (("policy.algorithm=grpo", "policy.ppo.gamma=0.9"), ["policy.ppo.gamma"]),
        (("policy.algorithm=grpo", "policy.kl.placement=both", "policy.kl.estimator=k2"), []),
        (("policy.algorithm=dapo", "policy.kl.coef=0.5"), ["policy.kl.coef"]),
        (("policy.algorithm=dapo", "policy.kl.coef=0.5", "policy.kl.placement=reward"), []),
        (("policy.algorithm=online-dpo", "policy.clip_range=0.1"), ["policy.clip_range"]),
        (
            ("policy.algorithm=dpo", "policy.updates=3", "policy.temperature=0.7"),
            ["policy.updates"],
        ),
        (("policy.preference.beta=0.3",), ["policy.preference.beta"]),
    ],
)
def test_keys_that_an_algorithm_does_not_read_are_told(
    settings: tuple[str, ...], unread: list[str]
) -> None:
    recipe = load_recipe(None, [PAIRS, PROMPTS, *settings])
    assert unread_keys(recipe) == unread
