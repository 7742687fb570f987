"""The page that `amenable compare` leaves: who wins, who says so, every answer and its replies.

All figures are those of `comparison.json`; samples and replies are those of the files beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from amenable.artifacts import Json, read_json, read_jsonl, write_text
from amenable.evaluate import curves, report_data
from amenable.evaluate.both_orders import SCORE_OF_FIRST
from amenable.evaluate.judged import MOST_INVALID
from amenable.evaluate.pages import (
    at_pointer,
    environment,
    figures_of,
    frame,
    pointer_part,
    show,
    visible,
)
from amenable.evaluate.samples import Answer, Look, Outcome, Sample, browser, pairs
from amenable.judges.types import Verdict

SAMPLES_BUDGET = 2_000_000
"""Bytes of the samples; the page stays under 3 MB."""

MOST_SLICES = 300
"""Rows of slices in the page, of all comparisons together."""

FEW_FLIPS, MANY_FLIPS = 0.1, 0.25
"""Shares of prompts on which a judge contradicts itself that are little and much."""

PEOPLE = "people"

SAME = Outcome(0.0, words="the same text, a tie that nobody is asked")
NO_REPLY = Outcome(None, words="no reply")

Outcomes = Mapping[tuple[str, str, str], Mapping[str, Outcome]]
"""By judge and pair of systems, then by the prompt's id."""


def render(folder: Path) -> None:
    """Writes `comparison.html` from what `amenable compare` left in the folder, atomically.

    Raises:
        DataError: a file of the comparison is missing or torn.
        StorageError: the page cannot be written.
    """
    result = read_json(folder / "comparison.json")
    completions = list(read_jsonl(folder / "completions.jsonl"))
    looks = list(read_jsonl(folder / "looks.jsonl"))
    write_text(folder / "comparison.html", page(result, completions, looks))


def page(result: Json, completions: Sequence[Json], looks: Sequence[Json]) -> str:
    """The page as text; the same files give the same bytes."""
    systems = list(completions[0]["completions"])
    judges = list(dict.fromkeys(row["judge"] for row in result["comparisons"]))
    found = _comparisons(result)
    samples = browser(
        systems,
        judges,
        _samples(completions, systems, judges, outcomes(looks)),
        budget=SAMPLES_BUDGET,
        chosen=(0, 1),
        both_orders=True,
    )
    return (
        environment()
        .get_template("comparison.html")
        .render(
            **frame(),
            figure=figures_of(result, at_pointer),
            systems=systems,
            judges=judges,
            prompts=len(completions),
            comparisons=found,
            leader=_leader(result, found),
            corrected=any("corrected_win_rate" in row["entry"] for row in found),
            priced=any(row["entry"]["cost"] for row in found),
            most_invalid=MOST_INVALID,
            verdicts=[str(verdict) for verdict in Verdict],
            slices=_slices(found),
            rankings=_rankings(result),
            diversity=[
                {"system": name, "key": f"/diversity/{pointer_part(name)}"}
                for name in result["diversity"]
            ],
            unanswered=list(result["unanswered"].items()),
            samples=samples,
        )
    )


# Figures -------------------------------------------------------------------------------------


def _comparisons(result: Json) -> list[Json]:
    """Each entry with its key, its mark and what its figures mean."""
    return [
        {
            "entry": entry,
            "key": f"/comparisons/{index}",
            "pair": f"{entry['b']} against {entry['a']}",
            "a": entry["a"],
            "b": entry["b"],
            "judge": entry["judge"],
            "verdict": report_data.verdict(entry),
            "equal": _side(entry["length_controlled_ci95"]),
            "mark": curves.interval_mark(
                entry["win_rate"],
                entry["win_rate_ci95"],
                label=visible(f"win rate of {entry['b']} against {entry['a']} by {entry['judge']}"),
            ),
            "bias": bias_in_words(entry),
        }
        for index, entry in enumerate(result["comparisons"])
    ]


def _side(interval: Sequence[float] | None) -> str:
    """Where an interval lies against one half: `above`, `below`, or `unclear`."""
    low, high = interval or (0.0, 1.0)
    return "above" if low > 0.5 else "below" if high < 0.5 else "unclear"


def bias_in_words(entry: Json) -> dict[str, str]:
    """What the figures of a judge's bias say, by figure."""
    bias = entry["bias"]
    told = {
        "first_wins": {
            "above": "It likes what is shown first; asking in both orders cancels that.",
            "below": "It likes what is shown second; asking in both orders cancels that.",
            "unclear": "Good: no liking for a place is seen.",
        }[_side(bias["first_wins_ci95"])],
        "flips": "Good: few verdicts hang on the order.",
        "longer_wins": {
            "above": "The longer answer wins more often: read the win rate at equal length.",
            "below": "The shorter answer wins more often: read the win rate at equal length.",
            "unclear": "Good: no liking for a length is seen.",
        }[_side(bias["longer_wins_ci95"])],
        "invalid": "Good: every reply has a verdict.",
    }
    if bias["flips"] >= MANY_FLIPS:
        told["flips"] = "Bad: many verdicts hang on the order; a single one says little."
    elif bias["flips"] >= FEW_FLIPS:
        told["flips"] = "Some verdicts hang on the order; they count as ties."
    if bias["longer_wins"] is None:
        told["longer_wins"] = "All pairs are of equal length."
    if entry["invalid"] > MOST_INVALID:
        told["invalid"] = "Bad: so many that this comparison is not to be trusted."
    elif entry["invalid"]:
        told["invalid"] = "Few; their prompts are left out."
    if entry["judge"] == PEOPLE:
        one = "One row of the sheet answers both orders: this says nothing of people."
        told |= {"first_wins": one, "flips": one}
    return told


