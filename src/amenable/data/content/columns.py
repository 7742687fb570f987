"""What the check of content keeps of a set of rows while they pass: numbers, and small samples."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.data.content.agreement import Judgements, hash8
from amenable.data.content.findings import EXAMPLES, Tally, clip, example
from amenable.data.content.near_duplicates import (
    HashSample,
    Sampled,
    runs,
    shingles,
    word_hashes,
)
from amenable.data.content.statistics import Item, kind_of, prompt_of, prompt_words
from amenable.data.content.text_faults import (
    faults_of_answers,
    faults_of_text,
    normalised,
    script_of,
)
from amenable.data.content.two_sample import PROMPTS, words_of
from amenable.data.schemas import (
    Choice,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Speaker,
    prompt_key,
)

Json = dict[str, Any]
Keys = npt.NDArray[np.uint64]

CONTAINED_WORDS = 8
"""Fewest words of a held-out prompt that is looked for inside training prompts; chosen here:
shorter ones ("Write a poem about the sea.") stand in other prompts by chance."""


def asked_text(prompt: Prompt) -> str:
    """All turns but the system message, a line each."""
    turns = (turn.content for turn in prompt.messages if turn.speaker is not Speaker.SYSTEM)
    return "\n".join(turns)


def answers_of(item: Item) -> tuple[str, ...]:
    """The texts that answer the prompt."""
    if isinstance(item, Preference):
        return (item.candidate_0, item.candidate_1)
    return (item.output_text,) if isinstance(item, Demonstration) else ()


@dataclass(slots=True)
class HeldOutPrompts:
    """Prompts of held-out sets, to be found word for word inside other prompts.

    Each is looked for by one run of CONTAINED_WORDS of its words: the one that fewest of the others
    have, so that a template that all begin with costs nothing.
    """

    anchors: dict[int, list[tuple[Sampled, int]]] = field(default_factory=dict)
    """Hash of a run to the prompts that are looked for by it, and where it stands in them."""

    starts: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The same hashes, ascending."""

    indexed: int = 0
    found: dict[int, Json] = field(default_factory=dict)
    """Key of a contained prompt to an example."""

    def index(self, sampled: Iterable[Sampled]) -> None:
        """Adds prompts to look for; those too short are left out."""
        kept = [prompt for prompt in sampled if len(prompt.words) >= CONTAINED_WORDS]
        if not kept:
            return
        own = [runs(prompt.words, CONTAINED_WORDS) for prompt in kept]
        distinct, counts = np.unique(np.concatenate(own), return_counts=True)
        for prompt, hashes in zip(kept, own, strict=True):
            at = int(counts[np.searchsorted(distinct, hashes)].argmin())
            self.anchors.setdefault(int(hashes[at]), []).append((prompt, at))
        self.indexed += len(kept)
        self.starts = np.array(sorted(self.anchors), np.uint64)

    def look_into(self, key: int, place: str, text: str) -> None:
        """Notes the prompts that stand inside this text, word for word."""
        if not len(self.starts):
            return
        words = word_hashes(text)
        own = runs(words, CONTAINED_WORDS)
        nearest = np.searchsorted(self.starts, own)
        nearest[nearest == len(self.starts)] = 0
        for position in np.flatnonzero(self.starts[nearest] == own):
            for held, at in self.anchors[int(own[position])]:
                start = max(0, int(position) - at)
                window = words[start : start + len(held.words)]
                if held.key != key and np.array_equal(window, held.words):
                    shown = example(held.place, f"in {place}: {held.text}")
                    self.found.setdefault(held.key, shown)


@dataclass(slots=True)
class Script:
    """Rows with a text mostly in one script."""

    rows: int = 0
    examples: list[Json] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SeenPrompt:
    """What was found out about a prompt: rows of one prompt mostly follow each other."""

    messages: tuple[Message, ...]
    words: int
    asked: tuple[str, ...]
    """Its turns, normalised."""

    faults: dict[str, str]
    script: str | None

    @classmethod
    def of(cls, prompt: Prompt) -> SeenPrompt:
        """Looks at all turns."""
        faults: dict[str, str] = {}
        for message in prompt.messages:
            faults |= dict(faults_of_text(message.content))
        asked = tuple(normalised(message.content) for message in prompt.messages)
        script = script_of(prompt.text)
        return cls(prompt.messages, prompt_words(prompt), asked, faults, script)


