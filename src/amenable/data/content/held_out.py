"""Held-out prompts that stand word for word inside other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amenable.data.content.findings import Json, example
from amenable.data.content.samples import Sampled
from amenable.data.content.words import HashedTexts, Keys

Flags = npt.NDArray[np.bool_]

CONTAINED_WORDS = 8
"""Fewest words of a held-out prompt that is looked for inside other prompts; chosen here: shorter
ones ("Write a poem about the sea.") stand in other prompts by chance."""


@dataclass(frozen=True, slots=True)
class Containing:
    """Where a held-out prompt was found first."""

    set_name: str
    example: Json


@dataclass(frozen=True, slots=True)
class _Wanted:
    set_name: str
    prompt: Sampled
    at: int
    """Where the run that it is looked for by stands in it, in words."""


@dataclass(slots=True)
class HeldOutPrompts:
    """Prompts of held-out sets, to be found in the prompts of others.

    Each is looked for by one run of CONTAINED_WORDS of its words: the one that fewest of its set
    have, so that a template that all begin with costs nothing. The rest is compared by the hash of
    all of its words.
    """

    anchors: dict[int, list[_Wanted]] = field(default_factory=dict)
    """Hash of a run to the prompts that are looked for by it."""

    starts: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The same hashes, ascending."""

    could: Flags = field(default_factory=lambda: np.zeros(2**16, bool))
    """[65,536] whether any of them has these first 16 bits: most runs need no closer look."""

    indexed: dict[str, int] = field(default_factory=dict)
    """Prompts that are looked for, by set."""

    found: dict[str, dict[int, Containing]] = field(default_factory=dict)
    """By set, key of the prompt to where it was found."""

    def index(self, set_name: str, sampled: Sequence[Sampled]) -> None:
        """Adds prompts of a set to look for; those too short are left out."""
        kept = [prompt for prompt in sampled if prompt.length >= CONTAINED_WORDS]
        if not kept:
            return
        hashed = HashedTexts.of([prompt.words for prompt in kept])
        runs = hashed.runs(CONTAINED_WORDS)
        distinct, inverse, counts = np.unique(runs, return_inverse=True, return_counts=True)
        for number, prompt in enumerate(kept):
            first = int(hashed.starts[number])
            last = int(hashed.starts[number + 1]) - CONTAINED_WORDS
            at = int(counts[inverse[first : last + 1]].argmin())
            anchor = int(distinct[inverse[first + at]])
            self.anchors.setdefault(anchor, []).append(_Wanted(set_name, prompt, at))
        self.indexed[set_name] = len(kept)
        self.starts = np.array(sorted(self.anchors), np.uint64)
        self.could[self.starts >> np.uint64(48)] = True

    def look_into(
        self, set_name: str, keys: Sequence[int], places: Sequence[str], texts: HashedTexts
    ) -> None:
        """Notes the prompts that stand inside these, word for word.

        Args:
            set_name: name of the set that the texts are of.
            keys: [n] key of each text.
            places: [n] place of each text.
            texts: n prompts.
        """
        if not len(self.starts):
            return
        runs = texts.runs(CONTAINED_WORDS)
        hits = np.flatnonzero(self.could[runs >> np.uint64(48)])
        nearest = np.searchsorted(self.starts, runs[hits]).clip(max=len(self.starts) - 1)
        hits = hits[self.starts[nearest] == runs[hits]]
        numbers = texts.text_of(hits)
        for position, number in zip(hits.tolist(), numbers.tolist(), strict=True):
            begin, end = int(texts.starts[number]), int(texts.starts[number + 1])
            for wanted in self.anchors[int(runs[position])]:
                held, start = wanted.prompt, position - wanted.at
                fits = begin <= start and start + held.length <= end
                if not fits or held.key == keys[number]:
                    continue
                known = self.found.setdefault(wanted.set_name, {})
                if held.key not in known and texts.run(start, start + held.length) == held.whole:
                    shown = example(held.place, f"in {places[number]}: {held.text}")
                    known[held.key] = Containing(set_name, shown)
