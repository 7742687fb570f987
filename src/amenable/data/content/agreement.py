"""How far annotators agree: Krippendorff's alpha and raw agreement over re-judged pairs.

A *unit* is one prompt, all its turns word for word, with one unordered pair of candidates: another
system message asks for another answer. Choices and strengths are turned to a
fixed order of the two candidates first, so that a pair shown the other way round is the same unit.
A second judgement of one unit by the same named annotator is left out; rows without a name count as
one annotator each.

Alpha is 1 for perfect agreement, 0 for what chance alone would give, negative below that. Where it
is not defined, the value is None and `reason` says why.

Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability" (coincidence matrices).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amenable.data.schemas import Choice, Preference, Prompt, prompt_key

Json = dict[str, Any]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Metric = Literal["nominal", "ordinal", "interval"]

NAMELESS = -1
"""Annotator number of a row that names none."""


@dataclass(frozen=True, slots=True)
class Alpha:
    """Krippendorff's alpha, or why there is none."""

    value: float | None
    """At most 1."""

    units: int
    """Units with two or more values."""

    values: int
    """Values in those units."""

    reason: str | None = None

    def to_json(self) -> Json:
        """`value`, `units`, `values` and, where the value is None, `reason`."""
        found: Json = {"value": self.value, "units": self.units, "values": self.values}
        return found if self.reason is None else {**found, "reason": self.reason}


def krippendorff_alpha(counts: npt.ArrayLike, values: npt.ArrayLike, metric: Metric) -> Alpha:
    """Alpha = 1 - observed disagreement / disagreement expected by chance.

    With o_ck = Σ_u n_uc (n_uk - [c = k]) / (m_u - 1), n_c = Σ_k o_ck and n = Σ_c n_c:

        alpha = 1 - (n - 1) Σ_ck o_ck δ²_ck / Σ_ck n_c n_k δ²_ck

    Args:
        counts: [U, V] how often value v was given to unit u; the number of annotators may differ
            from unit to unit, and units with fewer than two values are left out.
        values: [V] the values, ascending; used by "interval", and in this order by "ordinal".
        metric: squared difference δ²: "nominal" 1 for unequal values, "interval" (c - k)²,
            "ordinal" (n_c / 2 + n_k / 2 + Σ of n between them)².

    Raises:
        ValueError: the shapes do not fit.
    """
    table, scale = np.asarray(counts, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or scale.shape != table.shape[1:]:
        raise ValueError(f"counts {table.shape} and values {scale.shape} do not fit")
    table = table[table.sum(1) >= 2]
    sizes = table.sum(1)
    coincidences = _coincidences(table, sizes)
    marginals = coincidences.sum(1)
    units, total = len(table), round(float(sizes.sum()))
    if units == 0:
        return Alpha(None, 0, 0, "no pair was judged by two annotators")
    distance = _squared_differences(metric, scale, marginals)
    expected = float((np.outer(marginals, marginals) * distance).sum())
    if expected == 0:
        return Alpha(None, units, total, "all judgements are the same, so that chance agrees too")
    observed = float((coincidences * distance).sum())
    return Alpha(1 - (float(marginals.sum()) - 1) * observed / expected, units, total)


def pairwise_agreement(counts: npt.ArrayLike) -> float | None:
    """Share of equal values among all pairs of values of one unit; None without such a pair.

    Args:
        counts: [U, V] as in `krippendorff_alpha`.
    """
    table = np.asarray(counts, dtype=np.float64)
    sizes = table.sum(1)
    pairs = float((sizes * (sizes - 1)).sum())
    return float((table * (table - 1)).sum()) / pairs if pairs else None


def _coincidences(table: Floats, sizes: Floats) -> Floats:
    """[V, V] coincidence matrix of units with two or more values."""
    weights = 1 / (sizes - 1)
    found: Floats = table.T @ (table * weights[:, None])
    found -= np.diag(weights @ table)
    return found


def _squared_differences(metric: Metric, values: Floats, marginals: Floats) -> Floats:
    """[V, V] squared differences between values."""
    if metric == "nominal":
        different: Floats = 1.0 - np.eye(len(values))
        return different
    # The ordinal difference is that of the mean ranks: cumulated counts, half of the own one.
    positions = values if metric == "interval" else np.cumsum(marginals) - marginals / 2
    squared: Floats = (positions[:, None] - positions[None, :]) ** 2
    return squared


@dataclass(slots=True)
class Judgements:
    """Preferences as columns of numbers: 22 bytes a row, no text kept."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """8-byte `prompt_key`."""

    units: array[int] = field(default_factory=lambda: array("Q"))
    """8-byte hash of the prompt's turns and the unordered pair."""

    verdicts: array[int] = field(default_factory=lambda: array("b"))
    """1: the pair's first candidate (in its fixed order) was preferred, -1: the second, 0: tie."""

    strengths: array[int] = field(default_factory=lambda: array("b"))
    """1 … 9 in the pair's fixed order, 0 where none was given."""

    annotators: array[int] = field(default_factory=lambda: array("i"))
    """Number of the annotator in `names`, or NAMELESS."""

    names: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.units)

    def add(self, row: Preference, key: int | None = None) -> None:
        """Appends one row; `key` is its `prompt_key`, where that is known."""
        unit, is_turned = pair_key(row.prompt, row.candidate_0, row.candidate_1)
        verdict = 0 if row.choice is Choice.TIE else 1 if row.choice is Choice.FIRST else -1
        strength = row.strength or 0
        self.prompts.append(int(prompt_key(row.prompt), 16) if key is None else key)
        self.units.append(unit)
        self.verdicts.append(-verdict if is_turned else verdict)
        self.strengths.append(10 - strength if is_turned and strength else strength)
        name = row.annotator
        self.annotators.append(
            NAMELESS if name is None else self.names.setdefault(name, len(self.names))
        )

    def independent(self) -> npt.NDArray[np.bool_]:
        """[n] False where the same named annotator judged the same unit before."""
        units, annotators = np.array(self.units, np.uint64), np.array(self.annotators, np.int64)
        order = np.lexsort((np.arange(len(units)), annotators, units))
        again = np.zeros(len(units), bool)
        again[1:] = (np.diff(units[order]) == 0) & (np.diff(annotators[order]) == 0)
        again &= annotators[order] != NAMELESS
        kept = np.ones(len(units), bool)
        kept[order] = ~again
        return kept

    def agreement(self) -> Json:
        """Alpha of choices (nominal, with ties) and of strengths (ordinal and interval).

        Returns:
            `units`, `judged_twice` (units with two or more independent judgements), `pairwise`
            (raw agreement of choices, [0, 1] or None), `choice`, `strength_ordinal` and
            `strength_interval`, each an `Alpha` as JSON.
        """
        kept = self.independent()
        units = np.array(self.units, np.uint64)[kept]
        several, distinct = _judged_again(units)
        rows = np.flatnonzero(kept)[several]
        units, strengths = units[several], np.array(self.strengths, np.int64)[rows]
        rated = strengths > 0
        choices = count_values(units, np.array(self.verdicts, np.int64)[rows], (-1, 0, 1))
        scale = tuple(range(1, 10))
        ratings = count_values(units[rated], strengths[rated], scale)
        return {
            "units": distinct,
            "judged_twice": len(choices),
            "pairwise": pairwise_agreement(choices),
            "choice": krippendorff_alpha(choices, (-1, 0, 1), "nominal").to_json(),
            "strength_ordinal": krippendorff_alpha(ratings, scale, "ordinal").to_json(),
            "strength_interval": krippendorff_alpha(ratings, scale, "interval").to_json(),
        }


