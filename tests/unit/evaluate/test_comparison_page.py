"""The page of `amenable compare`: the figures of its JSON, its words, its size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from amenable.evaluate.comparison_page import bias_in_words, outcomes, page, render
from amenable.evaluate.pages import at_pointer, pointer_part

Build = Callable[..., dict[str, Any]]

THREE = ("base", "a/b~c", "best.of")
"""Names that a JSON Pointer must escape, or that a dotted key would cut."""


class Figures(HTMLParser):
    """Key, style, raw value and text of every figure, and the page's text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, float, str]] = []
        self.text = ""
        self._open: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "data":
            self._open = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open is not None:
            own, self._open = self._open, None
            key, style = str(own["data-key"]), str(own["data-style"])
            self.found.append((key, style, float(str(own["value"])), data))


def words(html: str) -> str:
    return " ".join(Figures(html).text.split())


def made(folder: Path) -> str:
    render(folder)
    return (folder / "comparison.html").read_text(encoding="utf-8")


def resolved(document: Any, pointer: str) -> Any:
    """RFC 6901, by its own words."""
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def test_every_figure_equals_the_json(tmp_path: Path, build_comparison: Build) -> None:
    build_comparison(tmp_path, systems=THREE, judges=("gpt-4.1", "org/judge"))
    html = made(tmp_path)
    result = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    figures = Figures(html).found
    for key, style, value, text in figures:
        assert resolved(result, key) == value
        shown = text.replace("−", "-").replace("\u202f", "").replace("\u00a0", " ")
        if style in ("percent", "bare", "points"):
            assert float(shown.split()[0]) == pytest.approx(100 * value, abs=0.0501)
        elif style == "p":
            assert (
                shown == "< 0.001"
                if value < 0.001
                else float(shown) == pytest.approx(value, abs=5e-4)
            )
        else:
            assert float(shown.split()[0]) == pytest.approx(
                value, abs=0.0501 if style == "one" else 5.01e-4
            )
    missing = every_figure(result) - {key for key, *_ in figures}
    assert {re.sub(r"\d+", "N", key) for key in missing} == {
        "/comparisons/N/prompts",  # but for the first
        "/comparisons/N/bias/longer_prompts",
    }


def every_figure(document: Any, key: str = "") -> set[str]:
    """Pointers of all numbers."""
    if isinstance(document, bool) or document is None or isinstance(document, str):
        return set()
    if isinstance(document, int | float):
        return {key}
    items = document.items() if isinstance(document, dict) else enumerate(document)
    return {
        found
        for name, value in items
        for found in every_figure(value, f"{key}/{pointer_part(str(name))}")
    }


def test_a_pointer_to_nothing_is_none() -> None:
    document = {"a~b/c": [{"d": 1}]}
    assert at_pointer(document, "/a~0b~1c/0/d") == 1
    for pointer in ("/a~0b~1c/1/d", "/a~0b~1c/x", "/b", "/a~0b~1c/0/d/e"):
        assert at_pointer(document, pointer) is None


def test_two_systems_lead_with_their_win_rate(tmp_path: Path, build_comparison: Build) -> None:
    result = build_comparison(tmp_path)
    rate = f"{100 * result['comparisons'][0]['win_rate']:.1f} %"
    text = words(made(tmp_path))
    assert f"tuned was preferred to base on {rate} of the prompts" in text
    assert "Ranking" not in text
    for heading in ("Judges", "Slices", "Diversity", "Samples", "Calls"):
        assert heading in text


@pytest.mark.parametrize(
    ("interval", "equal", "told"),
    [
        ((0.52, 0.6), (0.51, 0.6), "by this judge tuned is better"),
        ((0.52, 0.6), (0.45, 0.6), "length explains a part"),
        ((0.4, 0.48), (0.3, 0.4), "by this judge tuned is worse"),
        ((0.48, 0.57), (0.4, 0.6), "covers 50: not significant"),
    ],
)
def test_the_headline_reads_the_intervals(
    tmp_path: Path,
    build_comparison: Build,
    interval: tuple[float, float],
    equal: tuple[float, float],
    told: str,
) -> None:
    result = build_comparison(tmp_path, prompts=12)
    result["comparisons"][0] |= {
        "win_rate_ci95": list(interval),
        "length_controlled_ci95": list(equal),
    }
    (tmp_path / "comparison.json").write_text(json.dumps(result))
    text = words(made(tmp_path))
    assert told in text
    assert ("length explains a part" in text) == (told == "length explains a part")


