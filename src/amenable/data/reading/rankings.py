"""N answers of one prompt to pairs: every two of them, or the best and the worst.

The weights of a prompt's pairs sum to 1, so that n answers do not count n(n − 1)/2 times
(Ouyang et al. 2022, arXiv:2203.02155, section 3.5, divide by the same number).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, count
from typing import Any, Literal

from amenable.data.reading.records import ReadLog, Row
from amenable.data.schemas import Answer, Choice, Message, Preference, Ranking

Pairs = Literal["all", "best_worst"]

MAX_PAIRS = 1000
"""The pairs of one prompt that are read; of more, so many are drawn by hash."""


def pairs_of(ranking: Ranking, how: Pairs, log: ReadLog) -> Iterator[Preference]:
    """The decided pairs of a ranking, better answer first; equal answers and scores make none.

    A pair of a rated ranking has the difference of the scores as its margin, in the unit of the
    ratings. Of more than `MAX_PAIRS` pairs those are taken that a hash of the answers draws.
    """
    places = _best_first(ranking)
    if how == "best_worst" and places:
        places = [places[0], places[-1]] if len(places) > 1 else []
    decided = _count_decided(ranking, places, log)
    if decided > MAX_PAIRS:
        log.dropped[f"a pair beyond the {MAX_PAIRS:,} of one prompt"] += decided - MAX_PAIRS
    weight = 1 / min(decided, MAX_PAIRS) if decided else 0.0
    pairs = _all(ranking, places) if decided <= MAX_PAIRS else _drawn(ranking, decided)
    for better, worse in pairs:
        prompt = ranking.prompt
        margin = ranking.scores[better] - ranking.scores[worse]
        yield Preference(
            prompt=replace(prompt, id=f"{prompt.id}/{better}-{worse}"),
            candidate_0=ranking.answers[better],
            candidate_1=ranking.answers[worse],
            choice=Choice.FIRST,
            weight=weight,
            margin=margin if ranking.rated else None,
        )


def _best_first(ranking: Ranking) -> list[int]:
    """Places of the answers; of equal scores the one that stands first."""
    return sorted(range(len(ranking.answers)), key=lambda place: (-ranking.scores[place], place))


def _count_decided(ranking: Ranking, places: list[int], log: ReadLog) -> int:
    """How many pairs are neither of equal scores nor of equal answers; counts the others."""
    scores = Counter(ranking.scores[place] for place in places)
    texts = Counter(ranking.answers[place] for place in places)
    both = Counter((ranking.scores[place], ranking.answers[place]) for place in places)
    equal_score, equal_both = _pairs_within(scores), _pairs_within(both)
    equal_text = _pairs_within(texts) - equal_both
    if equal_score:
        log.dropped["two answers of equal score make no pair"] += equal_score
    if equal_text:
        log.dropped["two equal answers make no pair"] += equal_text
    return len(places) * (len(places) - 1) // 2 - equal_score - equal_text


def _pairs_within(groups: Counter[Any]) -> int:
    return sum(size * (size - 1) // 2 for size in groups.values())


def _all(ranking: Ranking, places: list[int]) -> Iterator[tuple[int, int]]:
    for number, better in enumerate(places):
        for worse in places[number + 1 :]:
            if _is_decided(ranking, better, worse):
                yield better, worse


def _is_decided(ranking: Ranking, one: int, other: int) -> bool:
    return (
        ranking.scores[one] != ranking.scores[other]
        and ranking.answers[one] != ranking.answers[other]
    )


def _drawn(ranking: Ranking, decided: int) -> Iterator[tuple[int, int]]:
    """`MAX_PAIRS` of the decided pairs, whatever the order in which the answers were read."""
    hashes = [hashlib.sha256(text.encode()).digest() for text in ranking.answers]
    places = sorted(range(len(hashes)), key=lambda n: (-ranking.scores[n], hashes[n], n))
    worse = _Worse(ranking, places)
    ends = list(accumulate(worse.count(better) for better in places))
    seed = hashlib.sha256(b"".join(hashes[place] for place in places)).digest()
    drawn: set[int] = set()
    for number in count():
        value = hashlib.sha256(seed + number.to_bytes(8)).digest()[:8]
        drawn.add(int.from_bytes(value) % decided)
        if len(drawn) == MAX_PAIRS:
            break
    for index in sorted(drawn):
        place = bisect_right(ends, index)
        before = ends[place - 1] if place else 0
        yield places[place], worse.of(places[place])[index - before]


class _Worse:
    """The answers that lose to an answer."""

    def __init__(self, ranking: Ranking, places: list[int]) -> None:
        self._ranking, self._places = ranking, places
        self._begin: dict[float, int] = {}  # of a score: where the answers behind it begin
        for number, place in enumerate(places, 1):
            self._begin[ranking.scores[place]] = number
        self._alike: dict[str, list[float]] = {}  # of a text: the scores that it has
        for place in places:
            self._alike.setdefault(ranking.answers[place], []).append(ranking.scores[place])

    def count(self, better: int) -> int:
        """How many lose to the answer at this place."""
        score = self._ranking.scores[better]
        alike = sum(one < score for one in self._alike[self._ranking.answers[better]])
        return len(self._places) - self._begin[score] - alike

    def of(self, better: int) -> list[int]:
        """The places of those, best first."""
        text = self._ranking.answers[better]
        behind = self._places[self._begin[self._ranking.scores[better]] :]
        return [place for place in behind if self._ranking.answers[place] != text]


def gather(
    answers: Iterable[tuple[Row, Answer]], log: ReadLog, *, rated: bool
) -> Iterator[tuple[Row, Ranking]]:
    """Rankings of the answers that share a prompt, in the order of their first answers.

    Holds all answers in memory. A prompt with one answer makes no ranking and is counted; if no
    prompt has more, the file is at fault. Of the prompts' meta, what all answers agree on is kept.
    """
    found: dict[tuple[Message, ...], list[tuple[Row, Answer]]] = {}
    for row, answer in answers:
        found.setdefault(answer.prompt.messages, []).append((row, answer))
    if found and all(len(group) == 1 for group in found.values()):
        first_row = next(iter(found.values()))[0][0]
        log.fault(
            first_row.fault(
                None,
                "the file has scores, not preferences: each prompt has one answer, and a pair "
                "needs two answers to the same prompt; add the others, or use another file",
            )
        )
        return
    for group in found.values():
        if len(group) == 1:
            log.drop("the only answer to its prompt: scores, not preferences")
        else:
            yield group[0][0], _ranking([answer for _, answer in group], rated)


def _ranking(answers: list[Answer], rated: bool) -> Ranking:
    prompt, others = answers[0].prompt, [answer.prompt.meta for answer in answers[1:]]
    meta = {
        key: value
        for key, value in prompt.meta.items()
        if all(key in other and other[key] == value for other in others)
    }
    return Ranking(
        prompt=replace(prompt, meta=meta),
        answers=tuple(answer.text for answer in answers),
        scores=tuple(answer.score for answer in answers),
        rated=rated,
    )
