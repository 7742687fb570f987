"""Anything that scores a text as a judge of two: reward models, Python functions, rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amenable.judges.types import Keep, Question, Reply, Verdict

if TYPE_CHECKING:
    from amenable.rollout.rewards import TextReward


class ScoreJudge:
    """The higher score wins; equal scores are a tie.

    Args:
        name: in tables.
        reward: gives the scores.
    """

    identity: Mapping[str, Any] | None = None

    def __init__(self, name: str, reward: TextReward) -> None:
        self.name, self._reward = name, reward

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        """Score every answer once, and compare; a failed score leaves its questions open."""
        from amenable.rollout.rewards import Failed

        answers = list(
            dict.fromkeys((q.prompt.id, text) for q in questions for text in (q.first, q.second))
        )
        prompts = {question.prompt.id: question.prompt for question in questions}
        given = self._reward.judge([prompts[n] for n, _ in answers], [text for _, text in answers])
        verdicts, unanswered = dict(zip(answers, given, strict=True)), []
        for number, question in enumerate(questions):
            pair = [
                verdicts[question.prompt.id, text] for text in (question.first, question.second)
            ]
            failed = [verdict for verdict in pair if isinstance(verdict, Failed)]
            if failed:
                unanswered.append(failed[0].reason)
                continue
            first, second = (
                sum(step for _, step in score) if isinstance(score, tuple) else score
                for score in pair
                if not isinstance(score, Failed)
            )
            better = Verdict.FIRST if first > second else Verdict.SECOND
            verdict = Verdict.TIE if first == second else better
            keep(number, Reply(verdict, f"{first:.6g} against {second:.6g}"))
        return unanswered
