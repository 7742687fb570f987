"""Who chooses between two samples in the collect stage: the simulation, or a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from amenable.data.annotator import SimulatedAnnotator
from amenable.data.formats.native import PREFERENCE_KEYS
from amenable.data.schemas import Choice, Preference, Prompt

if TYPE_CHECKING:
    from amenable.artifacts import StageContext

Shown = tuple[Prompt, str, str]
"""A prompt with two texts that differ."""

JUDGE_CONFIDENCE = "judge_confidence"
"""Key of a row's meta: probabilities of the chosen text, where candidate_0 was shown first and
where candidate_1 was; null: the judge told none."""


class Annotator(Protocol):
    """Chooses."""

    def describe(self) -> str:
        """Who it is, in a sentence or two."""
        ...

    def choose_all(self, shown: Sequence[Shown]) -> dict[str, Preference | None]:
        """The row of each pair by its prompt's id; None: no choice that is to be learnt from."""
        ...

    def figures(self) -> dict[str, Any]:
        """Of the `collect` section of summary.json, once it has chosen."""
        ...


def open_annotator(ctx: StageContext) -> Annotator:
    """As the recipe names it.

    Raises:
        UsageError: the judge cannot judge.
        ModelError: it cannot be loaded.
    """
    if ctx.recipe.collect.annotator == "judge":
        return JudgeAnnotator(ctx)
    return Simulation(SimulatedAnnotator(ctx.recipe.collect, ctx.recipe.seed))


class Simulation:
    """The stated stand-in for people.

    Args:
        annotator: its formula.
    """

    def __init__(self, annotator: SimulatedAnnotator) -> None:
        self._annotator = annotator

    def describe(self) -> str:
        """Its formula."""
        return self._annotator.describe()

    def choose_all(self, shown: Sequence[Shown]) -> dict[str, Preference | None]:
        """A choice for every pair."""
        return {
            prompt.id: Preference(
                prompt=_without_judgement(prompt),
                candidate_0=first,
                candidate_1=second,
                choice=self._annotator.choose(prompt, first, second, key=prompt.id),
                annotator="simulated",
            )
            for prompt, first, second in shown
        }

    def figures(self) -> dict[str, Any]:
        """None beside the sentence."""
        return {}


class JudgeAnnotator:
    """A judge that sees every pair in both orders; its replies outlive a stop.

    Args:
        ctx: the collect stage; the replies are kept in the run folder's `replies.sqlite`.

    Raises:
        UsageError: it cannot judge.
        ModelError: it cannot be loaded.
    """

    def __init__(self, ctx: StageContext) -> None:
        from amenable.evaluate.judge_audit import read_audit
        from amenable.judges.opening import open_judge
        from amenable.judges.template import load_template

        config = self._config = ctx.recipe.collect
        self._ctx = ctx
        self._judge = open_judge(
            config.judge,
            config.judge_model,
            load_template(config.judge_template),
            {"token_env": config.judge_token_env},
            ctx.folder.root,
            key="collect.judge",
        )
        self._agreement = read_audit(Path(config.judge_audit)) if config.judge_audit else None
        self._asked = self._unanswered = self._flips = 0

    def describe(self) -> str:
        """Who judges, and how far people agree with it."""
        said = f"AI feedback: {self._judge.name} chose, each pair in both orders; no person judged."
        if self._agreement is None:
            return (
                f"{said} Its agreement with people was not measured (amenable audit, then "
                "collect.judge_audit)."
            )
        low, high = self._agreement["accuracy_ci95"]
        return (
            f"{said} On {self._agreement['rows']} audited rows it chose as people did in "
            f"{self._agreement['accuracy']:.3f} [{low:.3f}, {high:.3f}]."
        )

    def choose_all(self, shown: Sequence[Shown]) -> dict[str, Preference | None]:
        """Rows of the pairs that it leans on; the recipe says what becomes of its doubts.

        Raises:
            StageError: it answered nothing at all.
        """
        from amenable.evaluate.both_orders import Orders, confidences
        from amenable.judges.asking import Pair, ask_both_orders
        from amenable.judges.store import ReplyStore

        if not shown:
            return {}
        pairs = [Pair(prompt, first, second) for prompt, first, second in shown]
        track = self._ctx.progress.track(2 * len(pairs), f"collect: {self._judge.name}")
        with closing(ReplyStore(self._ctx.folder.root / "replies.sqlite")) as store, track as bar:
            asked = ask_both_orders(self._judge, pairs, store, bar.advance)
        orders = Orders.of(asked.looks)
        told = confidences(asked.looks, orders.prompts)
        scores = orders.by_order
        if self._config.doubtful == "confidence":
            scores = np.where(np.isnan(told), scores, told)
        table = zip(orders.prompts, scores.mean(1).tolist(), told.tolist(), strict=True)
        found = {name: (leaning, of_second) for name, leaning, of_second in table}
        self._asked += len(pairs)
        self._unanswered += len(asked.unanswered)
        self._flips += int((abs(orders.by_order[:, 0] - orders.by_order[:, 1]) == 1).sum())
        return {
            prompt.id: self._row(prompt, first, second, *found[prompt.id])
            if prompt.id in found
            else None  # not both orders were answered
            for prompt, first, second in shown
        }

    def figures(self) -> dict[str, Any]:
        """Who it was, and how often its two orders contradicted each other."""
        return {
            "judge": self._judge.name,
            "judge_accuracy": None if self._agreement is None else self._agreement["accuracy"],
            "judge_flips": self._flips / self._asked if self._asked else None,
            "unanswered": self._unanswered,
        }

    def _row(
        self, prompt: Prompt, first: str, second: str, leaning: float, told: Sequence[float]
    ) -> Preference | None:
        """The choice, if there is one.

        Args:
            prompt: the prompt.
            first: one text.
            second: another.
            leaning: to the second, from 0 to 1.
            told: probability that the judge gives to the second, by order; NaN: it told none.
        """
        sure = abs(2 * leaning - 1)
        if sure == 0 or (self._config.doubtful == "drop" and sure < 1):
            return None
        choice = Choice.SECOND if leaning > 0.5 else Choice.FIRST
        asked = _without_judgement(prompt)
        if not all(map(math.isnan, told)):
            of_chosen = [p if choice is Choice.SECOND else 1 - p for p in told]
            kept = [None if math.isnan(p) else p for p in of_chosen]
            asked = replace(asked, meta={**asked.meta, JUDGE_CONFIDENCE: kept})
        return Preference(
            prompt=asked,
            candidate_0=first,
            candidate_1=second,
            choice=choice,
            weight=sure,
            annotator=self._judge.name,
        )


def _without_judgement(prompt: Prompt) -> Prompt:
    """The prompt without what a file of preferences said of it: another pair is judged now."""
    judgement = PREFERENCE_KEYS | {JUDGE_CONFIDENCE}
    kept = {key: value for key, value in prompt.meta.items() if key not in judgement}
    return replace(prompt, meta=kept)
