"""Findings between sets: shared and near-equal prompts, and how far apart sets of prompts are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from amenable.data.content.columns import SetColumns
from amenable.data.content.findings import (
    EXAMPLES,
    MANY,
    Draft,
    Finding,
    Json,
    example,
    level_of,
    percent,
)
from amenable.data.content.held_out import HeldOutPrompts
from amenable.data.content.near_duplicates import SHINGLE, are_near, near_clusters
from amenable.data.content.samples import PromptSamples, Sampled
from amenable.data.content.two_sample import (
    DISTANCE_NOTE,
    DISTANCE_WARNING,
    PROMPTS,
    Separation,
    separation,
)
from amenable.data.content.words import Keys, Words, shingles

LENGTH_RATIO = 2.0
"""Ratio of median lengths from which it is told; chosen here."""

FEWEST_FOR_LENGTH = 20
"""Prompts of each set from which medians are compared; chosen here."""

NEAR_WARNING = 0.2
"""Share of a set's prompts that are near copies of others, from which it is a warning. Chosen here:
a fifth less data than the row count says."""

VALIDATION_WARNING = 0.1
"""Share of validation prompts with a near copy in training from which it is a warning. Chosen here:
validation picks a checkpoint and is not reported; templates make a few near copies by chance."""

MAX_COMPARED = 200
"""Training prompts of one cluster that a held-out prompt is compared with."""


@dataclass(frozen=True, slots=True)
class Member:
    """A sampled prompt of a set, with its shingles."""

    set_name: str
    prompt: Sampled
    shingles: Words


def separations(
    sets: Mapping[str, SetColumns], samples: PromptSamples, policy: str | None
) -> dict[str, Separation]:
    """How far each set is from the policy's, of those that have enough prompts."""
    if policy is None or policy not in sets:
        return {}
    others = samples.of(policy)[:PROMPTS]
    found = {}
    for name in sets:
        own = samples.of(name)[:PROMPTS]
        keys = [prompt.key for prompt in (*own, *others)]
        words = ([prompt.words for prompt in own], [prompt.words for prompt in others])
        if name != policy and (apart := separation(*words, keys)) is not None:
            found[name] = apart
    return found


def training_set_of(name: str, sets: Collection[str]) -> str | None:
    """The set whose checkpoints a set of validation rows chooses; None for other sets.

    Of the same kind alone: prompts for training repeat those of other kinds by design.
    """
    kind, _, part = name.rpartition(".")
    train = f"{kind}.train"
    return train if part == "validation" and train in sets else None


def compare_sets(
    sets: Mapping[str, SetColumns],
    held: Collection[str],
    policy: str | None,
    apart: Mapping[str, Separation],
    words: Mapping[int, str],
) -> tuple[list[Draft], Json]:
    """Findings between sets, and the measures `overlap` and `distance`.

    Args:
        sets: the columns of each set.
        held: names of the sets that nothing may be trained on.
        policy: name of the set that others are compared with.
        apart: what `separations` gave.
        words: the words whose hashes `apart` holds.
    """
    drafts: list[Draft] = []
    overlap = []
    keys = {name: rows.distinct_prompts() for name, rows in sets.items()}
    for first, second in combinations(sets, 2):
        shared = np.intersect1d(keys[first], keys[second], assume_unique=True)
        overlap.append({"sets": [first, second], "prompts": len(shared)})
        if len(shared) and (first in held) != (second in held):
            held_name, other = (first, second) if first in held else (second, first)
            drafts.append(_overlap("overlapping_prompts", sets[held_name], sets[other], shared))
    for name in sets:
        train = training_set_of(name, sets)
        if train is not None:
            shared = np.intersect1d(keys[name], keys[train], assume_unique=True)
            if len(shared):
                drafts.append(_overlap("overlapping_validation", sets[name], sets[train], shared))
    distances: Json = {}
    if policy is not None and policy in sets:
        for name, rows in sets.items():
            if name != policy:
                found, distances[name] = _distance(rows, sets[policy], apart.get(name), words)
                drafts += found
    return drafts, {"overlap": overlap, "distance": distances}


def _overlap(check: str, held: SetColumns, other: SetColumns, shared: Keys) -> Draft:
    of = len(held.distinct_prompts())
    rows = np.flatnonzero(np.isin(np.array(held.prompts, np.uint64), shared))
    text = f"{len(shared)} of {of} prompts of {held.name} are also in {other.name}."
    finding = Finding(check, "warning", (held.name, other.name), len(shared), of, text)
    return Draft(finding, tuple((held.name, int(row)) for row in rows[:EXAMPLES]))


def _distance(
    rows: SetColumns, policy: SetColumns, found: Separation | None, words: Mapping[int, str]
) -> tuple[list[Draft], Json]:
    distinct = len(rows.distinct_prompts())
    fewest = min(distinct, len(policy.distinct_prompts()))
    lengths = [float(np.median(c.prompt_words)) if c.rows else 0.0 for c in (rows, policy)]
    names = (rows.name, policy.name)
    measured: Json = {"median_words": dict(zip(names, lengths, strict=True))}
    drafts: list[Draft] = []
    short, long = sorted(lengths)
    if fewest >= FEWEST_FOR_LENGTH and long >= LENGTH_RATIO * max(short, 1):
        text = (
            f"Prompts of {rows.name} have a median of {lengths[0]:g} words, those of "
            f"{policy.name} of {lengths[1]:g}."
        )
        drafts.append(
            Draft(Finding("different_prompt_lengths", "note", names, rows.rows, rows.rows, text))
        )
    if found is None:
        return drafts, {**measured, "auc": None, "reason": "too few different prompts"}
    measured |= {
        "auc": found.auc,
        "standard_error": found.error,
        "prompts": dict(zip(names, found.prompts, strict=True)),
    }
    if found.auc >= DISTANCE_NOTE:
        told = [[words[number] for number in side if number in words] for side in found.words]
        measured["words"] = dict(zip(names, told, strict=True))
        text = (
            f"A classifier of words ranks a prompt of {policy.name} above one of {rows.name} with "
            f"probability {found.auc:.2f} (0.50: same distribution); words of {rows.name}: "
            f"{' '.join(told[0])}; of {policy.name}: {' '.join(told[1])}."
        )
        level, count = level_of(found.auc, DISTANCE_WARNING), found.prompts[0]
        drafts.append(Draft(Finding("different_prompts", level, names, count, distinct, text)))
    return drafts, measured


