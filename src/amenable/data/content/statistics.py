"""What a data set holds, in numbers: counts, lengths, choices, annotators and their agreement.

One streaming pass a set. Lengths are in words (split at white space); no text is kept: about 60
bytes a preference row, 24 a demonstration, 20 a prompt while rows pass, and measured 155 MB a
million preference rows at the peak, when columns are sorted.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.data.content.agreement import Judgements, hash8
from amenable.data.schemas import Demonstration, Preference, Prompt, prompt_key

Json = dict[str, Any]
Item = Prompt | Demonstration | Preference
Part = Callable[[], Iterable[tuple[str, Item]]]
"""A named set of rows: each call begins anew and gives (place, row), as ("pairs.jsonl:17", row)."""

EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Lower edges of the 20 bins of length histograms, in words; the last bin is open. Chosen here:
about two bins a doubling, the same for all sets, so that charts can be laid over each other."""

PERCENTILES = (10, 50, 90, 99)

TOP_ANNOTATORS = 20
"""How many annotators are listed; chosen here to fit on a screen."""


def data_statistics(parts: Mapping[str, Part]) -> Json:
    """Statistics of each set by its name; every key is in `docs/metrics.md`.

    Args:
        parts: name to a function that gives a fresh iterator of (place, row); rows of one set are
            of one kind.

    Returns:
        Of each set: `kind`, `rows`, `prompts` and `groups` (distinct), `words`; of preferences also
        `pairs_per_prompt`, `choices`, `strengths`, `margins`, `weights`, `annotators`, `agreement`.
    """
    return {name: set_statistics(part()) for name, part in parts.items()}


def set_statistics(rows: Iterable[tuple[str, Item]]) -> Json:
    """Statistics of one set; see `data_statistics`."""
    columns = _Columns()
    for _, item in rows:
        columns.add(item)
    return columns.to_json()


def kind_of(item: Item) -> str:
    """`prompt`, `demonstration` or `preference`."""
    return type(item).__name__.lower()


def prompt_of(item: Item) -> Prompt:
    """The row's prompt, or the row itself if it is one."""
    return item if isinstance(item, Prompt) else item.prompt


def prompt_words(prompt: Prompt) -> int:
    """Words of all turns of the prompt, the system message included."""
    return sum(len(message.content.split()) for message in prompt.messages)


@dataclass(slots=True)
class _Columns:
    """The numbers of a set's rows."""

    kinds: Counter[str] = field(default_factory=Counter)
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    groups: array[int] = field(default_factory=lambda: array("Q"))
    words: dict[str, array[int]] = field(default_factory=dict)
    judgements: Judgements = field(default_factory=Judgements)
    choices: Counter[str] = field(default_factory=Counter)
    strengths: Counter[int] = field(default_factory=Counter)
    margins: array[float] = field(default_factory=lambda: array("d"))
    weights: array[float] = field(default_factory=lambda: array("d"))
    annotators: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item) -> None:
        prompt = prompt_of(item)
        self.kinds[kind_of(item)] += 1
        self.groups.append(hash8(prompt.group))
        self._count("prompt", prompt_words(prompt))
        if isinstance(item, Preference):
            self._add_preference(item)
            self.prompts.append(self.judgements.prompts[-1])
            return
        self.prompts.append(int(prompt_key(prompt), 16))
        if isinstance(item, Demonstration):
            self._count("output", len(item.output_text.split()))

    def _add_preference(self, item: Preference) -> None:
        self.judgements.add(item)
        self._count("chosen", len(item.chosen.split()))
        self._count("rejected", len(item.rejected.split()))
        self.choices[str(item.choice.value)] += 1
        self.weights.append(item.weight)
        if item.margin is not None:
            self.margins.append(item.margin)
        if item.strength is not None:
            self.strengths[item.strength] += 1
        if item.annotator is not None:
            self.annotators[item.annotator] += 1

    def _count(self, text: str, words: int) -> None:
        self.words.setdefault(text, array("i")).append(words)

    def to_json(self) -> Json:
        found: Json = {
            "kind": "+".join(sorted(self.kinds)),
            "rows": self.kinds.total(),
            "prompts": len(np.unique(np.array(self.prompts, np.uint64))),
            "groups": len(np.unique(np.array(self.groups, np.uint64))),
            "words": {name: length_summary(np.array(w)) for name, w in self.words.items()},
        }
        return {**found, **self._of_preferences()} if len(self.judgements) else found

    def _of_preferences(self) -> Json:
        rows = len(self.judgements)
        _, pairs = np.unique(np.array(self.judgements.prompts, np.uint64), return_counts=True)
        return {
            "pairs_per_prompt": {"mean": float(pairs.mean()), "max": int(pairs.max())},
            "choices": {name: self.choices[name] for name in ("0", "1", "tie")},
            "ties": self.choices["tie"] / rows,
            "strengths": {str(s): self.strengths[s] for s in range(1, 10)}
            if self.strengths
            else {},
            "margins": number_summary(np.array(self.margins)),
            "weights": number_summary(np.array(self.weights)),
            "annotators": {
                "named_rows": self.annotators.total(),
                "distinct": len(self.annotators),
                "top": [
                    {"name": name, "rows": count, "share": count / rows}
                    for name, count in sorted(
                        self.annotators.items(), key=lambda pair: (-pair[1], pair[0])
                    )[:TOP_ANNOTATORS]
                ],
            },
            "agreement": self.judgements.agreement(),
        }