def _judged_again(units: Keys) -> tuple[npt.NDArray[np.bool_], int]:
    """[n] whether each row's unit has other rows, and how many units there are.

    Most data has most pairs judged once: they are set aside before tables are made.
    """
    _, index, counts = np.unique(units, return_inverse=True, return_counts=True)
    return counts[index] > 1, len(counts)


def count_values(units: Keys, values: Integers, scale: tuple[int, ...]) -> Integers:
    """[U, V] how often each value of `scale` was given to each distinct unit.

    Args:
        units: [n] key of the unit of each judgement.
        values: [n] the judgement, one of `scale`.
        scale: [V] ascending values.
    """
    distinct, index = np.unique(units, return_inverse=True)
    column = np.searchsorted(np.asarray(scale), values)
    cells = np.bincount(index * len(scale) + column, minlength=len(distinct) * len(scale))
    return cells.reshape(len(distinct), len(scale)).astype(np.int64)


def hash8(*texts: str) -> int:
    """8-byte hash of texts, the same in every process; two texts of a million collide 3e-8 often.

    (Birthday bound: n² / 2^65.)
    """
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def verbatim(prompt: Prompt) -> Iterator[str]:
    """All turns with their speakers, for `hash8`."""
    for turn in prompt.messages:
        yield turn.speaker.value
        yield turn.content


def pair_key(prompt: Prompt, first: str, second: str) -> tuple[int, bool]:
    """Key of a prompt and two candidates in either order, and whether they stand turned round.

    White space at the ends of the candidates apart.
    """
    a, b = first.strip(), second.strip()
    is_turned = b < a
    if is_turned:
        a, b = b, a
    return hash8(*verbatim(prompt), a, b), is_turned
