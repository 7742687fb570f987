from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import RunFolder
from amenable.data.content.report import content_report
from amenable.data.content.statistics import data_statistics
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.data.tokens.checks import finding
from amenable.data.tokens.figures import length_figures
from amenable.evaluate import data_labels, data_report, report
from amenable.evaluate.data_figures import histogram
from amenable.evaluate.histograms import Histogram, histogram_chart

Json = dict[str, Any]

HOSTILE = "</script><b>bold</b> <img src=x onerror=alert(1)> \u202e"


def prompt(number: int) -> Prompt:
    text = f"Which of {number} ways is the shortest one to the house? {HOSTILE}"
    return Prompt(messages=(Message(Speaker.USER, text),), id=f"p{number}", group=f"g{number}")


def judgements(each: int = 2, strength: bool = True) -> list[Preference]:
    """40 prompts, each judged by `each` people; every eighth prompt in opposite ways."""
    return [
        Preference(
            prompt=prompt(k),
            candidate_0="The left one, past the old mill.",
            candidate_1="Right.",
            choice=Choice.FIRST
            if (side := (k + (who if k % 8 == 0 else 0)) % 2)
            else Choice.SECOND,
            strength=(3 if side else 7) if strength else None,
            annotator=f"person {who} {HOSTILE}",
        )
        for k in range(40)
        for who in range(each)
    ]


@pytest.fixture(scope="module")
def full() -> Json:
    """A report with every key, its statistics and content made by the functions of the stage."""
    rows: dict[str, list[Any]] = {
        "demonstrations.train": [
            Demonstration(prompt=prompt(k), output_text="Left, then right.") for k in range(30)
        ],
        "preferences.train": [*judgements(), judgements()[0]],
        "prompts.train": [prompt(k) for k in range(30, 60)],
    }
    parts = {
        name: lambda found=found, name=name: (
            (f"{name}.jsonl:{n}", row) for n, row in enumerate(found, 1)
        )
        for name, found in rows.items()
    }
    lengths = [(f"id-{k}", 4 * k, min(4 * k, 64)) for k in range(40)]
    return {
        "read": {"demonstrations": 30, "preferences": 81, "prompts": 30},
        "source": {"task": "files", "files": {"preferences": ["pairs.jsonl"]}},
        "prompts_from": "prompts",
        "dropped": {"preferences: no choice": 3, "duplicate demonstrations": 1},
        "set_aside": {"demonstrations of held-out prompts": 7},
        "splits": {name: {"rows": len(found), "groups": 30} for name, found in rows.items()},
        "choices": {"0": 41, "1": 40},
        "notes": ["prompts.test has 3 rows, not the 400 of data.evaluation_rows"],
        "reading": {
            "preferences": {
                "records": 84,
                "rows": 81,
                "dropped": {"no choice": 3},
                "coerced": {"null read as absent": 5},
                "formats": {f"pairs-{k}-{HOSTILE}.jsonl": "native" for k in range(9)},
            }
        },
        "statistics": data_statistics(parts),
        "content": content_report(parts),
        "tokens": {
            "tokenizer": {"trained_eos": {"id": 2, "token": "<|im_end|>"}, "pad_is": ["unk"]},
            "limits": {"max_prompt_tokens": 64, "max_completion_tokens": 64},
            "kinds": {
                "preferences": {
                    "rows": 40,
                    "of": 80,
                    "prompt": length_figures(lengths, 64),
                    "completion": length_figures(lengths[:10], 64),
                    "ended": {"count": 30, "of": 40, "share": 0.75},
                    "pairs": {"of": 40, "one_cut": 9, "only_chosen_cut": 8, "only_rejected_cut": 1},
                }
            },
            "findings": [
                finding("eos_missing", "tokenizer", (), 1),
                finding(
                    "prompt_cut",
                    "prompts",
                    [("a", "Which way?")],
                    9,
                    limit=64,
                    tokens=8,
                    suggested=99,
                ),
                finding(
                    "prompt_cut", "preferences", [("b", "")], 9, limit=64, tokens=8, suggested=120
                ),
            ],
        },
    }


