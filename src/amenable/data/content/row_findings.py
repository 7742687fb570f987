"""Findings within one set: faults of single rows, unusual texts, repeated rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.data.content.columns import SetColumns
from amenable.data.content.findings import EXAMPLES, MANY, Draft, Finding, level_of

Flags = npt.NDArray[np.bool_]

LONG, LONG_WORDS = 20, 200
"""A text is unusually long from 20 times the median of its set on, and 200 words. Chosen here."""

SINGLE_ROW_FAULTS = {
    "control_characters": "have control characters",
    "carriage_returns": "have carriage returns",
    "replacement_characters": "have U+FFFD in place of a lost character",
    "mojibake": "have letters decoded with the wrong encoding",
    "invisible_characters": "have zero-width or direction characters",
    "markup": "have HTML tags or entities",
    "answer_in_prompt": "have the (preferred) answer word for word in the prompt",
    "role_markers": "have the mark of a turn in an answer",
    "output_copies_prompt": "have the prompt itself as output",
    "same_candidates": "have two candidates equal up to white space and case, and a choice",
    "prefix_candidates": "have a candidate that is the beginning of the other",
    "empty_answers": "have an answer without a word",
    "placeholder_answers": "have an answer that often stands for none",
}
"""Faults of `text_faults`, and how the sentence goes on after "<n> of <m> rows"."""

LEAKS = 0.05
"""Share of rows whose answer stands in the prompt from which it is a warning. Chosen here: in the
open sets of human-written summaries that were looked at, up to 3.2 % are taken word for word."""

ALWAYS_NOTES = frozenset({"carriage_returns", "markup", "prefix_candidates", "placeholder_answers"})
"""Faults that are right in many tasks: told, never a warning."""


def row_findings(rows: SetColumns) -> Iterator[Draft]:
    """Findings within one set that are not about its labels."""
    yield from _tallied(rows)
    yield from _other_scripts(rows)
    yield from _long_texts(rows)
    yield from _duplicates(rows)


def _tallied(rows: SetColumns) -> Iterator[Draft]:
    """Faults counted while the rows passed."""
    for name, sentence in SINGLE_ROW_FAULTS.items():
        count = rows.tally.counts.get(name, 0)
        if count:
            level = level_of(count / rows.rows, LEAKS if name == "answer_in_prompt" else MANY)
            if name in ALWAYS_NOTES:
                level = "note"
            text = f"{count} of {rows.rows} rows of {rows.name} {sentence}."
            examples = tuple(rows.tally.examples[name])
            yield Draft(Finding(name, level, (rows.name,), count, rows.rows, text, examples))


def _other_scripts(rows: SetColumns) -> Iterator[Draft]:
    if len(rows.scripts) < 2:
        return
    main, *others = sorted(rows.scripts, key=lambda name: (-rows.scripts[name].rows, name))
    # A row with texts of two such scripts counts twice, hence the limit.
    count = min(rows.rows, sum(rows.scripts[name].rows for name in others))
    text = (
        f"{count} of {rows.rows} rows of {rows.name} have a text mostly in another script "
        f"({', '.join(others)}) than most of the set ({main})."
    )
    examples = tuple(shown for name in others for shown in rows.scripts[name].examples)
    yield Draft(
        Finding("other_scripts", "note", (rows.name,), count, rows.rows, text, examples[:EXAMPLES])
    )


def _long_texts(rows: SetColumns) -> Iterator[Draft]:
    medians, flags = {}, np.zeros(rows.rows, bool)
    for what, column in (("prompt", rows.prompt_words), ("answer", rows.answer_words)):
        words = np.array(column, np.int64)
        if len(words):
            medians[what] = int(np.median(words))
            flags |= words > max(LONG * medians[what], LONG_WORDS)
    count = int(flags.sum())
    if count:
        shown = ", ".join(f"{what} {median}" for what, median in medians.items())
        text = (
            f"{count} of {rows.rows} rows of {rows.name} have a text of more than {LONG} times the "
            f"median length (median words: {shown})."
        )
        level = level_of(count / rows.rows)
        yield Draft.of_set(
            rows.name,
            Finding("long_texts", level, (rows.name,), count, rows.rows, text),
            np.flatnonzero(flags),
        )


def _duplicates(rows: SetColumns) -> Iterator[Draft]:
    """Rows that repeat an earlier one of the set."""
    again = repeated(_row_key(rows))
    count = int(again.sum())
    if count:
        what = {
            "preference": "prompt, candidates, choice and annotator",
            "demonstration": "prompt and output",
        }.get(rows.kind, "prompt")
        text = f"{count} of {rows.rows} rows of {rows.name} repeat an earlier row ({what})."
        level = level_of(count / rows.rows)
        finding = Finding("duplicate_rows", level, (rows.name,), count, rows.rows, text)
        yield Draft.of_set(rows.name, finding, np.flatnonzero(again))


def _row_key(rows: SetColumns) -> tuple[npt.NDArray[Any], ...]:
    if len(rows.judgements):
        judged = rows.judgements
        return (
            np.array(judged.units, np.uint64),
            np.array(judged.verdicts, np.int8),
            np.array(judged.annotators, np.int32),
        )
    return (np.array(rows.contents, np.uint64),)


def repeated(columns: tuple[npt.NDArray[Any], ...]) -> Flags:
    """[n] True where all columns equal those of an earlier row.

    Args:
        columns: arrays of [n].
    """
    order = np.lexsort(columns[::-1])  # stable: the earliest of equal rows stays first
    equal = np.ones(max(0, len(order) - 1), bool)
    for column in columns:
        ordered = column[order]
        equal &= ordered[1:] == ordered[:-1]
    found = np.zeros(len(order), bool)
    found[order[1:]] = equal
    return found