@dataclass(slots=True)
class SetColumns:
    """One set of rows."""

    name: str
    sample: HashSample
    """Prompts for near duplicates, as `Sampled`."""

    kind: str = ""
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    judgements: Judgements = field(default_factory=Judgements)
    """Of preferences."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """Key of each row's prompt."""

    answers: array[int] = field(default_factory=lambda: array("Q"))
    """Of demonstrations, hash of the output."""

    choices: array[int] = field(default_factory=lambda: array("b"))
    """0, 1, or 2 for a tie."""

    words: array[int] = field(default_factory=lambda: array("i"))
    """Words of the chosen less those of the rejected candidate; 0 for ties."""

    characters: array[int] = field(default_factory=lambda: array("i"))
    """The same in characters."""

    prompt_words: array[int] = field(default_factory=lambda: array("i"))
    answer_words: array[int] = field(default_factory=lambda: array("i"))
    """Of the row's longest answer."""

    scripts: dict[str, Script] = field(default_factory=dict)
    vocabulary: HashSample = field(default_factory=lambda: HashSample(PROMPTS))
    """Words of prompts for the two-sample test."""

    seen: SeenPrompt | None = None
    """The row before's prompt."""

    def add(self, place: str, item: Item, held_out: HeldOutPrompts | None) -> None:
        """Takes one row in; looks for `held_out` prompts inside its own.

        Of a set that is held out itself, `held_out` is None.

        Raises:
            ValueError: the row is of another kind than the set's first.
        """
        prompt = prompt_of(item)
        self.kind = self.kind or kind_of(item)
        if kind_of(item) != self.kind:
            raise ValueError(f"{place}: a {kind_of(item)} in {self.name}, a set of {self.kind}s")
        self.rows += 1
        if isinstance(item, Preference):
            self._add_preference(item)
            key = self.judgements.prompts[-1]
        else:
            key = int(prompt_key(prompt), 16)
        is_repeated = bool(self.prompts) and self.prompts[-1] == key
        self.prompts.append(key)
        if isinstance(item, Demonstration):
            self.answers.append(hash8(item.output_text.strip()))
        self._add_texts(place, item, prompt)
        if not is_repeated:
            self._add_prompt(key, place, asked_text(prompt), held_out)

    def _add_preference(self, row: Preference) -> None:
        self.judgements.add(row)
        is_tie = row.choice is Choice.TIE
        self.choices.append(2 if is_tie else int(row.choice is Choice.SECOND))
        words = 0 if is_tie else len(row.chosen.split()) - len(row.rejected.split())
        self.words.append(words)
        self.characters.append(0 if is_tie else len(row.chosen) - len(row.rejected))

    def _add_texts(self, place: str, item: Item, prompt: Prompt) -> None:
        answers = answers_of(item)
        if self.seen is None or self.seen.messages != prompt.messages:
            self.seen = SeenPrompt.of(prompt)
        self.prompt_words.append(self.seen.words)
        if answers:
            self.answer_words.append(max(len(answer.split()) for answer in answers))
        faults = dict(faults_of_answers(item, self.seen.asked)) | self.seen.faults
        for answer in answers:
            faults |= dict(faults_of_text(answer))
        for name, shown in faults.items():
            self.tally.add(name, place, shown)
        scripts = {self.seen.script: prompt.text}
        for answer in answers:
            scripts.setdefault(script_of(answer), answer)
        for script, text in scripts.items():
            if script is not None:
                self._add_script(script, place, text)

    def _add_script(self, script: str, place: str, text: str) -> None:
        found = self.scripts.setdefault(script, Script())
        found.rows += 1
        if len(found.examples) < EXAMPLES:
            found.examples.append(example(place, text))

    def _add_prompt(self, key: int, place: str, text: str, held_out: HeldOutPrompts | None) -> None:
        if self.sample.wants(key):
            words = word_hashes(text)
            kept = words if held_out is None else words[:0]
            self.sample.add(key, Sampled(key, place, clip(text), shingles(words), kept))
        if self.vocabulary.wants(key):
            self.vocabulary.add(key, (key, words_of(text)))
        if held_out is not None:
            held_out.look_into(key, place, text)

    def distinct_prompts(self) -> Keys:
        """Ascending keys of the set's prompts."""
        return np.unique(np.array(self.prompts, np.uint64))
