"""The sample browser of the pages: prompts with every system's answer, and who won by whom.

Every row stands in the page as it is read without a script. The script searches, filters, orders
and pages them by what each row carries of itself, and marks where two answers differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from markupsafe import Markup

from amenable.evaluate.pages import environment, visible


@dataclass(frozen=True, slots=True)
class Answer:
    """What one system wrote."""

    text: str
    notes: tuple[str, ...] = ()
    """Lines under it, such as its scores."""
    change: float | None = None
    """Of its score over that of the system that it is to improve on."""


@dataclass(frozen=True, slots=True)
class Look:
    """A judge's reply to one order of two answers."""

    heading: str
    """Who was shown first, and what the judge says."""
    reply: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a judge says of two answers to a prompt."""

    margin: float | None
    """Of the later system over the earlier one, in the judge's unit; 0: a tie; None: not judged."""
    contradicts: bool = False
    """The answer shown first, or second, won in both orders."""
    words: str = ""
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with the systems' answers; pairs of systems are those of `pairs`."""

    id: str
    prompt: str
    answers: Sequence[Answer | None]
    """By system; None: it has none."""
    outcomes: Sequence[Sequence[Outcome | None]]
    """[judges][pairs]; None: not judged."""
    reference: str | None = None

    @property
    def judged(self) -> bool:
        """Whether a verdict is told in words."""
        return any(o is not None and o.words for row in self.outcomes for o in row)

    @property
    def margins(self) -> str:
        """[judges][pairs] as JSON, to four digits."""
        return _json(
            [[None if o is None or o.margin is None else _short(o.margin) for o in row]
             for row in self.outcomes]
        )  # fmt: skip

    @property
    def contradictions(self) -> str:
        """[judges][pairs] of 0 and 1 as JSON."""
        return _json([[int(o is not None and o.contradicts) for o in row] for row in self.outcomes])

    @property
    def same(self) -> str:
        """[pairs] 1 where both answers are the same text, as JSON."""
        return _json(
            [int(a is not None and b is not None and a.text == b.text)
             for a, b in combinations(self.answers, 2)]
        )  # fmt: skip

    @property
    def words(self) -> str:
        """[systems] lengths of the answers in words as JSON."""
        return _json([None if a is None else len(a.text.split()) for a in self.answers])


@dataclass(frozen=True, slots=True)
class Browser:
    """What the template shows."""

    systems: Sequence[str]
    judges: Sequence[str]
    rows: Markup
    shown: int
    """Prompts in the page."""
    chosen: tuple[int, int]
    """The two systems to begin with; won and lost are the second one's."""
    both_orders: bool
    """The judges saw both orders, and may contradict themselves."""

    @property
    def names(self) -> str:
        """Of the systems, as JSON."""
        return _json([visible(name) for name in self.systems])


def pairs(systems: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of systems in the order of a sample's outcomes: (0, 1), (0, 2), ..., (1, 2), ..."""
    return list(combinations(systems, 2))


def browser(
    systems: Sequence[str],
    judges: Sequence[str],
    samples: Iterable[Sample],
    *,
    budget: int,
    chosen: tuple[int, int],
    both_orders: bool = False,
) -> Browser:
    """As many samples as fit, from the first on.

    Args:
        systems: names in words.
        judges: names in words.
        samples: read no further than the budget goes.
        budget: bytes of the page that the rows may take.
        chosen: numbers of the two systems to begin with.
        both_orders: whether the judges saw both orders.
    """
    row_of = environment().get_template("samples.html").module.row  # type: ignore[attr-defined]
    found: list[str] = []
    spent = 0
    for sample in samples:
        row = str(row_of(sample, systems, pairs(systems), judges))
        spent += len(row.encode())
        if spent > budget:
            break
        found.append(row)
    rows = Markup("").join(map(Markup, found))  # rendered above, escaped there
    return Browser(systems, judges, rows, len(found), chosen, both_orders)


def _short(value: float) -> float:
    """To four digits, so that nothing but zero becomes zero."""
    return float(f"{value:.4g}")


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
