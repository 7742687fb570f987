"""Findings between sets: shared and near-equal prompts, and how far apart sets of prompts are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from amenable.data.content.columns import HeldOutPrompts, SetColumns
from amenable.data.content.findings import (
    EXAMPLES,
    Draft,
    Finding,
    Json,
    example,
    level_of,
    percent,
)
from amenable.data.content.near_duplicates import Sampled, are_near, near_clusters
from amenable.data.content.two_sample import separation

DISTANCE_NOTE, DISTANCE_WARNING = 0.7, 0.9
"""AUC from which sets of prompts count as different, and as far apart. Chosen here: two samples of
one source give 0.5, two topics of one kind about 0.7 to 0.9, two tasks above 0.9."""

LENGTH_RATIO = 2.0
"""Ratio of median lengths from which it is told; chosen here."""

FEWEST_FOR_LENGTH = 20
"""Prompts of each set from which medians are compared; chosen here."""

NEAR_WARNING = 0.2
"""Share of a set's prompts that are near copies of others, from which it is a warning. Chosen here:
a fifth less data than the row count says."""

MAX_COMPARED = 200
"""Training prompts of one cluster that a held-out prompt is compared with."""


def compare_sets(
    sets: Mapping[str, SetColumns], held: Collection[str], policy: str | None
) -> tuple[list[Draft], Json]:
    """Findings between sets, and the measures `overlap` and `distance`."""
    drafts: list[Draft] = []
    overlap = []
    keys = {name: rows.distinct_prompts() for name, rows in sets.items()}
    for first, second in combinations(sets, 2):
        shared = np.intersect1d(keys[first], keys[second], assume_unique=True)
        overlap.append({"sets": [first, second], "prompts": len(shared)})
        if len(shared) and (first in held) != (second in held):
            held_name, other = (first, second) if first in held else (second, first)
            drafts.append(_overlap(sets[held_name], sets[other], shared, len(keys[held_name])))
    distances: Json = {}
    if policy is not None and policy in sets:
        for name, rows in sets.items():
            if name != policy:
                found, distances[name] = _distance(rows, sets[policy])
                drafts += found
    return drafts, {"overlap": overlap, "distance": distances}


def _overlap(held: SetColumns, other: SetColumns, shared: Any, of: int) -> Draft:
    rows = np.flatnonzero(np.isin(np.array(held.prompts, np.uint64), shared))
    text = f"{len(shared)} of {of} prompts of {held.name} are also in {other.name}."
    finding = Finding(
        "overlapping_prompts", "warning", (held.name, other.name), len(shared), of, text
    )
    return Draft(finding, tuple((held.name, int(row)) for row in rows[:EXAMPLES]))


def _distance(rows: SetColumns, policy: SetColumns) -> tuple[list[Draft], Json]:
    own, others = rows.vocabulary.payloads(), policy.vocabulary.payloads()
    lengths = [float(np.median(c.prompt_words)) if c.rows else 0.0 for c in (rows, policy)]
    names = (rows.name, policy.name)
    measured: Json = {"median_words": dict(zip(names, lengths, strict=True))}
    drafts: list[Draft] = []
    short, long = sorted(lengths)
    if min(len(own), len(others)) >= FEWEST_FOR_LENGTH and long >= LENGTH_RATIO * max(short, 1):
        text = (
            f"Prompts of {rows.name} have a median of {lengths[0]:g} words, those of "
            f"{policy.name} of {lengths[1]:g}."
        )
        drafts.append(
            Draft(Finding("different_prompt_lengths", "note", names, rows.rows, rows.rows, text))
        )
    found = separation(
        [words for _, words in own],
        [words for _, words in others],
        [key for key, _ in (*own, *others)],
    )
    if found is None:
        return drafts, {**measured, "auc": None, "reason": "too few different prompts"}
    measured |= {
        "auc": found.auc,
        "standard_error": found.error,
        "prompts": dict(zip(names, found.prompts, strict=True)),
        "words": dict(zip(names, map(list, found.words), strict=True)),
    }
    if found.auc >= DISTANCE_NOTE:
        text = (
            f"A classifier of words ranks a prompt of {policy.name} above one of {rows.name} with "
            f"probability {found.auc:.2f} (0.50: same distribution); words of {rows.name}: "
            f"{' '.join(found.words[0])}; of {policy.name}: {' '.join(found.words[1])}."
        )
        level = level_of(found.auc, DISTANCE_WARNING)
        sampled, distinct = len(own), len(rows.distinct_prompts())
        drafts.append(Draft(Finding("different_prompts", level, names, sampled, distinct, text)))
    return drafts, measured


def near_findings(
    sets: Mapping[str, SetColumns], held: Collection[str], contained: HeldOutPrompts
) -> Iterator[Draft]:
    """Near duplicates within each set, held-out prompts near or inside training prompts."""
    samples = {name: rows.sample.payloads() for name, rows in sets.items()}
    members = [(name, prompt) for name, sample in samples.items() for prompt in sample]
    labels = near_clusters([prompt.shingles for _, prompt in members])
    clusters: dict[int, list[tuple[str, Sampled]]] = {}
    for label, member in zip(labels.tolist(), members, strict=True):
        clusters.setdefault(label, []).append(member)
    shared = [cluster for cluster in clusters.values() if len(cluster) > 1]
    for name, rows in sets.items():
        yield from _near_within(rows, samples[name], shared)
    for name in sets:
        if name in held:
            yield from _near_across(sets[name], samples[name], shared, held)
    if contained.found:
        count, of = len(contained.found), contained.indexed
        text = f"{count} of {of} held-out prompts stand inside a longer training prompt."
        names = tuple(name for name in sets if name in held)
        examples = tuple(contained.found.values())[:EXAMPLES]
        level = level_of(count / of)
        yield Draft(Finding("contained_prompts", level, names, count, of, text, examples))


def _near_within(
    rows: SetColumns, sample: list[Sampled], clusters: list[list[tuple[str, Sampled]]]
) -> Iterator[Draft]:
    own = [[prompt for name, prompt in cluster if name == rows.name] for cluster in clusters]
    own = [cluster for cluster in own if len(cluster) > 1]
    if not own:
        return
    surplus = sum(len(cluster) - 1 for cluster in own)
    text = (
        f"{surplus} of {len(sample)} different prompts of {rows.name} are near copies of another, "
        f"in {len(own)} clusters, the largest of {max(map(len, own))}{_sampling(rows, sample)}."
    )
    examples = tuple(
        example(cluster[0].place, f"like {cluster[1].place}: {cluster[0].text}")
        for cluster in sorted(own, key=len, reverse=True)[:EXAMPLES]
    )
    level = level_of(surplus / len(sample), NEAR_WARNING)
    yield Draft(
        Finding("near_duplicate_prompts", level, (rows.name,), surplus, len(sample), text, examples)
    )


def _near_across(
    rows: SetColumns,
    sample: list[Sampled],
    clusters: list[list[tuple[str, Sampled]]],
    held: Collection[str],
) -> Iterator[Draft]:
    """Held-out prompts with a verified near copy in a set that is not held out."""
    pairs = [
        (prompt, twin)
        for cluster in clusters
        for twin_set in [[(name, other) for name, other in cluster if name not in held]]
        for name, prompt in cluster
        if name == rows.name and (twin := _twin(prompt, twin_set))
    ]
    if pairs:
        names = sorted({name for _, (name, _) in pairs})
        text = (
            f"{len(pairs)} of {len(sample)} prompts of {rows.name} have a near copy in "
            f"{', '.join(names)}{_sampling(rows, sample)}."
        )
        examples = tuple(
            example(prompt.place, f"like {twin.place}: {prompt.text}")
            for prompt, (_, twin) in pairs[:EXAMPLES]
        )
        level = level_of(len(pairs) / len(sample))
        sets = (rows.name, *names)
        finding = Finding(
            "near_duplicate_held_out", level, sets, len(pairs), len(sample), text, examples
        )
        yield Draft(finding)


def _twin(prompt: Sampled, others: list[tuple[str, Sampled]]) -> tuple[str, Sampled] | None:
    """The first near copy of another key; exact copies are another finding."""
    for name, other in others[:MAX_COMPARED]:
        if other.key != prompt.key and are_near(prompt.shingles, other.shingles):
            return name, other
    return None


def _sampling(rows: SetColumns, sample: list[Sampled]) -> str:
    prompts = len(rows.distinct_prompts())
    if len(sample) == prompts:
        return ""
    share = percent(len(sample) / prompts)
    return f", on a sample of {len(sample)} of {prompts} ({share})"