def page_of(found: object, root: Path) -> str:
    (root / "data").mkdir(parents=True, exist_ok=True)
    (root / "data/report.json").write_text(json.dumps(found), encoding="utf-8")
    report.render(RunFolder(root))
    return (root / "report.html").read_text(encoding="utf-8")


def words_of(html: str) -> str:
    body = re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_section_shows_what_was_read_split_labelled_and_found(full: Json, tmp_path: Path) -> None:
    html = page_of(full, tmp_path)
    assert '<a href="#data">Data</a>' in html
    assert 'id="data"' in html
    shown = words_of(html)
    for words in (
        "3 no choice",
        "5 null read as absent",
        "1 duplicate demonstrations",
        "7 demonstrations of held-out prompts",
        "3 more files",
        "not the 400 of data.evaluation_rows",
        "completions end with &lt;|im_end|&gt;",
        "40 of 80 rows were tokenized",
        "10 of 40 candidates lose their end-of-sequence token",
        "8 times the chosen",
        "duplicate rows",
        "Remove the copies",
        "Krippendorff",
        "Found nothing:",
        "prompts, in words",
    ):
        assert words in shown, words


def test_a_limit_is_marked_and_told(full: Json, tmp_path: Path) -> None:
    html = page_of(full, tmp_path)
    assert ">limit 64</text>" in html
    assert ">limit 64 →</text>" in html  # the completions end below it
    told = "23 of 40 (57.5\u00a0%) are cut at 64 and lose 1104 tokens, 35.4\u00a0% of all."
    assert told in html
    assert html.count(told) == 2  # in the caption, and read out with the chart
    assert "None is cut at 64." in html


def test_rows_stay_text(full: Json, tmp_path: Path) -> None:
    html = page_of(full, tmp_path)
    assert "&lt;/script&gt;&lt;b&gt;bold" in html
    assert html.count("</script>") == 1
    assert "<b>bold" not in html
    assert "<img" not in html
    assert "\u202e" not in html


def test_findings_are_ordered_and_gathered_by_name(full: Json) -> None:
    section = data_report.data_section(full)
    assert [row["level"] for row in section["findings"]][:2] == ["error", "warning"]
    assert all(row["level"] == "note" for row in section["remarks"])
    cut = next(row for row in section["findings"] if row["name"] == "prompt cut")
    assert len(cut["cases"]) == 2
    assert cut["examples"] == [("a", "Which way?"), ("b", "")]
    assert len(cut["remedies"]) == 1, "the highest of the suggested limits serves both"
    assert "(120 would cut at most 1 %)" in cut["remedies"][0]
    levels = [f["level"] for part in ("tokens", "content") for f in full[part]["findings"]]
    facts = dict(section["facts"])
    assert facts["errors and warnings"] == sum(level != "note" for level in levels)
    assert facts["notes"] == levels.count("note")
    assert facts["left out"] == 4


def test_dropped_rows_are_told_once(full: Json) -> None:
    section = data_report.data_section(full)
    assert section["reading"][0]["dropped"] == [("no choice", 3)]
    assert section["left_out"] == [("duplicate demonstrations", 1)]


@pytest.mark.parametrize(
    ("alpha", "reading"),
    [(1.0, "firm"), (0.8, "firm"), (0.79, "tentative"), (0.667, "tentative"), (0.66, "low"),
     (-0.2, "low")],
)  # fmt: skip
def test_alpha_is_read_by_krippendorffs_bounds(alpha: float, reading: str) -> None:
    assert data_labels.alpha_reading(alpha) == reading