def length_summary(words: npt.NDArray[np.integer[Any]]) -> Json:
    """Mean, min, nearest-rank percentiles, max and histogram of lengths; empty for none.

    The percentile p of n ordered lengths is the one of rank ⌈p n / 100⌉: a length that occurs.

    Args:
        words: [n] lengths in words.
    """
    if not words.size:
        return {}
    ordered = np.sort(words)
    ranks = {f"p{p}": ordered[max(0, math.ceil(p * len(words) / 100) - 1)] for p in PERCENTILES}
    bins = np.bincount(np.searchsorted(EDGES, ordered, side="right") - 1, minlength=len(EDGES))
    return {
        "mean": float(words.mean()),
        "min": int(ordered[0]),
        **{name: int(value) for name, value in ranks.items()},
        "max": int(ordered[-1]),
        "histogram": {"edges": list(EDGES), "counts": bins.tolist()},
    }


def number_summary(values: npt.NDArray[np.float64]) -> Json:
    """Rows, distinct values, min, nearest-rank median, mean and max; `{"rows": 0}` for none.

    Args:
        values: [n] numbers.
    """
    if not values.size:
        return {"rows": 0}
    ordered = np.sort(values)
    return {
        "rows": len(values),
        "distinct": len(np.unique(values)),
        "min": float(ordered[0]),
        "p50": float(ordered[math.ceil(len(values) / 2) - 1]),
        "mean": float(values.mean()),
        "max": float(ordered[-1]),
    }


def lines(statistics: Json) -> list[str]:
    """What `data_statistics` returned, as text for a terminal."""
    return [line for name, found in statistics.items() for line in _set_lines(name, found)]


def _set_lines(name: str, found: Json) -> Iterator[str]:
    kind = found["kind"] or "nothing"
    yield (
        f"{name}: {kind}, {found['rows']:,} rows, {found['prompts']:,} different prompts, "
        f"{found['groups']:,} groups"
    )
    columns = ("mean", "p10", "p50", "p90", "p99", "max")
    if found["words"]:
        yield "    words       " + "".join(f"{column:>8}" for column in columns)
    for text, lengths in found["words"].items():
        yield f"      {text:10}" + "".join(f"{lengths[column]:8.0f}" for column in columns)
    if "choices" not in found:
        return
    choices, annotators = found["choices"], found["annotators"]
    yield (
        f"    choices     {choices['0']:,} candidate_0, {choices['1']:,} candidate_1, "
        f"{choices['tie']:,} ties; {found['pairs_per_prompt']['mean']:.1f} pairs a prompt"
    )
    if found["strengths"]:
        counted = "  ".join(
            f"{strength}: {rows:,}" for strength, rows in found["strengths"].items()
        )
        yield f"    strengths   {counted}"
    if annotators["distinct"]:
        busiest = annotators["top"][0]
        yield (
            f"    annotators  {annotators['distinct']:,} on {annotators['named_rows']:,} rows; the "
            f"busiest, {busiest['name']}, on {busiest['rows']:,}"
        )
    yield f"    agreement   {_agreement_line(found['agreement'])}"


def _agreement_line(agreement: Json) -> str:
    alpha = agreement["choice"]
    twice = f"{agreement['judged_twice']:,} of {agreement['units']:,} pairs judged more than once"
    if agreement["pairwise"] is None:
        return twice
    shown = f"{alpha['value']:.2f}" if alpha["value"] is not None else f"none: {alpha['reason']}"
    share = f"{100 * agreement['pairwise']:.0f} %"
    return f"{twice}; {share} of judgements equal, Krippendorff's alpha {shown}"
