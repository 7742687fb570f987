"""Runs the algorithm that a recipe names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amenable.algorithms import ALGORITHMS
from amenable.config.needs import unread_keys

if TYPE_CHECKING:
    from amenable.artifacts import StageContext


def run_policy(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage: runs the algorithm that the recipe names."""
    if unread := unread_keys(ctx.recipe):
        ctx.progress.say(f"policy: {ctx.recipe.policy.algorithm} does not read {', '.join(unread)}")
    module, _, function = ALGORITHMS[ctx.recipe.policy.algorithm].run.partition(":")
    section: dict[str, Any] = getattr(importlib.import_module(module), function)(ctx)
    return section
