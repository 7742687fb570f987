"""N answers of one prompt to pairs: every two of them, or the best and the worst.

The weights of a prompt's pairs sum to 1, so that n answers do not count n(n − 1)/2 times
(Ouyang et al. 2022, arXiv:2203.02155, section 3.5, divide by the same number).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from amenable.data.reading.records import ReadLog, Row
from amenable.data.schemas import Answer, Choice, Preference, Ranking

Pairs = Literal["all", "best_worst"]


def pairs_of(ranking: Ranking, how: Pairs, log: ReadLog) -> Iterator[Preference]:
    """The decided pairs of a ranking, better answer first; equal answers and scores make none.

    A pair of a rated ranking has the difference of the scores as its margin, in the unit of the
    ratings.
    """
    places = sorted(range(len(ranking.answers)), key=lambda place: (-ranking.scores[place], place))
    chosen = [(one, other) for n, one in enumerate(places) for other in places[n + 1 :]]
    if how == "best_worst" and chosen:
        chosen = [(places[0], places[-1])]
    decided = [pair for pair in chosen if _is_decided(ranking, pair, log)]
    for better, worse in decided:
        prompt = ranking.prompt
        margin = ranking.scores[better] - ranking.scores[worse]
        yield Preference(
            prompt=replace(prompt, id=f"{prompt.id}/{better}-{worse}"),
            candidate_0=ranking.answers[better],
            candidate_1=ranking.answers[worse],
            choice=Choice.FIRST,
            weight=1 / len(decided),
            margin=margin if ranking.rated else None,
        )


def _is_decided(ranking: Ranking, pair: tuple[int, int], log: ReadLog) -> bool:
    one, other = pair
    if ranking.scores[one] == ranking.scores[other]:
        log.drop("two answers of equal score make no pair")
        return False
    if ranking.answers[one] == ranking.answers[other]:
        log.drop("two equal answers make no pair")
        return False
    return True


def gather(
    answers: Iterable[tuple[Row, Answer]], log: ReadLog, *, rated: bool
) -> Iterator[tuple[Row, Ranking]]:
    """Rankings of the answers that share a prompt, in the order of their first answers.

    Holds all answers in memory. A prompt with one answer makes no ranking and is counted; if no
    prompt has more, that is a fault. Of the prompts' meta, what all answers agree on is kept.
    """
    found: dict[tuple[object, ...], list[tuple[Row, Answer]]] = {}
    for row, answer in answers:
        found.setdefault((answer.prompt.group, *answer.prompt.messages), []).append((row, answer))
    if found and all(len(group) == 1 for group in found.values()):
        first_row = next(iter(found.values()))[0][0]
        log.fault(
            first_row.fault(
                None,
                "the file has scores, not preferences: each prompt has one answer, and a pair "
                "needs two answers to the same prompt; add the others, or use another file",
            ),
            first_row.values,
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