def near_findings(
    sets: Mapping[str, SetColumns], held: Collection[str], samples: PromptSamples
) -> Iterator[Draft]:
    """Near duplicates within each set, and of held-out and validation prompts in training sets."""
    sizes = {name: len(samples.of(name)) for name in sets}
    shared = _clusters(sets, samples)
    for name, rows in sets.items():
        yield from _near_within(rows, sizes[name], shared)
    for name, rows in sets.items():
        train = training_set_of(name, sets)
        if name in held:
            others = [other for other in sets if other not in held]
            yield from _near_across("near_duplicate_held_out", rows, sizes[name], shared, others)
        elif train is not None:
            yield from _near_across("near_duplicate_validation", rows, sizes[name], shared, [train])


def contained_findings(sets: Collection[str], contained: HeldOutPrompts) -> Iterator[Draft]:
    """Held-out prompts that stand inside prompts of training sets."""
    for name in sets:
        found = contained.found.get(name, {})
        if found:
            count, of = len(found), contained.indexed[name]
            inside = sorted({one.set_name for one in found.values()})
            text = (
                f"{count} of {of} prompts of {name} of 8 words or more stand inside longer prompts "
                f"of {', '.join(inside)}."
            )
            examples = tuple(one.example for one in found.values())[:EXAMPLES]
            level, names = level_of(count / of), (name, *inside)
            yield Draft(Finding("contained_prompts", level, names, count, of, text, examples))


def _clusters(sets: Collection[str], samples: PromptSamples) -> list[list[Member]]:
    """Members of all sets that are near each other; a prompt of several sets is compared once."""
    sampled = {name: samples.of(name) for name in sets}
    distinct = {prompt.key: prompt for own in sampled.values() for prompt in own}
    shingled = shingles([prompt.words for prompt in distinct.values()], SHINGLE)
    labels = near_clusters(shingled).tolist()
    texts = dict(zip(distinct, zip(labels, shingled, strict=True), strict=True))
    clusters: dict[int, list[Member]] = {}
    for name, own in sampled.items():
        for prompt in own:
            label, text = texts[prompt.key]
            clusters.setdefault(label, []).append(Member(name, prompt, text))
    return [cluster for cluster in clusters.values() if len(cluster) > 1]


def _near_within(rows: SetColumns, size: int, clusters: list[list[Member]]) -> Iterator[Draft]:
    own = [[one.prompt for one in cluster if one.set_name == rows.name] for cluster in clusters]
    own = [cluster for cluster in own if len(cluster) > 1]
    if not own:
        return
    surplus = sum(len(cluster) - 1 for cluster in own)
    text = (
        f"{surplus} of {size} different prompts of {rows.name} are near copies of another, "
        f"in {len(own)} clusters, the largest of {max(map(len, own))}{_sampling(rows, size)}."
    )
    examples = tuple(
        example(cluster[0].place, f"like {cluster[1].place}: {cluster[0].text}")
        for cluster in sorted(own, key=len, reverse=True)[:EXAMPLES]
    )
    level = level_of(surplus / size, NEAR_WARNING)
    yield Draft(
        Finding("near_duplicate_prompts", level, (rows.name,), surplus, size, text, examples)
    )


def _near_across(
    check: str,
    rows: SetColumns,
    size: int,
    clusters: list[list[Member]],
    others: Collection[str],
) -> Iterator[Draft]:
    """Prompts with a verified near copy in one of the other sets."""
    pairs = [
        (one.prompt, twin)
        for cluster in clusters
        for twins in [[other for other in cluster if other.set_name in others]]
        for one in cluster
        if one.set_name == rows.name and (twin := _twin(one, twins))
    ]
    if pairs:
        names = sorted({twin.set_name for _, twin in pairs})
        text = (
            f"{len(pairs)} of {size} prompts of {rows.name} have a near copy in "
            f"{', '.join(names)}{_sampling(rows, size)}."
        )
        examples = tuple(
            example(prompt.place, f"like {twin.prompt.place}: {prompt.text}")
            for prompt, twin in pairs[:EXAMPLES]
        )
        is_validation = check == "near_duplicate_validation"
        level = level_of(len(pairs) / size, VALIDATION_WARNING if is_validation else MANY)
        sets = (rows.name, *names)
        yield Draft(Finding(check, level, sets, len(pairs), size, text, examples))


def _twin(one: Member, others: list[Member]) -> Member | None:
    """The first near copy of another key; exact copies are another finding."""
    for other in others[:MAX_COMPARED]:
        if other.prompt.key != one.prompt.key and are_near(one.shingles, other.shingles):
            return other
    return None


def _sampling(rows: SetColumns, size: int) -> str:
    prompts = len(rows.distinct_prompts())
    if size == prompts:
        return ""
    return f", on a sample of {size} of {prompts} ({percent(size / prompts)})"
