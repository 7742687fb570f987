"""Where scores come from: reward models, functions, services and rules, alone or mixed."""

from amenable.rollout.rewards.functions import FunctionReward
from amenable.rollout.rewards.http import HttpReward
from amenable.rollout.rewards.mix import TextRewards, WeightedReward, open_rewards
from amenable.rollout.rewards.models import FolderReward
from amenable.rollout.rewards.normaliser import Normaliser
from amenable.rollout.rewards.own import (
    OwnReward,
    score_groups,
)
from amenable.rollout.rewards.rules import RuleReward
from amenable.rollout.rewards.types import Failed, Judgement, Step, TextReward, Verdict

__all__ = [
    "Failed",
    "FolderReward",
    "FunctionReward",
    "HttpReward",
    "Judgement",
    "Normaliser",
    "OwnReward",
    "RuleReward",
    "Step",
    "TextReward",
    "TextRewards",
    "Verdict",
    "WeightedReward",
    "open_rewards",
    "score_groups",
]
