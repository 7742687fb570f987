"""Both orders of every pair to a judge, each question once, with what is known left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amenable.data.schemas import Prompt
from amenable.errors import StageError
from amenable.judges.store import ReplyStore, question_key
from amenable.judges.types import Judge, Question, Reply, Verdict


@dataclass(frozen=True, slots=True)
class Pair:
    """Answers of systems a and b to a prompt."""

    prompt: Prompt
    a: str
    b: str

    def question(self, swapped: bool) -> Question:
        """With a's answer first, or b's."""
        first, second = (self.b, self.a) if swapped else (self.a, self.b)
        return Question(self.prompt, first, second)


@dataclass(frozen=True, slots=True)
class Look:
    """A judge's reply to one order of a pair."""

    pair: Pair
    swapped: bool
    """b's answer was shown first."""
    reply: Reply


@dataclass(frozen=True)
class Asked:
    """What came of asking."""

    looks: list[Look]
    """Of both orders of every pair that has a reply, in the order of the pairs."""
    calls: int
    """Questions that were put now; the others were known."""
    unanswered: list[str]
    """Why questions went without a reply."""


IDENTICAL = Reply(Verdict.TIE, "Both systems wrote the same text.")


def ask_both_orders(
    judge: Judge,
    pairs: Sequence[Pair],
    store: ReplyStore,
    on_progress: Callable[[int], None] | None = None,
) -> Asked:
    """Ask what the store does not know; a pair of equal texts is a tie that nobody is asked.

    Args:
        judge: whom.
        pairs: of two systems.
        store: of replies; each is kept the moment that it arrives.
        on_progress: hears how many questions have a reply since the last call.

    Raises:
        StageError: not one question has a reply.
    """
    orders = [(pair, swapped) for pair in pairs for swapped in (False, True)]
    identity = judge.identity
    keys = [question_key(identity or {}, pair.question(swapped)) for pair, swapped in orders]
    known = {} if identity is None else store.find(keys)
    asked = {
        key: pair.question(swapped)
        for key, (pair, swapped) in zip(keys, orders, strict=True)
        if key not in known and pair.a != pair.b
    }
    names, questions = list(asked), list(asked.values())

    def keep(number: int, reply: Reply) -> None:
        if identity is not None:
            store.keep(names[number], judge.name, questions[number].prompt.id, reply)
        known[names[number]] = reply
        if on_progress is not None:
            on_progress(1)

    unanswered = judge.ask(questions, keep) if questions else []
    looks = [
        Look(pair, swapped, IDENTICAL if pair.a == pair.b else known[key])
        for key, (pair, swapped) in zip(keys, orders, strict=True)
        if pair.a == pair.b or key in known
    ]
    if pairs and not looks:
        raise StageError(
            f"{judge.name} gave no reply to any of {len(orders)} questions: {unanswered[0]}; "
            "is it the right judge, and does it answer?"
        )
    return Asked(looks, len(questions), unanswered)
