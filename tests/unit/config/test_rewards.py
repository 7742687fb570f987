from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amenable.config.policy import PolicyConfig
from amenable.config.rewards import (
    RewardPart,
    broken_rewards,
    kind_of,
    outside_sources,
    reward_parts,
    uses_own_reward,
)


def policy(*parts: RewardPart, reward: str = "") -> PolicyConfig:
    return PolicyConfig(rewards=parts, reward=reward)


def part(source: str, **settings: Any) -> RewardPart:
    return RewardPart(source=source, **settings)


@pytest.mark.parametrize(
    ("source", "kind", "label"),
    [
        ("own", "own", "reward_model"),
        ("rule:json", "rule", "json"),
        ("http://127.0.0.1:8000/score", "http", "http"),
        ("https://host.org/score", "http", "http"),
        ("my.module:close_to", "function", "close_to"),
        ("a/b.py:f", "function", "f"),
        ("runs/first/models/reward", "model", "reward"),
        ("someone/Judge-2.5b", "model", "Judge_2_5b"),
        ("7b-judge", "model", "reward_7b_judge"),
    ],
)
def test_kind_and_name_of_a_source(source: str, kind: str, label: str) -> None:
    assert kind_of(source) == part(source).kind == kind
    assert part(source).label == label
    assert part(source, name="mine").label == "mine"
    assert broken_rewards(policy(part(source, **settings_of(source)))) == ""


def settings_of(source: str) -> dict[str, Any]:
    return {"rule:length": {"max_words": 3}, "rule:regex": {"pattern": "a"}}.get(source, {})


def test_folder_with_a_colon_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert kind_of(str(folder)) == "model"


def test_mix_stands_for_reward_and_both_for_the_own_model() -> None:
    assert reward_parts(policy()) == (part("own"),)
    assert reward_parts(policy(reward="m:f")) == (part("m:f"),)
    assert reward_parts(policy(part("m:f"), part("own"))) == (part("m:f"), part("own"))
    assert uses_own_reward(policy())
    assert uses_own_reward(policy(part("m:f"), part("own")))
    assert not uses_own_reward(policy(part("m:f")))
    assert not uses_own_reward(policy(reward="m:f"))


def test_outside_sources_have_their_keys() -> None:
    parts = [part("own"), part("a/b"), part("rule:json"), part("http://h/s"), part("m:f")]
    assert list(outside_sources(policy(*parts))) == [
        ("policy.rewards[1].source", "a/b"),
        ("policy.rewards[4].source", "m:f"),
    ]
    assert list(outside_sources(policy(reward="m:f"))) == [("policy.reward", "m:f")]
    assert list(outside_sources(policy())) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (policy(part("m:f"), reward="m:g"), "policy.reward: policy.rewards is given as well; move"),
        (policy(part("")), "policy.rewards[0].source: is empty; give a model folder"),
        (policy(part("m:f"), part("rule:nice")), "rewards[1].source: 'rule:nice' is no rule; the"),
        (
            policy(reward="rule:nice"),
            "policy.reward: 'rule:nice' is no rule; the rules are rule:le",
        ),
        (policy(reward="rule:length"), "policy.reward: rule:length needs min_words, max_words or"),
        (policy(part("ftp://host/a")), "source: 'ftp://host/a' is no http or https URL; write"),
        (policy(part("http:///score")), "is no http or https URL"),
        (policy(part("http://[::1/score")), "is no URL; write for example"),
        (policy(part("m:f"), part("n:f")), "rewards[1].name: 'f' is the name of another reward"),
        (policy(part("own"), part("own", name="b")), "rewards[1].source: 'own' is named twice"),
        (policy(part("m:f", weight=0.0)), "policy.rewards: every weight is 0, so that nothing"),
        (policy(part("m:f", name="a b")), "name: 'a b' cannot name a figure; use letters"),
        (policy(part("m:f", name="é")), "name: 'é' cannot name a figure"),
        (policy(part("m:f", max_words=3)), "max_words: 'm:f' does not read it (rule:length does)"),
        (policy(part("rule:json", pattern="a")), "pattern: 'rule:json' does not read it"),
        (policy(part("rule:json", timeout_s=3)), "(an http(s):// source does); remove it"),
        (policy(part("rule:length", min_words=-1)), "min_words: must be at least 0, not -1"),
        (policy(part("rule:length", min_words=4, max_words=3)), "4 is more than max_words = 3"),
        (policy(part("rule:format")), "pattern: rule:format needs a regular expression"),
        (policy(part("rule:regex", pattern="(")), "pattern: '(' is no regular expression: missing"),
        (policy(part("http://h/s", timeout_s=0.0)), "timeout_s: must be above 0, not 0.0"),
        (policy(part("http://h/s", retries=-1)), "retries: must be at least 0, not -1"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(given: PolicyConfig, words: str) -> None:
    assert words in broken_rewards(given)


def test_no_secret_of_a_url_is_shown() -> None:
    told = broken_rewards(policy(part("http://me:hunter2@host/score?sig=hunter2")))
    assert "policy.rewards[0].source: 'http://host/score?…' holds a user or password" in told
    assert "token_env" in told
    assert "hunter2" not in told
    told = broken_rewards(policy(part("ftp://me:hunter2@host/score")))
    assert "hunter2" not in told
