from __future__ import annotations

import json

import numpy as np
import pytest

from amenable.data.content.statistics import (
    EDGES,
    TOP_ANNOTATORS,
    data_statistics,
    length_summary,
    lines,
    number_summary,
    set_statistics,
)
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker


def prompt(text: str, group: str = "g", system: str = "") -> Prompt:
    turns = (Message(Speaker.USER, text),)
    if system:
        turns = (Message(Speaker.SYSTEM, system), *turns)
    return Prompt(messages=turns, id=text, group=group)


def pair(text: str, first: str, second: str, choice: Choice, **more: object) -> Preference:
    return Preference(
        prompt=prompt(text),
        candidate_0=first,
        candidate_1=second,
        choice=choice,
        **more,  # type: ignore[arg-type]
    )


def test_lengths_by_hand() -> None:
    """Ten lengths 1 … 10: nearest rank ⌈p n / 100⌉ gives 1, 5, 9 and 10."""
    found = length_summary(np.arange(10, 0, -1))
    assert {key: found[key] for key in ("mean", "min", "p10", "p50", "p90", "p99", "max")} == {
        "mean": 5.5,
        "min": 1,
        "p10": 1,
        "p50": 5,
        "p90": 9,
        "p99": 10,
        "max": 10,
    }
    # edges 0 1 2 3 4 6 8 12: one each of 1, 2, 3; 4 and 5; 6 and 7; 8, 9 and 10
    assert found["histogram"]["counts"][:8] == [0, 1, 1, 1, 2, 2, 3, 0]


def test_histogram_has_twenty_bins_and_an_open_end() -> None:
    found = length_summary(np.array([0, 1023, 1024, 10**6]))["histogram"]
    assert found["edges"] == list(EDGES)
    assert len(found["counts"]) == 20
    assert (found["counts"][0], found["counts"][-2], found["counts"][-1]) == (1, 1, 2)


def test_no_lengths_and_no_numbers() -> None:
    assert length_summary(np.array([], np.int64)) == {}
    assert number_summary(np.array([])) == {"rows": 0}


def test_numbers_by_hand() -> None:
    assert number_summary(np.array([4.0, 1.0, 1.0, 2.0])) == {
        "rows": 4,
        "distinct": 3,
        "min": 1.0,
        "p50": 1.0,
        "mean": 2.0,
        "max": 4.0,
    }


def test_preferences_by_hand() -> None:
    rows = [
        pair("one two", "a", "b b", Choice.SECOND, annotator="ann", strength=7, margin=0.5),
        pair("One  two", "a a a", "b", Choice.FIRST, annotator="ann", strength=1, weight=3.0),
        pair("three", "a", "b", Choice.TIE, annotator="bo", strength=5),
        pair("four", "a", "b", Choice.FIRST),
    ]
    found = set_statistics(("f:1", row) for row in rows)
    assert (found["kind"], found["rows"], found["prompts"], found["groups"]) == (
        "preference",
        4,
        3,  # case and white space apart, the first two are one prompt
        1,
    )
    assert found["pairs_per_prompt"] == {"mean": pytest.approx(4 / 3), "max": 2}
    assert found["choices"] == {"0": 2, "1": 1, "tie": 1}
    assert found["ties"] == 0.25
    assert {key: n for key, n in found["strengths"].items() if n} == {"1": 1, "5": 1, "7": 1}
    assert found["margins"]["rows"] == 1
    assert (found["weights"]["rows"], found["weights"]["max"]) == (4, 3.0)
    assert found["annotators"]["named_rows"] == 3
    assert found["annotators"]["top"] == [
        {"name": "ann", "rows": 2, "share": 0.5},
        {"name": "bo", "rows": 1, "share": 0.25},
    ]
    assert found["words"]["chosen"]["max"] == 3
    assert found["words"]["rejected"]["mean"] == 1
    assert found["agreement"]["units"] == 4
    json.dumps(found, allow_nan=False)


def test_only_the_busiest_annotators_are_listed() -> None:
    rows = [pair("q", "a", "b", Choice.TIE, annotator=f"n{n:02}") for n in range(30)]
    top = set_statistics(("f:1", row) for row in [*rows, rows[7]])["annotators"]["top"]
    assert len(top) == TOP_ANNOTATORS
    assert [entry["name"] for entry in top[:3]] == ["n07", "n00", "n01"]


def test_demonstrations_and_prompts_by_set() -> None:
    shown = Demonstration(prompt=prompt("a b", "g1", system="be kind"), output_text="x y z")
    found = data_statistics(
        {
            "demonstrations": lambda: [("f:1", shown)],
            "prompts": lambda: [("f:1", prompt("a", "g1")), ("f:2", prompt("b", "g2"))],
            "none": list,
        }
    )
    assert found["demonstrations"]["words"]["output"]["max"] == 3
    assert found["demonstrations"]["words"]["prompt"]["max"] == 4  # the system message included
    assert "agreement" not in found["demonstrations"]
    assert (found["prompts"]["kind"], found["prompts"]["groups"]) == ("prompt", 2)
    assert found["none"] == {"kind": "", "rows": 0, "prompts": 0, "groups": 0, "words": {}}


def test_lines_for_a_terminal() -> None:
    rows = [
        pair("one two", "a", "b", Choice.FIRST, annotator="ann", strength=1),
        pair("one two", "a", "b", Choice.FIRST, annotator="bo", strength=4),
        pair("three", "a a", "b", Choice.SECOND, annotator="ann", strength=9),
    ]
    found = data_statistics(
        {
            "pairs.jsonl": lambda: [("f:1", row) for row in rows],
            "none.jsonl": list,
        }
    )
    shown = lines(found)
    assert shown[0] == "pairs.jsonl: preference, 3 rows, 2 different prompts, 1 groups"
    assert shown[2].split() == ["prompt", "2", "1", "2", "2", "2", "2"]
    assert "    choices     2 candidate_0, 1 candidate_1, 0 ties; 1.5 pairs a prompt" in shown
    assert "    annotators  2 on 3 rows; the busiest, ann, on 2" in shown
    assert shown[-2] == (
        "    agreement   1 of 2 pairs judged more than once; 100 % of judgements equal, "
        "Krippendorff's alpha none: all judgements are the same, so that chance agrees too"
    )
    assert shown[-1] == "none.jsonl: nothing, 0 rows, 0 different prompts, 0 groups"


def test_lines_of_pairs_judged_once_and_of_disagreement() -> None:
    once = pair("q", "a", "b", Choice.FIRST)
    assert lines(data_statistics({"p": lambda: [("f:1", once)]}))[-1].endswith(
        "0 of 1 pairs judged more than once"
    )
    both = [once, pair("q", "a", "b", Choice.SECOND)]
    text = lines(data_statistics({"p": lambda: [("f:1", row) for row in both]}))[-1]
    assert text.endswith("0 % of judgements equal, Krippendorff's alpha 0.00")
