"""Who takes part in tuning the policy: policy, reference and rewards, from the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from amenable.errors import StageError
from amenable.models.build import Foundation
from amenable.models.export import load_reward_head
from amenable.rollout.rewards import OwnReward, TextRewards, open_rewards

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role


@dataclass(frozen=True)
class PolicyRoles:
    """The models and rewards of an on-policy run."""

    foundation: Foundation
    policy: Role
    reference: Role
    text_rewards: TextRewards | None
    """Everything that scores texts."""
    own_reward: OwnReward | None
    """Weight and normaliser of the run's own reward model, where it is one of the rewards."""
    reward_role: Role | None
    """The run's own reward model, from which a critic can start."""
    reward_offset: float = 0.0
    """What its raw scores are less by; a critic that starts from it is less by the same."""


def policy_and_reference(ctx: StageContext) -> tuple[Foundation, Role, Role]:
    """The policy starts as a copy of the reference: the frozen SFT adapter, or the base."""
    foundation = Foundation.open(ctx.recipe)
    sft = ctx.folder.models / "sft"
    start = sft if sft.is_dir() else None
    policy = foundation.role("policy", start)
    return foundation, policy, foundation.role("reference", start, train=False)


def open_roles(ctx: StageContext) -> PolicyRoles:
    """Policy, reference and rewards.

    Raises:
        StageError: the run's own reward model is wanted and not there.
    """
    data = ctx.recipe.data
    text_rewards, own = open_rewards(
        ctx.recipe.policy,
        max_prompt_tokens=data.max_prompt_tokens,
        max_completion_tokens=data.max_completion_tokens,
        instruction=data.instruction,
        system_message=data.system_message,
    )
    folder = ctx.folder.models / "reward"
    if own is not None and not folder.is_dir():
        raise StageError(
            f"{folder} is missing: run the reward stage first, or name a ready reward in "
            "policy.reward"
        )
    foundation, policy, reference = policy_and_reference(ctx)
    if own is None:
        return PolicyRoles(foundation, policy, reference, text_rewards, None, None)
    head, offset = load_reward_head(folder)
    role = foundation.role("reward", folder, head=head, train=False)
    return PolicyRoles(foundation, policy, reference, text_rewards, own, role, offset)
