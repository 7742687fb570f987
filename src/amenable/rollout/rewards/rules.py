"""Rewards that are rules: length, format, regular expression, JSON. All lie in [0, 1]."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from amenable.config.rewards import RewardPart
from amenable.data.schemas import Prompt
from amenable.rollout.rewards.types import Verdict


@dataclass(frozen=True)
class RuleReward:
    """A rule that looks at the completion alone."""

    rule: Callable[[str], float]

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """[N] scores; a rule never fails."""
        return [self.rule(text) for text in texts]


def rule_reward(part: RewardPart) -> RuleReward:
    """The rule that a section of the recipe names, with its settings."""
    match part.source:
        case "rule:length":
            return RuleReward(lambda text: length_score(text, part.min_words, part.max_words))
        case "rule:format":
            whole = re.compile(part.pattern, re.DOTALL)
            return RuleReward(lambda text: float(whole.fullmatch(text) is not None))
        case "rule:regex":
            found = re.compile(part.pattern)
            return RuleReward(lambda text: float(found.search(text) is not None))
        case "rule:json":
            return RuleReward(lambda text: json_score(text, part.keys))
    raise ValueError(f"{part.source} is no rule")


def length_score(text: str, min_words: int, max_words: int) -> float:
    """1 for `min_words` to `max_words` words; outside it falls linearly.

    n / min_words below, max(0, 2 - n / max_words) above; so it is 0 for no words and from twice
    the limit on. Words are what white space separates.

    Args:
        text: a completion.
        min_words: at least 0.
        max_words: 0: no limit.
    """
    words = len(text.split())
    if words < min_words:
        return words / min_words
    if max_words and words > max_words:
        return max(0.0, 2 - words / max_words)
    return 1.0


def json_score(text: str, keys: Sequence[str]) -> float:
    """0 where the text is no JSON; else 1 without `keys`, and with them 0.5 to 1.

    With `keys`: 0.5, and half the share of them that the object has; another value than an object
    has none. NaN and Infinity, which Python would read, are no JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    if not keys:
        return 1.0
    present = sum(key in value for key in keys) if isinstance(value, dict) else 0
    return 0.5 + 0.5 * present / len(keys)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
