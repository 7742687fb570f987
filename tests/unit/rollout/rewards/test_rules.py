from __future__ import annotations

import pytest

from amenable.config.rewards import RewardPart
from amenable.rollout.rewards.rules import json_score, length_score, rule_reward

from .samples import PROMPTS


def scores(part: RewardPart, *texts: str) -> list[object]:
    return rule_reward(part).judge(PROMPTS[:1] * len(texts), texts)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (10, 1.0), (11, 0.9), (15, 0.5), (20, 0), (99, 0)],
)
def test_length_between_4_and_10_words(words: int, expected: float) -> None:
    assert length_score("word \n" * words, 4, 10) == pytest.approx(expected)


def test_length_with_one_limit() -> None:
    assert length_score("a b c", 0, 2) == 0.5
    assert length_score("", 0, 2) == 1.0
    assert length_score("a " * 1000, 2, 0) == 1.0


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        ('{"a": 1, "b": null}', [], 1.0),
        ("[1, 2]", [], 1.0),
        ('{"a": 1', [], 0.0),
        ("", [], 0.0),
        ("NaN", [], 0.0),
        ('{"a": Infinity}', [], 0.0),
        ("[" * 100_000, [], 0.0),
        ('{"a": 1, "b": null}', ["a", "b"], 1.0),
        ('{"a": 1}', ["a", "b"], 0.75),
        ("{}", ["a", "b"], 0.5),
        ('["a", "b"]', ["a", "b"], 0.5),
        ("no", ["a", "b"], 0.0),
    ],
)
def test_json(text: str, keys: list[str], expected: float) -> None:
    assert json_score(text, keys) == expected


def test_format_is_of_the_whole_text_and_regex_anywhere() -> None:
    pattern = r"<a>.*</a>"
    texts = ("<a>x\ny</a>", "so: <a>x</a>", "<a>")
    assert scores(RewardPart(source="rule:format", pattern=pattern), *texts) == [1.0, 0.0, 0.0]
    assert scores(RewardPart(source="rule:regex", pattern=pattern), *texts) == [0.0, 1.0, 0.0]


def test_settings_of_the_recipe_reach_the_rule() -> None:
    assert scores(RewardPart(source="rule:length", min_words=2, max_words=2), "a", "a b c") == [
        0.5,
        0.5,
    ]
    assert scores(RewardPart(source="rule:json", keys=("k",)), '{"k": 0}', "{}") == [1.0, 0.5]


def test_another_rule_is_none() -> None:
    with pytest.raises(ValueError, match="rule:poetry is no rule"):
        rule_reward(RewardPart(source="rule:poetry"))
