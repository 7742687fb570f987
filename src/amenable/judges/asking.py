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
    systems: tuple[str, str] = ("a", "b")
    """Their names: pairs of several comparisons may be asked about at once."""

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

    @property
    def first(self) -> str:
        """Name of the system whose answer was shown first."""
        return self.pair.systems[self.swapped]


@dataclass(frozen=True)
class Asked:
    """What came of asking."""

    looks: list[Look]
    """Of both orders of every pair that has a reply, in the order of the pairs."""
    put: list[Pair]
    """The pair of each question that was put now; the others were known."""
    unanswered: list[str]
    """Why questions went without a reply."""

    @property
    def calls(self) -> int:
        """Questions that were put now."""
        return len(self.put)


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
        pairs: of two systems, or of more, two at a time.
        store: of replies; each is kept the moment that it arrives.
        on_progress: hears how many questions have a reply since the last call.

    Raises:
        StageError: not one question about two of the systems has a reply.
    """
    orders = [(pair, swapped) for pair in pairs for swapped in (False, True)]
    identity = judge.identity
    keys = [question_key(identity or {}, pair.question(swapped)) for pair, swapped in orders]
    known = {} if identity is None else store.find(keys)
    asked: dict[str, tuple[Pair, bool]] = {}
    for key, (pair, swapped) in zip(keys, orders, strict=True):
        if key not in known and pair.a != pair.b:
            asked.setdefault(key, (pair, swapped))
    names, put = list(asked), [pair for pair, _ in asked.values()]
    questions = [pair.question(swapped) for pair, swapped in asked.values()]

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
    if silent := {pair.systems for pair in pairs} - {look.pair.systems for look in looks}:
        count = 2 * sum(pair.systems in silent for pair in pairs)
        raise StageError(
            f"{judge.name} gave no reply to any of {count} questions: {unanswered[0]}; "
            "is it the right judge, and does it answer?"
        )
    return Asked(looks, put, unanswered)
