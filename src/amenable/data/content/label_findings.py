"""Findings about the labels of preferences: contradictions, length, position, annotators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.data.content.agreement import NAMELESS, Judgements
from amenable.data.content.columns import SetColumns
from amenable.data.content.findings import EXAMPLES, MANY, Draft, Finding, Level, level_of, percent
from amenable.data.content.label_bias import (
    ANNOTATOR_ROWS,
    DOMINANT,
    LENGTH_NOTE,
    LENGTH_WARNING,
    ONE_SIDED_ROWS,
    POSITION_DISTANCE,
    POSITION_P,
    Share,
    longest_wins,
    one_sided_annotators,
    position_share,
)

Json = dict[str, Any]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

LABEL_TELLS, LABEL_ROWS = 0.9, 20
"""Share of labelled answers whose label tells whether they were chosen, and the fewest of them,
from which labels in answers are told. Chosen here: 18 of 20 by chance once in 2,500 sets."""

DISAGREEMENT = 0.4
"""Share of re-judged pairs with opposite choices by different people from which it is a warning:
Ouyang et al. 2022, arXiv:2203.02155, section 3.4, had 73 % agreement, Stiennon et al. 2020,
arXiv:2009.01325, 73 to 77 %."""


def label_findings(rows: SetColumns) -> tuple[list[Draft], Json]:
    """Findings about the labels of one set of preferences, and the measures behind them."""
    choices = np.array(rows.choices, np.int64)
    prompts = np.array(rows.prompts, np.uint64)
    longest = longest_wins(np.array(rows.words, np.int64), prompts)
    characters = longest_wins(np.array(rows.characters, np.int64), prompts)
    position = position_share(choices, np.array(rows.judgements.units, np.uint64))
    drafts = [*_rejudged(rows), *_length_bias(rows, longest)]
    is_constant = position.get("share") in (0.0, 1.0)
    drafts += _position_bias(rows, position)
    drafts += _annotators(rows, choices, is_constant)
    drafts += _labels(rows)
    measures = {
        "longest_wins": longest.to_json() if longest else None,
        "longest_wins_characters": characters.to_json() if characters else None,
        "position": position,
    }
    return drafts, measures


def _draft(
    rows: SetColumns,
    name: str,
    level: Level,
    count: int,
    of: int,
    text: str,
    at: npt.ArrayLike = (),
) -> Draft:
    return Draft.of_set(rows.name, Finding(name, level, (rows.name,), count, of, text), at)


def _rejudged(rows: SetColumns) -> Iterator[Draft]:
    """Pairs that were judged more than once, and those with opposite choices."""
    judged = _Rejudged.of(rows.judgements)
    twice = int((judged.sizes > 1).sum())
    if not twice:
        return
    units = len(judged.sizes)
    first, opposite = judged.rows_of(judged.sizes > 1), judged.rows_of(judged.is_opposite)
    text = f"{twice} of {units} pairs of {rows.name} were judged more than once."
    yield _draft(rows, "repeated_judgements", "note", twice, units, text, first)
    count, alone = int(judged.is_opposite.sum()), int(judged.is_self_opposite.sum())
    if count:
        is_much = alone >= MANY * units or count - alone > DISAGREEMENT * twice
        text = (
            f"{count} of {twice} pairs of {rows.name} that were judged more than once have "
            f"opposite choices; {alone} of them by the same annotator or without a name."
        )
        level: Level = "warning" if is_much else "note"
        yield _draft(rows, "contradictory_labels", level, count, twice, text, opposite)


@dataclass(frozen=True, slots=True)
class _Rejudged:
    """Units of judgement, each with its rows."""

    index: Integers
    """[n] unit of each row."""

    sizes: Integers
    """[U] rows."""

    is_opposite: Flags
    """[U] whether both candidates were preferred."""

    is_self_opposite: Flags
    """[U] whether by the same named annotator, or by rows without a name."""

    @classmethod
    def of(cls, judged: Judgements) -> _Rejudged:
        units = np.array(judged.units, np.uint64)
        verdicts = np.array(judged.verdicts, np.int8)
        annotators = np.array(judged.annotators, np.int64)
        distinct, index = np.unique(units, return_inverse=True)
        n = len(distinct)

        def both(rows: Flags) -> Flags:
            up = np.bincount(index[rows & (verdicts == 1)], minlength=n)
            down = np.bincount(index[rows & (verdicts == -1)], minlength=n)
            return np.asarray((up > 0) & (down > 0))

        everyone = np.ones(len(units), bool)
        opposite = both(everyone)
        alone = both(annotators == NAMELESS)
        # One annotator's opposite choices: the (unit, annotator) pairs with both verdicts.
        named = np.flatnonzero((annotators != NAMELESS) & (verdicts != 0) & opposite[index])
        order = named[np.lexsort((verdicts[named], annotators[named], index[named]))]
        same = (np.diff(index[order]) == 0) & (np.diff(annotators[order]) == 0)
        turned = same & (np.diff(verdicts[order]) != 0)
        alone[index[order[1:]][turned]] = True
        return cls(index, np.bincount(index, minlength=n), opposite, alone)

    def rows_of(self, chosen: Flags) -> Integers:
        """The first rows of the chosen units, enough for examples."""
        return np.flatnonzero(chosen[self.index])[:EXAMPLES]


def _length_bias(rows: SetColumns, longest: Share | None) -> Iterator[Draft]:
    if longest is None or longest.low <= 0.5 <= longest.high:
        return
    distance = abs(longest.share - 0.5)
    if distance < LENGTH_NOTE:
        return
    text = (
        f"The longer candidate (in words) was chosen in {percent(longest.share)} of "
        f"{longest.rows} pairs of unequal length of {rows.name} (95 % interval "
        f"{percent(longest.low)} to {percent(longest.high)})."
    )
    count = round(longest.share * longest.rows)
    level = level_of(distance, LENGTH_WARNING)
    with_length = np.array(rows.words, np.int64)
    usual = with_length > 0 if longest.share > 0.5 else with_length < 0
    at = np.flatnonzero(usual)
    yield _draft(rows, "length_bias", level, count, longest.rows, text, at)


def _position_bias(rows: SetColumns, position: Json) -> Iterator[Draft]:
    decided = position["rows"]
    if decided == 0:
        return
    share, count = position["share"], round(position["share"] * decided)
    if share in (0.0, 1.0):
        if decided >= ONE_SIDED_ROWS:
            side = 0 if share else 1
            text = f"All {decided} decided choices of {rows.name} are candidate_{side}."
            yield _draft(rows, "one_sided_choice", "note", decided, decided, text, [0])
    elif position["p"] < POSITION_P and abs(share - 0.5) > POSITION_DISTANCE:
        text = (
            f"candidate_0 was chosen in {percent(share)} of {decided} decided rows of {rows.name} "
            f"(p = {position['p']:.1g} of {position['pairs']} pairs)."
        )
        yield _draft(rows, "position_bias", "warning", count, decided, text)


def _annotators(rows: SetColumns, choices: Integers, is_constant: bool) -> Iterator[Draft]:
    annotators = np.array(rows.judgements.annotators, np.int64)
    names = rows.judgements.names
    counts = np.bincount(annotators[annotators >= 0], minlength=len(names))
    if len(names) and rows.rows >= ANNOTATOR_ROWS and counts.max() > DOMINANT * rows.rows:
        name, most = list(names)[int(counts.argmax())], int(counts.max())
        text = f"{most} of {rows.rows} rows of {rows.name} are by annotator {name!r}."
        yield _draft(rows, "dominant_annotator", "note", most, rows.rows, text)
    for name, most, decided in (
        () if is_constant else one_sided_annotators(annotators, choices, names)
    ):
        text = f"Annotator {name!r} picked the same side in {most} of {decided} decided rows."
        at = np.flatnonzero(annotators == names[name])
        yield _draft(rows, "one_sided_annotator", "warning", most, decided, text, at)


def _labels(rows: SetColumns) -> Iterator[Draft]:
    """Answers that begin with labels which give the choice away."""
    count = rows.tally.counts.get("label_in_answer", 0)
    answers = sum(map(sum, rows.labels.values()))
    told = sum(map(max, rows.labels.values()))
    if len(rows.labels) < 2 or count < MANY * rows.rows:
        return
    if answers >= LABEL_ROWS and told >= LABEL_TELLS * answers:
        text = (
            f"{count} of {rows.rows} rows of {rows.name} have an answer that begins with a label; "
            f"the label alone tells the choice for {told} of {answers} such answers."
        )
        examples = tuple(rows.tally.examples["label_in_answer"])
        finding = Finding(
            "label_in_answer", "warning", (rows.name,), count, rows.rows, text, examples
        )
        yield Draft(finding)