def _leader(result: Json, found: Sequence[Json]) -> Json | None:
    """The strongest of several systems by the first judge, and how it does against the second."""
    for judge, rows in result["rankings"].items():
        top, second = (row["system"] for row in rows[:2])
        own = next(
            row for row in found if row["judge"] == judge and {row["a"], row["b"]} == {top, second}
        )
        certain = own["verdict"] == ("better" if own["b"] == top else "worse")
        return {"system": top, "comparison": own, "certain": certain}
    return None


def _slices(found: Sequence[Json]) -> list[Json]:
    """The slices of each comparison that has some; the page holds `MOST_SLICES` of all."""
    tables, left = [], MOST_SLICES
    for row in found:
        entries = row["entry"]["slices"]
        if not entries:
            continue
        shown = [
            {
                "name": entry["slice"],
                "key": f"{row['key']}/slices/{index}",
                "holds": entry["p_holm"] < 0.05,
                "mark": curves.interval_mark(
                    entry["win_rate"],
                    entry["win_rate_ci95"],
                    label=visible(f"win rate in {entry['slice']}"),
                    muted=entry["p_holm"] >= 0.05,
                ),
            }
            for index, entry in enumerate(entries[:left])
        ]
        left -= len(shown)
        holding = sum(entry["p_holm"] < 0.05 for entry in entries)
        hidden = len(entries) - len(shown)
        tables.append({**row, "rows": shown, "holding": holding, "hidden": hidden})
    return tables


def _rankings(result: Json) -> list[Json]:
    """By judge, the strongest first, drawn on one scale."""
    tables = []
    for judge, rows in result["rankings"].items():
        ends = [end for row in rows for end in row["strength_ci95"]]
        domain = (min(0.0, *ends), max(0.0, *ends))
        tables.append(
            {
                "judge": judge,
                "rows": [
                    {
                        "system": row["system"],
                        "key": f"/rankings/{pointer_part(judge)}/{index}",
                        "mark": curves.interval_mark(
                            row["strength"],
                            row["strength_ci95"],
                            reference=0.0,
                            domain=domain,
                            label=visible(f"strength of {row['system']} by {judge}"),
                        ),
                    }
                    for index, row in enumerate(rows)
                ],
            }
        )
    return tables


# Samples -------------------------------------------------------------------------------------


def outcomes(looks: Sequence[Json]) -> Outcomes:
    """What each judge says of each pair of answers, both orders taken together."""
    grouped: dict[tuple[str, str, str], dict[str, list[Json]]] = {}
    for look in looks:
        by_prompt = grouped.setdefault((look["judge"], look["a"], look["b"]), {})
        by_prompt.setdefault(look["id"], []).append(look)
    return {
        key: {name: _outcome(*key, replies) for name, replies in by_prompt.items()}
        for key, by_prompt in grouped.items()
    }


def _outcome(judge: str, a: str, b: str, replies: Sequence[Json]) -> Outcome:
    shown = tuple(_look(judge, a, b, reply) for reply in replies)
    if judge == PEOPLE:  # one row answers both orders
        shown = shown[:1]
    first, second = (_score_of(b, replies, shown_first) for shown_first in (a, b))
    if first is None or second is None:
        return Outcome(None, words="no verdict in each of the orders", looks=shown)
    both_bad = {reply["verdict"] for reply in replies} == {Verdict.BOTH_BAD}
    words = "both bad" if both_bad else _in_words(a, b, first, second)
    contradicts = (first - 0.5) * (second - 0.5) < 0
    return Outcome((first + second) / 2 - 0.5, contradicts, words, shown)


def _score_of(b: str, replies: Sequence[Json], shown_first: str) -> float | None:
    """Mean score of b in one order; None where no verdict is valid, as in `both_orders.Orders`."""
    given = [
        SCORE_OF_FIRST[Verdict(reply["verdict"])]
        for reply in replies
        if reply["first"] == shown_first
    ]
    valid = [score if shown_first == b else 1 - score for score in given if not math.isnan(score)]
    return sum(valid) / len(valid) if valid else None


def _in_words(a: str, b: str, first: float, second: float) -> str:
    if (first - 0.5) * (second - 0.5) < 0:
        place = "first" if second > first else "second"
        return f"contradicts itself: whichever is shown {place}"
    if first == second == 0.5:
        return "a tie in both orders"
    winner = b if first + second > 1 else a
    if first == second:
        return f"{winner} won in both orders"
    return f"{winner} won in one order, a tie in the other"


def _look(judge: str, a: str, b: str, look: Json) -> Look:
    first, second = (b, a) if look["first"] == b else (a, b)
    said = {
        Verdict.FIRST: f"{first} is better",
        Verdict.SECOND: f"{second} is better",
        Verdict.TIE: "a tie",
        Verdict.BOTH_BAD: "both bad",
        Verdict.INVALID: "no verdict",
    }[Verdict(look["verdict"])]
    heading = said if judge == PEOPLE else f"{first} shown first: {said}"
    if look["confidence"] is not None:
        heading += f", {show(look['confidence'], 'percent')} for {first}"
    return Look(heading, look["reply"])


def _samples(
    completions: Sequence[Json], systems: Sequence[str], judges: Sequence[str], said: Outcomes
) -> Iterator[Sample]:
    for row in completions:
        texts = row["completions"]
        yield Sample(
            id=row["id"],
            prompt=row["input_text"],
            answers=[Answer(texts[name]) for name in systems],
            outcomes=[
                [
                    SAME
                    if texts[a] == texts[b]
                    else said.get((judge, a, b), {}).get(row["id"], NO_REPLY)
                    for a, b in pairs(systems)
                ]
                for judge in judges
            ],
        )
