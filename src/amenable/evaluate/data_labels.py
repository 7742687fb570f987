"""Choices, ties, annotators and their agreement, as the data section shows them."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from amenable.evaluate import curves
from amenable.evaluate.curves import number as shown
from amenable.evaluate.lenient import Json, counts, number, table, tables, text, whole

FIRM, TENTATIVE = 0.8, 2 / 3
"""Alpha from which on conclusions are firm, and tentative. Source: Krippendorff 2004, Content
Analysis, 2nd edition, chapter 11."""

FEW_PAIRS = 30
"""Re-judged pairs below which an alpha is not read; chosen here."""

READINGS = {
    "firm": "firm",
    "tentative": "tentative",
    "low": "low: the noise of the labels bounds the reward model",
}
"""What the page says of an alpha; the bounds are explained above the table."""


def alpha_reading(alpha: float) -> str:
    """`firm`, `tentative` or `low`, by Krippendorff's customary bounds.

    Args:
        alpha: Krippendorff's alpha, at most 1.
    """
    return "firm" if alpha >= FIRM else "tentative" if alpha >= TENTATIVE else "low"


def preference_splits(report: Json) -> Iterator[tuple[str, Json]]:
    """Name and statistics of each split of preferences that has any."""
    for name, statistics in table(report, "statistics").items():
        if table(statistics, "choices"):
            yield name, table(statistics)


def label_rows(report: Json) -> list[Json]:
    """Choices of each split: sides, ties, and how often the longer candidate was chosen."""
    found = [
        _label_row(name, table(statistics, "choices"), table(report, "content", "measures", name))
        for name, statistics in preference_splits(report)
    ]
    if not found and counts(table(report, "choices")):
        found = [_label_row("all preferences", table(report, "choices"), {})]
    return found


def _label_row(name: str, choices: Json, measures: Json) -> Json:
    first, second, ties = (whole(choices.get(key)) for key in ("0", "1", "tie"))
    longest, position = table(measures, "longest_wins"), table(measures, "position")
    interval = [number(longest.get("low")), number(longest.get("high"))]
    known = [end for end in interval if end is not None]
    share, interval_known = number(longest.get("share")), len(known) == 2
    label = f"share of pairs of {name} in which the longer candidate was chosen"
    return {
        "name": name,
        "first": first / (first + second) if first + second else None,
        "decided": first + second,
        "ties": ties,
        # All choices on one side: a file that names a chosen text, and no test of anything.
        "p": number(position.get("p")) if first and second else None,
        "longest": share,
        "uneven": whole(longest.get("rows")),
        "interval": known if interval_known else None,
        "mark": Markup("")
        if share is None
        else curves.interval_mark(share, known if interval_known else None, label=label),
    }


def number_notes(report: Json) -> list[str]:
    """Margins and weights of each split in a sentence, where they say anything."""
    found = []
    for name, statistics in preference_splits(report):
        for what in ("margins", "weights"):
            column = table(statistics, what)
            ends = [number(column.get(key)) for key in ("min", "p50", "max")]
            if whole(column.get("distinct")) > 1 and None not in ends:
                low, middle, high = (shown(end or 0.0) for end in ends)
                rows = whole(column.get("rows"))
                found.append(
                    f"{name}: {what} on {rows} rows, from {low} to {high}, median {middle}."
                )
    return found


# Agreement -----------------------------------------------------------------------------------


def agreement_rows(report: Json) -> list[Json]:
    """Of each split of preferences: annotators, re-judged pairs, equal judgements and alphas."""
    found = []
    for name, statistics in preference_splits(report):
        agreement, annotators = table(statistics, "agreement"), table(statistics, "annotators")
        if not agreement:
            continue
        alphas = [("choices", table(agreement, "choice"))]
        if counts(table(statistics, "strengths")):
            alphas += [
                ("strengths, ordinal", table(agreement, "strength_ordinal")),
                ("strengths, interval", table(agreement, "strength_interval")),
            ]
        rows, named = whole(statistics.get("rows")), whole(annotators.get("named_rows"))
        found.append(
            {
                "name": name,
                "annotators": whole(annotators.get("distinct")),
                "nameless": max(0, rows - named),
                "rows": rows,
                "units": whole(agreement.get("units")),
                "judged_twice": whole(agreement.get("judged_twice")),
                "pairwise": number(agreement.get("pairwise")),
                "alphas": [_alpha(of, alpha) for of, alpha in alphas],
            }
        )
    return found


def _alpha(of: str, found: Json) -> Json:
    """One alpha with its reading, or with the reason why there is none."""
    value, units = number(found.get("value")), whole(found.get("units"))
    if value is None:
        reason = text(found.get("reason")) or "not measured"
        return {"of": of, "value": None, "reading": f"undefined: {reason}", "class": "none"}
    if units < FEW_PAIRS:
        reading = f"from {units} pairs only: too few to read"
        return {"of": of, "value": value, "reading": reading, "class": "none"}
    reading = alpha_reading(value)
    return {"of": of, "value": value, "reading": READINGS[reading], "class": reading}


def busiest(report: Json) -> Json:
    """The annotators with most rows in the largest split that names any; empty for none.

    Splits list their busiest annotators only, so that lists of several splits cannot be added.
    """
    splits = [
        (whole(statistics.get("rows")), name, table(statistics, "annotators"))
        for name, statistics in preference_splits(report)
        if whole(table(statistics, "annotators").get("distinct"))
    ]
    if not splits:
        return {}
    _, name, annotators = max(splits, key=lambda split: split[0])
    top = [
        {
            "name": text(one.get("name"), 80),
            "rows": whole(one.get("rows")),
            "share": share,
            "bar": curves.bar(share, muted=True),
        }
        for one in tables(annotators.get("top"))
        if (share := number(one.get("share"))) is not None
    ]
    return {"split": name, "distinct": whole(annotators.get("distinct")), "top": top[:20]}
