"""The algorithm table. A new algorithm is a formula in `losses/`, a file here and a row below."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amenable.errors import RecipeError

if TYPE_CHECKING:
    from amenable.artifacts import StageContext


@dataclass(frozen=True)
class Algorithm:
    """A way to tune the policy.

    Args:
        run: `module:function` of (StageContext) -> the `policy` section of the summary.
        summary: one line.
    """

    run: str
    summary: str


ALGORITHMS = {
    "ppo": Algorithm(
        run="amenable.train.ppo:run",
        summary="clipped policy gradient with a critic and a per-token KL reward",
    ),
}


def run_policy(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage: runs the algorithm that the recipe names."""
    name = ctx.recipe.policy.algorithm
    if name not in ALGORITHMS:
        raise RecipeError(
            f"policy.algorithm = {name!r} is unknown; choose from {sorted(ALGORITHMS)}"
        )
    module, _, function = ALGORITHMS[name].run.partition(":")
    section: dict[str, Any] = getattr(importlib.import_module(module), function)(ctx)
    return section
