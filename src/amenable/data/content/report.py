"""The check of content: what in the rows predicts trouble in training, with examples and remedies.

Every set is read once, and its beginning once more where examples must be looked up. Of each row
only numbers are kept, and of a sample of prompts the hashes of their words. Measured: 130 MB a
million preference rows and 70 MB besides (`benchmarks/content.py`); in place of the 70, 290 MB
with 20,000 prompts of 1,500 words.

What it does not see: whether an answer is true or good, paraphrases, and anything in the meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from amenable.data.content.columns import Search, SetColumns, asked_text
from amenable.data.content.findings import EXPLANATIONS, Draft, Finding, example
from amenable.data.content.held_out import HeldOutPrompts
from amenable.data.content.label_findings import label_findings
from amenable.data.content.row_findings import row_findings
from amenable.data.content.samples import PromptSamples
from amenable.data.content.set_findings import (
    compare_sets,
    contained_findings,
    near_findings,
    separations,
)
from amenable.data.content.statistics import Part, prompt_of
from amenable.data.content.two_sample import PROMPTS, Separation
from amenable.data.content.words import word_hash, words_in
from amenable.data.schemas import Prompt

Json = dict[str, Any]

SAMPLE = 20_000
"""Prompts of all sets together among which near duplicates are looked for; chosen here: seconds,
not minutes, and exact copies are looked for among all."""


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
        sample: most prompts of all sets together among which near duplicates are looked for.

    Returns:
        `sets`: rows, distinct prompts and sampled prompts by set. `findings`: warnings first; see
        `Finding.to_json`. `warnings`, `notes`: how many. `measures`: of preferences `longest_wins`,
        `longest_wins_characters` and `position`; `overlap` (shared prompts of each two sets) and
        `distance` (each set from the policy's). `clean`: names of checks that found nothing.
    """
    held = {name for name in parts if _is_held_out(name)} if held_out is None else set(held_out)
    samples, search = PromptSamples(sample), Search(HeldOutPrompts())
    columns = _read(parts, held, samples, search)
    policy = _policy(columns) if policy is None else policy
    drafts: list[Draft] = []
    measures: Json = {}
    for name, rows in columns.items():
        drafts += row_findings(rows)
        if len(rows.judgements):
            found, measures[name] = label_findings(rows)
            drafts += found
    apart = separations(columns, samples, policy)
    words = _words_of(apart, policy, samples, parts)
    compared, between = compare_sets(columns, held, policy, apart, words)
    drafts += compared
    drafts += near_findings(columns, held, samples)
    drafts += contained_findings(columns, search.held_out)
    findings = sorted(_with_examples(drafts, parts), key=lambda found: found.level != "warning")
    seen = {finding.name for finding in findings}
    return {
        "sets": {name: _describe(rows, samples) for name, rows in columns.items()},
        "warnings": sum(found.level == "warning" for found in findings),
        "notes": sum(found.level == "note" for found in findings),
        "findings": [finding.to_json() for finding in findings],
        "measures": {**measures, **between},
        "clean": [name for name in EXPLANATIONS if name not in seen],
    }


def _is_held_out(name: str) -> bool:
    return name == "evaluation_prompts" or name.endswith(".test")


def _policy(names: Collection[str]) -> str | None:
    return next((name for name in ("prompts", "prompts.train") if name in names), None)


def _read(
    parts: Mapping[str, Part], held: Collection[str], samples: PromptSamples, search: Search
) -> dict[str, SetColumns]:
    """The columns of every set, held-out ones read first, so that the others can be searched."""
    columns = {name: SetColumns(name, samples) for name in parts}
    for name in sorted(parts, key=lambda name: name not in held):  # otherwise in their order
        rows = columns[name]
        is_trained_on = name not in held and not name.endswith(".validation")
        rows.search = search if is_trained_on else None
        for place, item in parts[name]():
            rows.add(place, item)
        rows.finish()
        if name in held:
            search.held_out.index(name, samples.of(name))
        elif is_trained_on:
            search.done.append(rows.distinct_prompts())
    return columns


def _words_of(
    apart: Mapping[str, Separation],
    policy: str | None,
    samples: PromptSamples,
    parts: Mapping[str, Part],
) -> dict[int, str]:
    """The words that tell sets apart by their hashes, from the first sampled rows with them."""
    wanted: dict[str, set[int]] = {}
    for name, found in apart.items():
        for owner, side in zip((name, str(policy)), found.words, strict=True):
            wanted.setdefault(owner, set()).update(side)
    rows: set[tuple[str, int]] = set()
    for name, hashes in wanted.items():
        left = set(hashes)
        for prompt in sorted(samples.of(name)[:PROMPTS], key=lambda prompt: prompt.row):
            if not left:
                break
            has = left.intersection(prompt.words.tolist())
            if has:
                rows.add((name, prompt.row))
                left -= has
    words: dict[int, str] = {}
    for _, asked in _look_up(parts, rows).values():
        words |= {word_hash(word): word for word in words_in(asked_text(asked))}
    return words


def _with_examples(drafts: list[Draft], parts: Mapping[str, Part]) -> Iterator[Finding]:
    """The findings, with the rows that are to be shown."""
    found = _look_up(parts, {row for draft in drafts for row in draft.rows})
    shown = {row: example(place, prompt.text) for row, (place, prompt) in found.items()}
    for draft in drafts:
        looked_up = tuple(shown[at] for at in draft.rows if at in shown)
        finding = draft.finding
        yield replace(finding, examples=(*finding.examples, *looked_up))


def _look_up(
    parts: Mapping[str, Part], rows: Collection[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, Prompt]]:
    """Place and prompt of rows (set, number); reads each set again, up to the last of its rows."""
    wanted: dict[str, set[int]] = {}
    for name, number in rows:
        wanted.setdefault(name, set()).add(number)
    found: dict[tuple[str, int], tuple[str, Prompt]] = {}
    for name, numbers in wanted.items():
        for number, (place, item) in enumerate(islice(parts[name](), max(numbers) + 1)):
            if number in numbers:
                found[name, number] = place, prompt_of(item)
    return found


def _describe(rows: SetColumns, samples: PromptSamples) -> Json:
    return {
        "kind": rows.kind,
        "rows": rows.rows,
        "prompts": len(rows.distinct_prompts()),
        "sampled_prompts": len(samples.of(rows.name)),
    }
