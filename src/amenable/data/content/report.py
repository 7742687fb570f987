"""The check of content: what in the rows predicts trouble in training, with examples and remedies.

Every set is read once, and its beginning once more where examples must be looked up. Of each row
only numbers are kept: measured, 115 MB a million preference rows at the peak, and 240 MB for the
samples however many the rows (`benchmarks/content.py`). Near duplicates and the distance between
sets are measured on the prompts of smallest hash, so that nothing depends on the order of rows.

What it does not see: whether an answer is true or good, paraphrases, and anything in the meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from amenable.data.content.columns import HeldOutPrompts, SetColumns
from amenable.data.content.findings import EXPLANATIONS, Draft, Finding, example
from amenable.data.content.label_findings import label_findings
from amenable.data.content.near_duplicates import HashSample
from amenable.data.content.row_findings import row_findings
from amenable.data.content.set_findings import compare_sets, near_findings
from amenable.data.content.statistics import Part, prompt_of

Json = dict[str, Any]

SAMPLE = 20_000
"""Prompts of each set among which near duplicates are looked for; chosen here: seconds, not
minutes, and exact copies are looked for among all."""


def content_report(
    parts: Mapping[str, Part],
    *,
    held_out: Collection[str] | None = None,
    policy: str | None = None,
    sample: int = SAMPLE,
) -> Json:
    """Findings and measures of named sets of rows, for the report of a check.

    Args:
        parts: name to a function that gives a fresh iterator of (place, row), as
            ("pairs.jsonl:17", preference); rows of one set are of one kind.
        held_out: names of the sets that nothing may be trained on; None: `evaluation_prompts` and
            names that end in `.test`.
        policy: name of the set of prompts that the policy trains on, which other sets are compared
            with; None: `prompts` or `prompts.train`, where there is one.
        sample: most prompts of each set among which near duplicates are looked for.

    Returns:
        `sets`: rows, distinct prompts and sampled prompts by set. `findings`: warnings first; see
        `Finding.to_json`. `warnings`, `notes`: how many. `measures`: of preferences `longest_wins`,
        `longest_wins_characters` and `position`; `overlap` (shared prompts of each two sets) and
        `distance` (each set from the policy's). `clean`: names of checks that found nothing.
    """
    held = {name for name in parts if _is_held_out(name)} if held_out is None else set(held_out)
    columns = _read(parts, held, sample)
    policy = _policy(columns) if policy is None else policy
    drafts: list[Draft] = []
    measures: Json = {}
    for name, rows in columns[0].items():
        drafts += row_findings(rows)
        if len(rows.judgements):
            found, measures[name] = label_findings(rows)
            drafts += found
    compared, between = compare_sets(columns[0], held, policy)
    drafts += compared
    drafts += near_findings(columns[0], held, columns[1])
    findings = sorted(_with_examples(drafts, parts), key=lambda found: found.level != "warning")
    seen = {finding.name for finding in findings}
    return {
        "sets": {name: _describe(rows, sample) for name, rows in columns[0].items()},
        "warnings": sum(found.level == "warning" for found in findings),
        "notes": sum(found.level == "note" for found in findings),
        "findings": [finding.to_json() for finding in findings],
        "measures": {**measures, **between},
        "clean": [name for name in EXPLANATIONS if name not in seen],
    }


def _is_held_out(name: str) -> bool:
    return name == "evaluation_prompts" or name.endswith(".test")


def _policy(columns: tuple[dict[str, SetColumns], HeldOutPrompts]) -> str | None:
    return next((name for name in ("prompts", "prompts.train") if name in columns[0]), None)


def _read(
    parts: Mapping[str, Part], held: Collection[str], sample: int
) -> tuple[dict[str, SetColumns], HeldOutPrompts]:
    """The columns of every set, held-out ones read first, so that the others can be searched."""
    columns = {name: SetColumns(name, HashSample(sample)) for name in parts}
    index = HeldOutPrompts()
    for name in parts:
        if name in held:
            for place, item in parts[name]():
                columns[name].add(place, item, None)
            index.index(columns[name].sample.payloads())
    for name in parts:
        if name not in held:
            for place, item in parts[name]():
                columns[name].add(place, item, index)
    return columns, index


def _with_examples(drafts: list[Draft], parts: Mapping[str, Part]) -> Iterator[Finding]:
    """The findings; reads each set again, up to the last row that is to be shown."""
    wanted: dict[str, set[int]] = {}
    for draft in drafts:
        for name, number in draft.rows:
            wanted.setdefault(name, set()).add(number)
    shown: dict[tuple[str, int], Json] = {}
    for name, numbers in wanted.items():
        last = max(numbers)
        for number, (place, item) in enumerate(parts[name]()):
            if number in numbers:
                shown[name, number] = example(place, prompt_of(item).text)
            if number == last:
                break
    for draft in drafts:
        looked_up = tuple(shown[at] for at in draft.rows if at in shown)
        finding = draft.finding
        yield replace(finding, examples=(*finding.examples, *looked_up))


def _describe(rows: SetColumns, sample: int) -> Json:
    prompts = len(rows.distinct_prompts())
    return {
        "kind": rows.kind,
        "rows": rows.rows,
        "prompts": prompts,
        "sampled_prompts": min(sample, prompts),
    }
