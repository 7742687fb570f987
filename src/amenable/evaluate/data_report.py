"""What the data section shows, gathered from `data/report.json`: read, split, labelled, found.

Every key may be missing: older and lighter runs write fewer. Nothing here reads a row again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from amenable.evaluate import data_figures, data_labels
from amenable.evaluate.data_figures import KINDS
from amenable.evaluate.lenient import Json, counts, number, table, tables, text, texts, whole

FILES, REASONS, CASES, EXAMPLES = 6, 30, 12, 12
"""Most that is listed of each before the rest is counted; chosen here to fit a screen."""

LEVELS = ("error", "warning", "note")

PARTS = ("train", "validation", "collect", "test")

TEXTS = {"output_text": "answer", "output": "answer"}
"""Texts of a row by the name that the page gives them."""


def data_section(report: Json) -> Json:
    """Every part of the section as plain values and charts; empty where there is no report."""
    if not report:
        return {}
    findings = finding_rows(report)
    return {
        "facts": facts(report, findings),
        "reading": reading_rows(report),
        "origin": origin(report),
        "left_out": left_out(report)[:REASONS],
        "set_aside": counts(report.get("set_aside"))[:REASONS],
        "splits": split_rows(report),
        "notes": texts(report.get("notes")),
        "tokenizer": tokenizer(report),
        "token_figures": data_figures.token_figures(report),
        "token_notes": token_notes(report),
        "word_figures": data_figures.word_figures(report),
        "lengths": length_rows(report),
        "labels": data_labels.label_rows(report),
        "strengths": data_figures.strength_figure(report),
        "number_notes": data_labels.number_notes(report),
        "agreement": data_labels.agreement_rows(report),
        "annotators": data_labels.busiest(report),
        "checked": bool(table(report, "content") or table(report, "tokens")),
        "findings": [row for row in findings if row["level"] != "note"],
        "remarks": [row for row in findings if row["level"] == "note"],
        "clean": [in_words(name) for name in texts(table(report, "content").get("clean"), 60)],
    }


def in_words(name: str) -> str:
    """A key of the reports as words."""
    return name.replace("_", " ")


def facts(report: Json, findings: list[Json]) -> list[tuple[str, int]]:
    """The figures at the head of the section."""
    reading = table(report, "reading")
    by_kind = {**table(report, "read"), **{kind: table(reading, kind) for kind in reading}}
    read = [whole(one.get("rows") if isinstance(one, dict) else one) for one in by_kind.values()]
    found = [
        ("rows read", sum(read)),
        ("left out", sum(count for _, count in counts(report.get("dropped")))),
        ("set aside", sum(count for _, count in counts(report.get("set_aside")))),
    ]
    if table(report, "content") or table(report, "tokens"):
        # One finding of the report is one check on one set.
        levels = [case["level"] for row in findings for case in row["cases"]]
        found += [
            ("errors and warnings", sum(level != "note" for level in levels)),
            ("notes", levels.count("note")),
        ]
    return found


# Reading -------------------------------------------------------------------------------------


def reading_rows(report: Json) -> list[Json]:
    """Of each kind of row: files with their formats, records, rows, and what did not go smoothly.

    Runs without `reading` have files and rows only.
    """
    reading, files = table(report, "reading"), table(report, "source", "files")
    read = table(report, "read")
    kinds = list(reading) or [kind for kind in read if whole(read[kind]) and files.get(kind)]
    return [_reading_row(kind, table(reading, kind), report) for kind in kinds]


def _reading_row(kind: str, found: Json, report: Json) -> Json:
    formats = [(text(file), text(name, 60)) for file, name in table(found, "formats").items()]
    formats = formats or [(file, "") for file in texts(table(report, "source", "files").get(kind))]
    rows = found.get("rows", table(report, "read").get(kind))
    return {
        "kind": in_words(kind),
        "files": formats[:FILES],
        "more_files": formats[FILES:200],
        "uncounted": max(0, len(formats) - 200),
        "records": found.get("records"),
        "rows": rows,
        "dropped": counts(found.get("dropped"))[:REASONS],
        "coerced": counts(found.get("coerced"))[:REASONS],
        "known": bool(found),
    }


def origin(report: Json) -> str:
    """Where rows came from that no file holds, and where the prompts came from, in a sentence."""
    source = table(report, "source")
    found = []
    if source.get("task") == "docstrings":
        packages = len(table(source, "packages"))
        found.append(
            "Demonstrations are the built-in task: docstrings of the standard library and of "
            f"{packages} installed packages."
            if packages
            else "Demonstrations are the built-in task: docstrings of installed packages."
        )
    if report.get("prompts_from") in ("demonstrations", "preferences"):
        found.append(
            f"No file of prompts was named: the prompts are those of the {report['prompts_from']}."
        )
    return " ".join(found)


def left_out(report: Json) -> list[tuple[str, int]]:
    """Reasons for which rows were dropped after they were read."""
    reading = table(report, "reading")
    told = {f"{kind}: {why}" for kind in reading for why in table(reading, kind, "dropped")}
    return [(why, count) for why, count in counts(report.get("dropped")) if why not in told]


# Splits --------------------------------------------------------------------------------------


def split_rows(report: Json) -> list[Json]:
    """Of each split: rows, different prompts, groups, and the lengths of its texts in words."""
    splits, statistics = table(report, "splits"), table(report, "statistics")
    names = sorted({**splits, **statistics}, key=_order)
    return [_split_row(name, splits.get(name), table(statistics, name)) for name in names]


def _order(name: str) -> tuple[int, int, str]:
    kind, _, part = name.partition(".")
    return (
        KINDS.index(kind) if kind in KINDS else len(KINDS),
        PARTS.index(part) if part in PARTS else len(PARTS),
        name,
    )


def _split_row(name: str, described: object, statistics: Json) -> Json:
    found = {**({"rows": described} if isinstance(described, int) else table(described))}
    found = {**found, **statistics}
    return {
        "name": text(name, 60),
        "rows": number(found.get("rows")),
        "prompts": number(found.get("prompts")),
        "groups": number(found.get("groups")),
        "words": [
            (TEXTS.get(key, key), number(lengths.get("p10")), middle, number(lengths.get("p90")))
            for key, lengths in _words(found)
            if (middle := number(lengths.get("p50"))) is not None
        ],
    }


def _words(found: Json) -> Iterator[tuple[str, Json]]:
    words = table(found, "words")
    return ((key, table(words, key)) for key in words)


def length_rows(report: Json) -> list[Json]:
    """Every text of every split in words, and of every kind in tokens, by percentiles."""
    columns = ("p10", "p50", "p90", "p99", "max")
    found = []
    statistics = table(report, "statistics")
    for name in sorted(statistics, key=_order):
        for key, lengths in _words(table(statistics, name)):
            label = f"{text(name, 60)}, {TEXTS.get(key, key)}"
            found.append(
                {
                    "name": label,
                    "unit": "words",
                    "values": [number(lengths.get(c)) for c in columns],
                }
            )
    kinds = table(report, "tokens", "kinds")
    for kind in kinds:
        for key in ("prompt", "completion"):
            lengths = table(kinds, kind, key)
            if lengths:
                values = [number(lengths.get(c)) for c in columns]
                found.append(
                    {"name": f"{text(kind, 60)}, {key}", "unit": "tokens", "values": values}
                )
    return found


# Tokens --------------------------------------------------------------------------------------


def tokenizer(report: Json) -> str:
    """The special tokens that matter to training, in a sentence; empty where they are not known."""
    found = table(report, "tokens", "tokenizer")
    if not found:
        return ""
    template = "with its chat template" if found.get("chat_template") else "without a chat template"
    parts = [f"The base model’s tokenizer, {template}"]
    trained = text(table(found, "trained_eos").get("token"), 60)
    if trained:
        parts.append(f"completions end with {trained}")
    pad = text(table(found, "pad").get("token"), 60)
    if pad:
        also = " and ".join(texts(found.get("pad_is"), 20))
        parts.append(f"padding is {pad}" + (f", which is also {also}" if also else ""))
    return "; ".join(parts) + "."


def token_notes(report: Json) -> list[str]:
    """What the limits leave of the ends, and which side of a pair loses it."""
    found = []
    kinds = table(report, "tokens", "kinds")
    for kind in kinds:
        facts_of = table(kinds, kind)
        rows, of = whole(facts_of.get("rows")), whole(facts_of.get("of"))
        if rows < of:
            found.append(f"{kind}: {rows} of {of} rows were tokenized, drawn by their ids.")
        ended = table(facts_of, "ended")
        kept, answers = whole(ended.get("count")), whole(ended.get("of"))
        if kept < answers:
            found.append(
                f"{kind}: {answers - kept} of {answers} {data_figures.ANSWERS.get(kind, 'answers')}"
                " lose their end-of-sequence token to the limit; they show how to go on, not how "
                "to stop."
            )
        pairs = table(facts_of, "pairs")
        if whole(pairs.get("one_cut")):
            found.append(
                f"{kind}: in {whole(pairs.get('one_cut'))} of {whole(pairs.get('of'))} pairs one "
                f"side alone is cut ({whole(pairs.get('only_chosen_cut'))} times the chosen, "
                f"{whole(pairs.get('only_rejected_cut'))} times the rejected one); if these differ "
                "much, the missing end gives the choice away."
            )
    return found


# Findings ------------------------------------------------------------------------------------


def finding_rows(report: Json) -> list[Json]:
    """Findings of content and tokens by name, errors first, then warnings; one case a set."""
    by_name: dict[tuple[int, str], list[Json]] = {}
    for source in ("tokens", "content"):
        for one in tables(table(report, source).get("findings")):
            level = one.get("level") if one.get("level") in LEVELS else "note"
            rank = LEVELS.index(str(level))
            by_name.setdefault((rank, text(one.get("name"), 60)), []).append(one)
    ordered = sorted(by_name.items(), key=lambda pair: pair[0][0])
    return [_finding_row(LEVELS[rank], name, cases) for (rank, name), cases in ordered]


def _finding_row(level: str, name: str, cases: list[Json]) -> Json:
    remedies = _distinct(text(case.get("try"), 600) for case in cases)
    # A row that is in several sets is shown once.
    examples = list(dict.fromkeys(one for case in cases for one in _examples(case.get("examples"))))
    return {
        "level": level,
        "name": in_words(name),
        "cases": [{"text": text(case.get("text"), 600), "level": level} for case in cases],
        "hidden_cases": max(0, len(cases) - CASES),
        "means": text(cases[0].get("means"), 600),
        "remedies": remedies[:CASES],
        "examples": examples[:EXAMPLES],
        "hidden_examples": max(0, len(examples) - EXAMPLES),
    }


def _distinct(remedies: Iterable[str]) -> list[str]:
    """Each remedy once; of those that differ in numbers alone, the one with the largest.

    The numbers are suggested limits: the largest serves all sets.
    """
    largest: dict[str, tuple[list[int], str]] = {}
    for remedy in filter(None, remedies):
        numbers = [int(digits[:18]) for digits in re.findall("[0-9]+", remedy)]
        kind = re.sub("[0-9]+", "0", remedy)
        largest[kind] = max((numbers, remedy), largest.get(kind, (numbers, remedy)))
    return [remedy for _, remedy in largest.values()]


def _examples(found: object) -> Iterator[tuple[str, str]]:
    """Place and text of each example; the token report gives ids alone."""
    for one in found if isinstance(found, list) else []:
        if isinstance(one, str):
            yield text(one, 200), ""
        elif isinstance(one, dict) and text(one.get("place")):
            yield text(one.get("place"), 200), text(one.get("text"), 300)
