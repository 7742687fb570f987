"""A sample of the prompts of every set, under one budget, that does not depend on their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from amenable.data.content.words import Words

MAX_WORDS = 1000
"""Words of a prompt that are kept for comparison; bounds the memory of the sample."""

SLACK = 1.25
"""Prompts that are held while rows pass, against the budget: cutting costs a sort."""

LIMIT = 2**64


@dataclass(frozen=True, slots=True)
class Sampled:
    """One prompt of a sample."""

    key: int
    row: int
    """Number of its row in the set, from 0."""

    place: str
    text: str
    """Its beginning, for examples."""

    words: Words
    """Hashes of its first MAX_WORDS words in their order."""

    length: int
    """Words, all counted."""

    whole: int
    """Hash of all words as one run."""


@dataclass(slots=True)
class _Kept:
    limit: int = LIMIT
    """Keys from here on cannot be in the sample any more."""

    prompts: dict[int, Sampled] = field(default_factory=dict)


@dataclass(slots=True)
class PromptSamples:
    """The prompts of smallest key of each set.

    Keys are hashes of the prompts, so that equal prompts count once in a set, and are in the
    samples of all sets that have them. Small sets are kept whole; what they leave of the budget is
    shared equally among the others.
    """

    budget: int
    """Prompts of all sets together."""

    sets: dict[str, _Kept] = field(default_factory=dict)

    def wants(self, name: str, key: int) -> bool:
        """Whether a prompt of the set is to be added."""
        kept = self.sets.setdefault(name, _Kept())
        return key < kept.limit and key not in kept.prompts

    def same(self, key: int) -> Sampled | None:
        """The prompt as another set has it."""
        found = (kept.prompts.get(key) for kept in self.sets.values())
        return next((prompt for prompt in found if prompt is not None), None)

    def add(self, name: str, prompt: Sampled) -> None:
        """Adds a wanted prompt."""
        self.sets[name].prompts[prompt.key] = prompt
        if sum(len(kept.prompts) for kept in self.sets.values()) > SLACK * self.budget:
            self._cut()

    def of(self, name: str) -> list[Sampled]:
        """The set's sample, by ascending key."""
        self._cut()
        kept = self.sets.get(name, _Kept())
        return [kept.prompts[key] for key in sorted(kept.prompts)]

    def _cut(self) -> None:
        # A set that was cut counts as large, whatever it has kept: its order does not matter then.
        sizes = [
            len(kept.prompts) if kept.limit == LIMIT else self.budget + 1
            for kept in self.sets.values()
        ]
        most = _fair_share(sizes, self.budget)
        for kept in self.sets.values():
            if len(kept.prompts) > most:
                keys = sorted(kept.prompts)
                kept.limit = keys[most]
                kept.prompts = {key: kept.prompts[key] for key in keys[:most]}


def _fair_share(sizes: Iterable[int], budget: int) -> int:
    """The most for each, so that together they are within the budget."""
    left = budget
    ordered = sorted(sizes)
    for number, size in enumerate(ordered):
        share = left // (len(ordered) - number)
        if size > share:
            return share
        left -= size
    return int(np.max(ordered, initial=0))
