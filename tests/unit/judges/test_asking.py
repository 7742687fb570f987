"""Pairs of several comparisons asked about at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import StageError
from amenable.judges import Question, Reply, Verdict
from amenable.judges.asking import Asked, Pair, ask_both_orders
from amenable.judges.store import ReplyStore
from amenable.judges.types import Keep

ANSWERS = {"base": ("a", "b"), "tuned": ("aa", "b"), "best": ("aa", "bbb")}


class Longer:
    """Prefers the longer text; has no answer about some texts."""

    name = "longer"

    def __init__(
        self, silent_over: Collection[str] = (), identity: dict[str, Any] | None = None
    ) -> None:
        self.identity, self._silent_over = identity, silent_over
        self.batches: list[int] = []

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        self.batches.append(len(questions))
        unanswered = []
        for number, asked in enumerate(questions):
            if {asked.first, asked.second} & set(self._silent_over):
                unanswered.append("no answer")
                continue
            first = len(asked.first) > len(asked.second)
            keep(number, Reply(Verdict.FIRST if first else Verdict.SECOND))
        return unanswered


def asked(judge: Longer, folder: Path) -> Asked:
    """Three systems over two prompts."""
    pairs = [
        Pair(
            Prompt(messages=(Message(Speaker.USER, f"Ask {n}."),), id=f"p{n}", group=str(n)),
            ANSWERS[a][n],
            ANSWERS[b][n],
            (a, b),
        )
        for a, b in combinations(ANSWERS, 2)
        for n in range(2)
    ]
    with closing(ReplyStore(folder / "replies.sqlite")) as store:
        return ask_both_orders(judge, pairs, store)


@pytest.mark.parametrize("identity", [None, {"kind": "longer"}])
def test_a_question_that_two_comparisons_share_is_put_once_to_the_first(
    tmp_path: Path, identity: dict[str, Any] | None
) -> None:
    """Of p0, tuned and best say the same, so that base against either is one question; of p1, base
    and tuned do, so that they against best is one.
    """
    judge = Longer(identity=identity)
    found = asked(judge, tmp_path)
    assert judge.batches == [4]
    assert [(pair.systems, pair.prompt.id) for pair in found.put] == [
        *[(("base", "tuned"), "p0")] * 2,
        *[(("base", "best"), "p1")] * 2,
    ]
    assert (found.calls, len(found.looks), found.unanswered) == (4, 12, [])
    told = [(k.pair.systems, k.pair.prompt.id, k.first, str(k.reply.verdict)) for k in found.looks]
    assert told[:4] == [
        (("base", "tuned"), "p0", "base", "second"),
        (("base", "tuned"), "p0", "tuned", "first"),
        (("base", "tuned"), "p1", "base", "tie"),
        (("base", "tuned"), "p1", "tuned", "tie"),
    ]
    assert [row[3] for row in told[4:]] == [
        *("second", "first", "second", "first"),
        *("tie", "tie", "second", "first"),
    ]


def test_a_comparison_without_any_reply_ends_the_asking(tmp_path: Path) -> None:
    """Base and best have no text in common, as the other pairs of systems do, and no answer."""
    with pytest.raises(StageError, match="any of 4 questions: no answer; is it the right judge"):
        asked(Longer(silent_over={"bbb", "a"}), tmp_path)