def test_agreement_of_named_annotators(full: Json) -> None:
    """35 of 40 pairs are judged alike by both, 5 in opposite ways; 45 choices against 35.

    alpha = 1 - (80 - 1) · (5 · 2) / (2 · 45 · 35) = 0.749
    """
    (row,) = data_labels.agreement_rows(full)
    assert row["judged_twice"] == 40
    assert row["pairwise"] == pytest.approx(35 / 40)
    assert [alpha["of"].split(",")[0] for alpha in row["alphas"]] == [
        "choices", "strengths", "strengths"
    ]  # fmt: skip
    assert row["alphas"][0]["value"] == pytest.approx(0.749, abs=1e-3)
    assert row["alphas"][0]["reading"] == "tentative"
    assert data_labels.busiest(full)["distinct"] == 2


def test_an_undefined_alpha_says_why(tmp_path: Path) -> None:
    once = {"preferences.train": lambda: ((str(n), row) for n, row in enumerate(judgements(1)))}
    html = page_of({"statistics": data_statistics(once)}, tmp_path)
    assert "undefined: no pair was judged by two annotators" in html


def test_an_alpha_of_few_pairs_is_not_read(full: Json) -> None:
    few = copy.deepcopy(full)
    few["statistics"]["preferences.train"]["agreement"]["choice"]["units"] = 8
    (row,) = data_labels.agreement_rows(few)
    assert row["alphas"][0]["reading"] == "from 8 pairs only: too few to read"


def test_strengths_are_drawn_where_there_are_any(full: Json) -> None:
    figure = data_report.data_section(full)["strengths"]
    assert "81 rows say how sure" in figure.here
    light = {"statistics": {"preferences.train": {"choices": {"0": 1}, "strengths": {}}}}
    assert data_report.data_section(light)["strengths"] is None


@pytest.mark.parametrize(("second", "shown"), [(0, None), (3, 0.25)])
def test_choices_that_are_all_one_side_have_no_p(second: int, shown: float | None) -> None:
    """A file that names a chosen text first has no bias of position, however small its p."""
    name = "preferences.train"
    found = {
        "statistics": {name: {"choices": {"0": 100, "1": second, "tie": 2}}},
        "content": {"measures": {name: {"position": {"share": 1.0, "rows": 100, "p": 0.25}}}},
    }
    (row,) = data_labels.label_rows(found)
    assert row["p"] == shown


def test_captions_hold_for_every_split_and_reason(full: Json, tmp_path: Path) -> None:
    limited = {**full, "set_aside": {"preferences beyond max_preferences": 7}}
    html = page_of(limited, tmp_path)
    assert "so that nothing held out" not in html
    assert "Set aside, in no split:" in html
    assert "prompts.collect and prompts.train overlap" in html


def test_a_run_of_before_has_its_counts(tmp_path: Path) -> None:
    """The keys that were written before reading, statistics, content and tokens were."""
    old = {
        "source": {"task": "docstrings", "files": {}, "packages": {"json": "1", "ast": "2"}},
        "prompts_from": "demonstrations",
        "read": {"demonstrations": 12, "preferences": 3},
        "dropped": {}, "set_aside": {"demonstrations of held-out prompts": 2},
        "choices": {"0": 2, "tie": 1},
        "splits": {"demonstrations.train": {"rows": 9, "groups": 8, "words": {
            "prompt": {"min": 1, "p10": 2, "p50": 31, "p90": 77, "p99": 90, "max": 91}}}},
        "notes": [],
    }  # fmt: skip
    shown = words_of(page_of(old, tmp_path))
    for words in ("docstrings of the standard library and of 2 installed", "prompt 31 (2–77)",
                  "2 demonstrations of held-out", "all preferences"):  # fmt: skip
        assert words in shown
    for words in ("Findings", "Krippendorff", "limit", "No check"):
        assert words not in shown


