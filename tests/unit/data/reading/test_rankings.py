"""Ranked and rated answers to pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from amenable.data.reading.rankings import gather, pairs_of
from amenable.data.reading.records import DroppingLog, ReadLog, Row
from amenable.data.schemas import Answer, Message, Prompt, Ranking, Speaker
from amenable.errors import DataError


def prompt(text: str = "Q", **meta: object) -> Prompt:
    return Prompt(messages=(Message(Speaker.USER, text),), id="q", group="g", meta=meta)


def ranking(*scores: float, rated: bool = False, answers: str = "ABCDEF") -> Ranking:
    texts = tuple(answers[: len(scores)])
    return Ranking(prompt=prompt(), answers=texts, scores=scores, rated=rated)


def said(made: Ranking, how: str = "all", log: ReadLog | None = None) -> list[tuple[str, str]]:
    return [(p.chosen, p.rejected) for p in pairs_of(made, how, log or ReadLog())]  # type: ignore[arg-type]


def test_every_two_answers_better_first() -> None:
    assert said(ranking(0, -2, -1)) == [("A", "C"), ("A", "B"), ("C", "B")]


def test_best_and_worst_alone() -> None:
    assert said(ranking(0, -2, -1), "best_worst") == [("A", "B")]


def test_equal_scores_and_equal_answers_make_no_pair_and_are_counted() -> None:
    log = ReadLog()
    assert said(ranking(1, 1, 0), log=log) == [("A", "C"), ("B", "C")]
    assert said(ranking(2, 1, 0, answers="AAC"), log=log) == [("A", "C"), ("A", "C")]
    assert log.dropped == {
        "two answers of equal score make no pair": 1,
        "two equal answers make no pair": 1,
    }


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_weights_of_a_prompt_sum_to_one(count: int) -> None:
    made = ranking(*range(count), answers="ABCDEFG")
    pairs = list(pairs_of(made, "all", ReadLog()))
    assert len(pairs) == count * (count - 1) // 2
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)
    assert len({pair.prompt.id for pair in pairs}) == len(pairs)


def test_margins_are_differences_of_ratings_and_of_nothing_else() -> None:
    rated = list(pairs_of(ranking(4, 1.5, rated=True), "all", ReadLog()))
    assert rated[0].margin == 2.5
    assert next(pairs_of(ranking(4, 1.5), "all", ReadLog())).margin is None


def row(line: int, log: ReadLog) -> Row:
    return Row({}, Path("rows.jsonl"), line, "rows", log)


def answers(log: ReadLog) -> list[tuple[Row, Answer]]:
    made = [
        Answer(prompt=prompt("Q", worker="a", topic="t"), text="A", score=1),
        Answer(prompt=prompt("R"), text="X", score=3),
        Answer(prompt=prompt("Q", worker="b", topic="t"), text="B", score=2),
    ]
    return [(row(line, log), answer) for line, answer in enumerate(made, 1)]


def test_answers_are_gathered_by_prompt() -> None:
    log = ReadLog()
    ((placed, made),) = gather(answers(log), log, rated=True)
    assert placed.line == 1
    assert (made.answers, made.scores, made.rated) == (("A", "B"), (1, 2), True)
    assert log.dropped == {"the only answer to its prompt: scores, not preferences": 1}


def test_only_meta_that_all_answers_share_is_the_prompts() -> None:
    log = ReadLog()
    ((_, made),) = gather(answers(log), log, rated=True)
    assert made.prompt.meta == {"topic": "t"}


def test_scores_without_any_two_answers_to_one_prompt_are_a_fault() -> None:
    log = ReadLog()
    with pytest.raises(DataError, match=r"rows.jsonl:1: the file has scores, not preferences"):
        list(gather(answers(log)[:2], log, rated=True))
    dropping = DroppingLog()
    assert not list(gather(answers(dropping)[:2], dropping, rated=True))
    assert sum(dropping.dropped.values()) == 1


def test_no_answers_give_no_rankings() -> None:
    log = ReadLog()
    assert not list(gather([], log, rated=True))
    assert not log.dropped
