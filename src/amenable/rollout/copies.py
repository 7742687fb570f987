"""Who samples for a role whose weights move: the own engine or vLLM, as the recipe wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from amenable.data.render import Renderer
    from amenable.models.build import Foundation
    from amenable.models.roles import Role
    from amenable.rollout.types import Engine


class Copy(Protocol):
    """Weights to roll out with, which follow a role's when they are told to."""

    role: Role

    def sync(self) -> object:
        """Take over the role's present weights."""
        ...

    def engine(self, renderer: Renderer) -> Engine:
        """Samples with these weights."""
        ...

    def close(self) -> None:
        """Give its memory back; nothing samples with it any more."""
        ...


def open_copy(foundation: Foundation, role: Role) -> Copy:
    """As `policy.engine` has it.

    Args:
        foundation: of the run.
        role: who samples.
    """
    policy = foundation.recipe.policy
    if policy.engine == "vllm":
        from amenable.rollout.vllm_engine import VllmCopy

        return VllmCopy(role, foundation)
    from amenable.rollout.transformers_engine import RolloutCopy

    return RolloutCopy(role, merged=policy.merged_rollouts)
