from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.judges import Verdict
from amenable.judges.asking import Pair, ask_both_orders
from amenable.judges.scores import ScoreJudge
from amenable.judges.store import ReplyStore
from amenable.rollout.rewards import Failed
from amenable.rollout.rewards import Verdict as Score


class Words:
    """One point a word; no score for an empty text, steps for two words."""

    def __init__(self) -> None:
        self.calls = 0

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score]:
        self.calls += len(texts)
        counts = [len(text.split()) for text in texts]
        return [
            Failed("empty") if not n else ((1, 1.0), (2, 1.0)) if n == 2 else float(n)
            for n in counts
        ]


def test_the_higher_score_wins_in_either_order(tmp_path: Path) -> None:
    prompt = Prompt(messages=(Message(Speaker.USER, "?"),), id="p", group="")
    pairs = [Pair(prompt, "a", "a b"), Pair(prompt, "a b c", "a b"), Pair(prompt, "x y", "a b")]
    reward, store = Words(), ReplyStore(tmp_path / "replies.sqlite")
    found = ask_both_orders(ScoreJudge("words", reward), pairs, store)
    first, second, tie = Verdict.FIRST, Verdict.SECOND, Verdict.TIE
    assert [look.reply.verdict for look in found.looks] == [second, first, first, second, tie, tie]
    assert found.looks[0].reply.text == "1 against 2"
    assert reward.calls == 4, "every text once"
    ask_both_orders(ScoreJudge("words", reward), pairs, store)
    assert reward.calls == 8, "nobody can tell whether a function has changed"
    store.close()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_confidence_is_calibrated_by_the_temperature(temperature: float, tmp_path: Path) -> None:
    prompt = Prompt(messages=(Message(Speaker.USER, "?"),), id="p", group="")
    pairs = [Pair(prompt, "a", "a b c d"), Pair(prompt, "a", "b"), Pair(prompt, "a", "a " * 5000)]
    judge, store = ScoreJudge("words", Words(), temperature), ReplyStore(tmp_path / "r.sqlite")
    replies = [look.reply for look in ask_both_orders(judge, pairs, store).looks]
    margins = np.array([-3, 3, 0, 0, -4999, 4999]) / temperature
    expected = expit(margins)
    assert [reply.confidence for reply in replies] == pytest.approx(expected, abs=1e-9)
    assert replies[0].text == f"1 against 4, T = {temperature:g}"
    store.close()


def test_scores_that_are_no_logits_have_no_confidence(tmp_path: Path) -> None:
    prompt = Prompt(messages=(Message(Speaker.USER, "?"),), id="p", group="")
    store = ReplyStore(tmp_path / "replies.sqlite")
    asked = ask_both_orders(ScoreJudge("words", Words()), [Pair(prompt, "a", "a b")], store)
    assert {look.reply.confidence for look in asked.looks} == {None}
    store.close()


def test_a_failed_score_leaves_its_questions_open(tmp_path: Path) -> None:
    prompt = Prompt(messages=(Message(Speaker.USER, "?"),), id="p", group="")
    store = ReplyStore(tmp_path / "replies.sqlite")
    pairs = [Pair(prompt, "", "a"), Pair(prompt, "b", "a")]
    found = ask_both_orders(ScoreJudge("words", Words()), pairs, store)
    assert ([look.pair for look in found.looks], found.unanswered) == (
        [pairs[1]] * 2,
        ["empty", "empty"],
    )
    store.close()
