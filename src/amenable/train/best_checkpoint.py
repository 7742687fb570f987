"""Which checkpoint a policy stage leaves behind, by scores that it was not trained on.

A policy that climbs a learned reward ends up worse by what the reward stands for (Gao et al. 2022,
arXiv:2210.10760). So the start and every checkpoint answer the same validation prompts, and the one
with the highest mean score stays, the later one of equals; that can be the start itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from amenable.artifacts import write_json
from amenable.config.needs import selects_by
from amenable.data.row_file import open_prompts
from amenable.data.schemas import Prompt
from amenable.evaluate.generate import generate
from amenable.rollout.transformers_engine import RolloutCopy
from amenable.rollout.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from amenable.artifacts import StageContext
    from amenable.data.annotator import SimulatedAnnotator
    from amenable.rollout.copies import Copy
    from amenable.train.policy_roles import PolicyRoles

Scores = Callable[[Sequence[Prompt], Sequence[str]], list[float]]


class BestCheckpoint:
    """Measures checkpoints and holds the weights of the best one so far.

    Args:
        ctx: the policy stage, whose data have `prompts.validation`.
        roles: the policy is measured.
        copy: rolls out for it.
        scores: [N] of texts; NaN: none.
        by: whose scores they are.
    """

    def __init__(
        self, ctx: StageContext, roles: PolicyRoles, copy: Copy, scores: Scores, by: str
    ) -> None:
        self._ctx, self._roles, self._scores, self._by = ctx, roles, scores, by
        self._prompts = open_prompts(ctx.folder.data / "prompts.validation.jsonl")
        self._copy = copy
        self._engine = copy.engine(roles.foundation.renderer)
        self._sampling = Sampling(
            max_new_tokens=ctx.recipe.data.max_completion_tokens,
            temperature=ctx.recipe.evaluate.temperature,
        )
        self._rows: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}

    def measure(self, updates: int) -> None:
        """Score the policy as it is after so many updates."""
        self._copy.sync()
        answers = generate(
            self._engine,
            self._roles.foundation.renderer,
            self._prompts,
            self._sampling,
            seed=self._ctx.recipe.seed,
        )
        given = self._scores(self._prompts, [answer.completion.text for answer in answers])
        scores = [score for score in given if not math.isnan(score)]
        if not scores:
            self._ctx.progress.say(f"policy: {self._by} scored no answer after update {updates}")
            return
        mean = sum(scores) / len(scores)
        if not self._rows or mean >= max(row["score"] for row in self._rows):
            self._best = self._roles.policy.state()
        self._rows.append({"updates": updates, "score": mean, "answers": len(scores)})

    def finish(self) -> int | None:
        """Leave the best weights in the policy and tell how they were chosen.

        Returns:
            Updates that they have seen; None: nothing was measured, and the weights are the last.
        """
        if not self._rows:
            return None
        self._roles.policy.load_state(self._best)
        best = max(self._rows, key=lambda row: (row["score"], row["updates"]))
        first, last = self._rows[0], self._rows[-1]
        write_json(
            self._ctx.out / "selection.json",
            {"by": self._by, "chosen": best["updates"], "checkpoints": self._rows},
        )
        self._ctx.progress.say(
            f"policy: {self._by} scores {len(self._prompts)} validation prompts: start "
            f"{first['score']:.3f}, after update {best['updates']} {best['score']:.3f} (stays), "
            f"last {last['score']:.3f}"
        )
        chosen: int = best["updates"]
        return chosen

    def state(self) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
        """The best weights, and what was measured, for a checkpoint."""
        return ({"best": self._best} if self._rows else {}), self._rows

    def load_state(
        self, tensors: dict[str, dict[str, Tensor]], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Undo `state`."""
        self._best, self._rows = tensors.get("best", {}), list(rows)


def open_best_checkpoint(
    ctx: StageContext,
    roles: PolicyRoles,
    copy: Copy,
    annotator: SimulatedAnnotator | None,
) -> BestCheckpoint | None:
    """As the recipe wants it; None where the last checkpoint stays.

    Args:
        ctx: the policy stage.
        roles: of the run.
        copy: rolls out for the policy, or for the reference where that one samples.
        annotator: the simulated one, where there is one.
    """
    by = selects_by(ctx.recipe)
    if not by or not (ctx.folder.data / "prompts.validation.jsonl").is_file():
        return None
    if copy.role is not roles.policy:
        copy = RolloutCopy(roles.policy, merged=False)
    if by == "annotator":
        assert annotator is not None
        gold = annotator

        def by_annotator(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
            return [gold.score(p, text) for p, text in zip(prompts, texts, strict=True)]

        return BestCheckpoint(ctx, roles, copy, by_annotator, by)
    rewards = roles.text_rewards
    assert rewards is not None

    def by_reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return rewards.scores_of(by, prompts, texts)

    return BestCheckpoint(ctx, roles, copy, by_reward, by)