def test_three_systems_lead_with_the_ranking(tmp_path: Path, build_comparison: Build) -> None:
    result = build_comparison(tmp_path, systems=("base", "tuned", "best"), prompts=80)
    assert [row["system"] for row in result["rankings"]["gpt-4.1"]] == ["best", "tuned", "base"]
    lead = next(row for row in result["comparisons"] if (row["a"], row["b"]) == ("tuned", "best"))
    for low, told in (
        (0.51, "best ranks first of 3 systems Of"),
        (0.49, "systems, but not clearly"),
    ):
        lead["win_rate_ci95"] = [low, 0.8]
        (tmp_path / "comparison.json").write_text(json.dumps(result))
        assert told in words(made(tmp_path))


def test_an_audit_corrects_or_says_that_it_cannot(tmp_path: Path, build_comparison: Build) -> None:
    result = build_comparison(tmp_path, prompts=12)
    row = result["comparisons"][0]
    for value, interval, told in (
        (0.555, [0.4, 0.7], "on the audited rows it is 55.5 % (40.0 to 70.0 %)"),
        (None, None, "no better than chance on the audited rows"),
    ):
        row |= {"corrected_win_rate": value, "corrected_ci95": interval}
        (tmp_path / "comparison.json").write_text(json.dumps(result))
        assert told in words(made(tmp_path))


def test_open_questions_and_invalid_replies_are_told(
    tmp_path: Path, build_comparison: Build
) -> None:
    result = build_comparison(
        tmp_path, prompts=12, unanswered={f"reason {n} <b>": 2 for n in range(7)}
    )
    result["comparisons"][0]["invalid"] = 0.0625
    (tmp_path / "comparison.json").write_text(json.dumps(result))
    looks = (tmp_path / "looks.jsonl").read_text().splitlines()
    (tmp_path / "looks.jsonl").write_text("\n".join(looks[:6] + looks[9:]))
    html = made(tmp_path)
    text = words(html)
    assert "2 reason 0 <b>" in text
    assert "2 more reasons are in" in text
    assert "gave no verdict in 6.3 %" in text.replace("6.2 %", "6.3 %")
    assert "no reply" in text, "of a pair that was never shown"
    assert "no verdict in each of the orders" in text, "of a pair shown in one order"


def entry(judge: str = "m", **changed: Any) -> dict[str, Any]:
    bias = {
        "first_wins_ci95": [0.48, 0.52],
        "flips": 0.05,
        "longer_wins": 0.5,
        "longer_wins_ci95": [0.4, 0.6],
    }
    return {"judge": judge, "invalid": changed.pop("invalid", 0.0), "bias": bias | changed}


@pytest.mark.parametrize(
    ("changed", "figure", "told"),
    [
        ({}, "first_wins", "Good: no liking for a place"),
        ({"first_wins_ci95": [0.51, 0.6]}, "first_wins", "shown first"),
        ({"first_wins_ci95": [0.3, 0.4]}, "first_wins", "shown second"),
        ({}, "flips", "Good: few"),
        ({"flips": 0.1}, "flips", "Some verdicts"),
        ({"flips": 0.25}, "flips", "Bad: many"),
        ({}, "longer_wins", "Good: no liking for a length"),
        ({"longer_wins_ci95": [0.51, 0.6]}, "longer_wins", "longer answer wins more often"),
        ({"longer_wins_ci95": [0.3, 0.4]}, "longer_wins", "shorter answer wins more often"),
        ({"longer_wins": None, "longer_wins_ci95": None}, "longer_wins", "of equal length"),
        ({}, "invalid", "Good: every reply"),
        ({"invalid": 0.05}, "invalid", "Few"),
        ({"invalid": 0.0501}, "invalid", "Bad: so many"),
        ({"judge": "people", "flips": 0.5}, "flips", "says nothing of people"),
        ({"judge": "people"}, "first_wins", "says nothing of people"),
    ],
)
def test_a_bias_is_put_in_words(changed: dict[str, Any], figure: str, told: str) -> None:
    assert told in bias_in_words(entry(**changed))[figure]


