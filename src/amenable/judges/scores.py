"""Anything that scores a text as a judge of two: reward models, Python functions, rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amenable.judges.types import Keep, Question, Reply, Verdict

if TYPE_CHECKING:
    from amenable.data.schemas import Prompt
    from amenable.rollout.rewards import Failed, TextReward


class ScoreJudge:
    """The higher score wins; equal scores are a tie.

    Args:
        name: in tables.
        reward: gives the scores.
        temperature: T of the confidence σ((first − second) / T); None: scores that are no logits,
            such as a function's, so that no confidence follows from them.
        remark: what is to be said of its confidence.
    """

    identity: Mapping[str, Any] | None = None

    def __init__(
        self, name: str, reward: TextReward, temperature: float | None = None, remark: str = ""
    ) -> None:
        self.name, self.remark = name, remark
        self._reward, self._temperature = reward, temperature

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        """Score every answer once, and compare; a failed score leaves its questions open."""
        from amenable.rollout.rewards import Failed

        answers = list(
            dict.fromkeys((q.prompt.id, text) for q in questions for text in (q.first, q.second))
        )
        prompts = {question.prompt.id: question.prompt for question in questions}
        given = self.scores([prompts[n] for n, _ in answers], [text for _, text in answers])
        by_answer, unanswered = dict(zip(answers, given, strict=True)), []
        for number, question in enumerate(questions):
            first = by_answer[question.prompt.id, question.first]
            second = by_answer[question.prompt.id, question.second]
            if isinstance(first, Failed):
                unanswered.append(first.reason)
            elif isinstance(second, Failed):
                unanswered.append(second.reason)
            else:
                keep(number, self._reply(first, second))
        return unanswered

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | Failed]:
        """[N] scores of the texts, those of steps summed, or why there is none."""
        return [
            sum(step for _, step in given) if isinstance(given, tuple) else given
            for given in self._reward.judge(prompts, texts)
        ]

    def _reply(self, first: float, second: float) -> Reply:
        better = Verdict.FIRST if first > second else Verdict.SECOND
        verdict = Verdict.TIE if first == second else better
        text = f"{first:.6g} against {second:.6g}"
        if self._temperature is None:
            return Reply(verdict, text)
        margin = (first - second) / self._temperature
        confidence = 1 / (1 + math.exp(min(700.0, -margin)))
        return Reply(verdict, f"{text}, T = {self._temperature:.4g}", confidence)