def test_no_report_has_no_section(tmp_path: Path) -> None:
    report.render(RunFolder(tmp_path))
    assert "#data" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def paths_of(found: object, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield here
    entries: Any = ()
    if isinstance(found, dict):
        entries = found.items()
    elif isinstance(found, list):
        entries = enumerate(found[:2])
    for key, value in entries:
        yield from paths_of(value, (*here, key))


JUNK: tuple[Any, ...] = (None, True, -3, 1e999, 10**400, "text", ["x", None, 7], {"a": {"b": []}})


def test_no_value_of_another_type_stops_the_page(full: Json, tmp_path: Path) -> None:
    """Each place in the report in turn holds something else; all are gathered, some drawn."""
    for number, path in enumerate(list(paths_of(full))[1:]):
        broken = copy.deepcopy(full)
        at: Any = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = JUNK[number % len(JUNK)]
        data_report.data_section(broken)
        if number % 25 == 0:
            page_of(json.loads(json.dumps(broken)), tmp_path)


def test_page_stays_small_whatever_is_found(full: Json, tmp_path: Path) -> None:
    crowded = copy.deepcopy(full)
    first = crowded["content"]["findings"][0]
    crowded["content"]["findings"] = [
        {**first, "sets": [f"s{k}"], "text": "x" * 5000, "means": "m" * 5000} for k in range(400)
    ]
    crowded["dropped"] = {f"reason {k} {'y' * 900}": 1 for k in range(3000)}
    crowded["notes"] = ["z" * 4000] * 3000
    crowded["reading"]["preferences"]["formats"] = {f"{'f' * 900}{k}": "n" for k in range(9000)}
    assert len(page_of(crowded, tmp_path).encode()) < 400_000


# Histograms ----------------------------------------------------------------------------------


def test_histograms_of_both_shapes_are_read() -> None:
    by_edges = histogram({"edges": [0, 1, 4], "counts": [1, 2, 3]})
    assert by_edges == Histogram((0, 1, 4), (1, 2, 3))
    assert by_edges is not None
    assert [by_edges.range_of(k) for k in range(3)] == ["0", "1 to 3", "4 or more"]
    by_width = histogram({"width": 5, "counts": [1, 2]})
    assert by_width == Histogram((0, 5), (1, 2), 10)
    assert by_width is not None
    assert by_width.range_of(1) == "5 to 9"
    wrong: object
    for wrong in ({"edges": [0, 0], "counts": [1, 2]}, {"counts": [1]}, {"edges": [0]}, [], None):
        assert histogram(wrong) is None


def test_bins_above_the_last_one_shown_are_counted_in_it() -> None:
    bins = Histogram((0, 5, 10, 15), (1, 2, 3, 4), 20)
    assert bins.between(1, 2) == Histogram((5, 10), (2, 7))
    assert Histogram((0, 5, 10), (1, 2, 0), 15).between(0, 1) == Histogram((0, 5), (1, 2), 10)
    assert bins.between(0, 3) == bins


def test_only_histograms_of_the_same_edges_are_added() -> None:
    assert Histogram((0, 2), (1, 2)) + Histogram((0, 2), (3, 4)) == Histogram((0, 2), (4, 6))
    with pytest.raises(ValueError, match="different edges"):
        Histogram((0, 2), (1, 2)) + Histogram((0, 3), (3, 4))


def test_a_chart_reads_out_its_figures_and_colours_what_is_cut() -> None:
    bins = Histogram((0, 10, 20), (5, 3, 2), 30)
    chart = histogram_chart("Lengths", [("rows", bins)], x_label="tokens", spoken="Half.", limit=14)
    assert 'aria-label="Lengths. Half."' in chart
    assert chart.count("<rect") == 4, "the bin of the limit is drawn in two parts"
    assert chart.index('class="s1"') < chart.index('class="s2"')
    assert "10 to 19 tokens" in chart
    assert "rows 3 (30.0 %)" in chart
    whole = histogram_chart("Lengths", [("rows", bins)], x_label="tokens", limit=99)
    assert 'class="s2"' not in whole
    assert histogram_chart("Lengths", [("rows", Histogram((0,), (0,)))], x_label="tokens") == ""


def test_outlines_have_a_legend() -> None:
    one, two = Histogram((0, 1), (1, 3)), Histogram((0, 1), (8, 8))
    chart = histogram_chart("Words", [("chosen", one), ("<b>", two)], x_label="words")
    assert ">chosen</text>" in chart
    assert ">&lt;b&gt;</text>" in chart
    assert "<rect" not in chart