def looks(judge: str, *verdicts: str) -> list[dict[str, Any]]:
    """Of one prompt: a is shown first, then b."""
    return [
        {"judge": judge, "a": "A", "b": "B", "id": "p", "first": first, "verdict": verdict,
         "confidence": 0.75, "reply": "because"}
        for first, verdict in zip("AB", verdicts, strict=False)
    ] + [
        {"judge": judge, "a": "A", "b": "B", "id": "other", "first": first, "verdict": "tie",
         "confidence": None, "reply": ""}
        for first in "AB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "margin", "contradicts", "told"),
    [
        (("second", "first"), 0.5, False, "B won in both orders"),
        (("first", "second"), -0.5, False, "A won in both orders"),
        (("first", "first"), 0, True, "contradicts itself: whichever is shown first"),
        (("second", "second"), 0, True, "contradicts itself: whichever is shown second"),
        (("tie", "both-bad"), 0, False, "a tie in both orders"),
        (("both-bad", "both-bad"), 0, False, "both bad"),
        (("tie", "first"), 0.25, False, "B won in one order, a tie in the other"),
        (("first", "tie"), -0.25, False, "A won in one order, a tie in the other"),
        (("invalid", "first"), None, False, "no verdict in each of the orders"),
        (("first",), None, False, "no verdict in each of the orders"),
    ],
)
def test_an_outcome_takes_both_orders_together(
    verdicts: tuple[str, ...], margin: float | None, contradicts: bool, told: str
) -> None:
    found = outcomes(looks("m", *verdicts))["m", "A", "B"]["p"]
    assert (found.margin, found.contradicts, found.words) == (margin, contradicts, told)
    assert len(found.looks) == len(verdicts)


def test_a_look_says_who_came_first_and_who_is_better() -> None:
    first, second = outcomes(looks("m", "second", "second"))["m", "A", "B"]["p"].looks
    assert first.heading == "A shown first: B is better, 75.0\u00a0% for A"
    assert second.heading == "B shown first: A is better, 75.0\u00a0% for B"
    (told,) = outcomes(looks("people", "second", "first"))["people", "A", "B"]["p"].looks
    assert told.heading.startswith("B is better"), "one row of the sheet answers both orders"


def test_five_thousand_prompts_stay_under_three_megabytes(
    tmp_path: Path, build_comparison: Build
) -> None:
    """Long replies of two judges on three systems: most prompts do not fit, and it says so."""
    result = build_comparison(tmp_path, systems=("base", "tuned", "best"), judges=("m", "n"))
    rows, said = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("completions.jsonl", "looks.jsonl")
    )
    rows = [row | {"id": f"{row['id']}-{k}"} for k in range(84) for row in rows][:5000]
    said = [
        look | {"id": f"{look['id']}-{k}", "reply": look["reply"] * 8}
        for k in range(84)
        for look in said
    ]
    html = page(result, rows, said)
    assert 2_000_000 < len(html.encode()) < 3_000_000
    shown = html.count("<li data-margins")
    told = re.search(r"The first (\S+) of 5\u202f000 prompts fit this page; all are in", html)
    assert told is not None
    assert int(told[1]) == shown
    assert page(result, rows, said) == html, "the same files give the same bytes"


def test_slices_beyond_the_limit_are_counted(tmp_path: Path, build_comparison: Build) -> None:
    result = build_comparison(tmp_path, prompts=40)
    row = result["comparisons"][0]
    row["slices"] = row["slices"][:1] * 310
    row["slices"][305:] = [row["slices"][0] | {"p_holm": 0.01}] * 5
    (tmp_path / "comparison.json").write_text(json.dumps(result))
    text = words(made(tmp_path))
    assert "(5 of 310 hold)" in text
    assert "10 more are in comparison.json" in text


def test_no_text_can_leave_its_place(tmp_path: Path, build_comparison: Build) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e"
    build_comparison(tmp_path, systems=("base", hostile, "best"), judges=(hostile,), prompts=12)
    for name in ("completions.jsonl", "looks.jsonl"):
        path = tmp_path / name
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(own(row, hostile)) + "\n" for row in rows))
    html = made(tmp_path)
    assert html.count("<script") == 1
    assert "<img" not in html
    assert "\u202e" not in re.sub(r' data-key="[^"]*"', "", html)
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert "default-src &#39;none&#39;" in html


def own(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row with the text in all of its free places."""
    if "reply" in row:
        return {**row, "reply": text}
    texts = {name: f"{text} {n}" for n, name in enumerate(row["completions"])}
    return {**row, "input_text": text, "completions": texts}
