"""Ranked and rated answers to pairs."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from amenable.data.reading.rankings import MAX_PAIRS, gather, pairs_of
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


def many(scores: list[float], texts: list[str] | None = None) -> Ranking:
    answers = tuple(texts or (f"answer {n}" for n in range(len(scores))))
    return Ranking(prompt=prompt(), answers=answers, scores=tuple(scores), rated=False)


def test_pairs_of_one_prompt_are_bounded_and_the_others_counted() -> None:
    log = ReadLog()
    started = time.perf_counter()
    pairs = list(pairs_of(many([1.0] * 3000 + [0.0] * 3000), "all", log))
    assert time.perf_counter() - started < 5
    assert len(pairs) == len({pair.prompt.id for pair in pairs}) == MAX_PAIRS
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)
    assert all(int(pair.chosen[7:]) < 3000 <= int(pair.rejected[7:]) for pair in pairs)
    assert len({pair.chosen for pair in pairs}) > 700  # drawn from all of them
    assert log.dropped == {
        "a pair beyond the 1,000 of one prompt": 3000 * 3000 - MAX_PAIRS,
        "two answers of equal score make no pair": 2 * (3000 * 2999 // 2),
    }


def test_order_of_the_answers_does_not_change_which_pairs_are_drawn() -> None:
    scores = [float(n % 7) for n in range(100)]
    texts = [f"text {n % 40}" for n in range(100)]
    order = random.Random(1).sample(range(100), 100)
    shuffled = many([scores[n] for n in order], [texts[n] for n in order])
    logs = ReadLog(), ReadLog()
    first = said(many(scores, texts), log=logs[0])
    assert sorted(first) == sorted(said(shuffled, log=logs[1]))
    assert logs[0].dropped == logs[1].dropped
    assert len(first) == MAX_PAIRS
    assert all(chosen != rejected for chosen, rejected in first)


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_a_look_at_every_pair(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randint(0, 12)
    made = many([float(draw.randint(0, 3)) for _ in range(size)], draw.choices("ABCD", k=size))
    log = ReadLog()
    pairs = said(made, log=log)
    by_hand = Counter(
        "score" if one[0] == other[0] else "text" if one[1] == other[1] else "pair"
        for one, other in combinations(zip(made.scores, made.answers, strict=True), 2)
    )
    assert len(pairs) == by_hand["pair"]
    assert log.dropped["two answers of equal score make no pair"] == by_hand["score"]
    assert log.dropped["two equal answers make no pair"] == by_hand["text"]


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
    with pytest.raises(DataError, match="each prompt has one answer"):  # a whole file is no row
        list(gather(answers(dropping)[:2], dropping, rated=True))


def test_no_answers_give_no_rankings() -> None:
    log = ReadLog()
    assert not list(gather([], log, rated=True))
    assert not log.dropped
