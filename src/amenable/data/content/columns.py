"""What the check of content keeps of a set of rows while they pass: numbers, and small samples."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.data.content.agreement import Judgements, hash8, verbatim
from amenable.data.content.findings import CLIP, EXAMPLES, Tally, example
from amenable.data.content.held_out import HeldOutPrompts
from amenable.data.content.samples import MAX_WORDS, PromptSamples, Sampled
from amenable.data.content.statistics import Item, kind_of, prompt_of
from amenable.data.content.text_faults import (
    faults_of_answers,
    faults_of_text,
    label_of,
    normalised,
    script_of,
)
from amenable.data.content.words import HashedTexts, Keys, word_hashes
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

WAITING = 2**18
"""Characters of prompts that are hashed at a time; chosen here: some 500 prompts."""


def asked_text(prompt: Prompt) -> str:
    """All turns but the system message, a line each."""
    turns = (turn.content for turn in prompt.messages if turn.speaker is not Speaker.SYSTEM)
    return "\n".join(turns)


def answers_of(item: Item) -> tuple[str, ...]:
    """The texts that answer the prompt."""
    if isinstance(item, Preference):
        return (item.candidate_0, item.candidate_1)
    return (item.output_text,) if isinstance(item, Demonstration) else ()


@dataclass(frozen=True, slots=True)
class Search:
    """Held-out prompts to look for, and what has been looked into already."""

    held_out: HeldOutPrompts
    done: list[Keys] = field(default_factory=list)
    """Keys of the prompts of earlier sets, each ascending: most prompts of a run are in two."""

    def is_new(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """[n] whether each prompt is yet to be looked into."""
        new = np.ones(len(keys), bool)
        for known in self.done:
            if len(known):
                place = np.searchsorted(known, keys).clip(max=len(known) - 1)
                new &= known[place] != keys
        return new


@dataclass(slots=True)
class Waiting:
    """Prompts that are to be hashed together."""

    keys: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    characters: int = 0

    def add(self, key: int, row: int, place: str, text: str) -> None:
        """Appends one prompt."""
        self.keys.append(key)
        self.rows.append(row)
        self.places.append(place)
        self.texts.append(text)
        self.characters += len(text)


@dataclass(slots=True)
class Script:
    """Rows with a text mostly in one script."""

    rows: int = 0
    examples: list[Json] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SeenPrompt:
    """What was found out about a prompt: rows of one prompt mostly follow each other."""

    messages: tuple[Message, ...]
    key: int
    """`prompt_key`"""

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
        turns = [message.content.split() for message in prompt.messages]
        asked = tuple(map(normalised, turns))
        key, words = int(prompt_key(prompt), 16), sum(map(len, turns))
        return cls(prompt.messages, key, words, asked, faults, script_of(prompt.text))


@dataclass(slots=True)
class SetColumns:
    """One set of rows."""

    name: str
    samples: PromptSamples
    """Prompts of all sets for near duplicates and for the distance between sets."""

    search: Search | None = None
    """What is looked for inside the prompts; None in sets that are not trained on."""

    kind: str = ""
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    judgements: Judgements = field(default_factory=Judgements)
    """Of preferences."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """Key of each row's prompt."""

    contents: array[int] = field(default_factory=lambda: array("Q"))
    """Of prompts and demonstrations, hash of all turns, verbatim, and the output."""

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
    labels: dict[str, list[int]] = field(default_factory=dict)
    """Label that answers begin with to rows in which that answer was chosen, and was rejected."""

    waiting: Waiting = field(default_factory=Waiting)
    seen: SeenPrompt | None = None
    """The row before's prompt."""

    def add(self, place: str, item: Item) -> None:
        """Takes one row in.

        Raises:
            ValueError: the row is of another kind than the set's first.
        """
        prompt, kind = prompt_of(item), kind_of(item)
        self.kind = self.kind or kind
        if kind != self.kind:
            raise ValueError(f"{place}: a {kind} in {self.name}, a set of {self.kind}s")
        answers = answers_of(item)
        split = [answer.split() for answer in answers]
        if self.seen is None or self.seen.messages != prompt.messages:
            self.seen = SeenPrompt.of(prompt)
        key = self.seen.key
        if isinstance(item, Preference):
            self._add_preference(item, key, len(split[0]), len(split[1]))
        else:
            self.contents.append(hash8(*verbatim(prompt), *map(str.strip, answers)))
        is_repeated = bool(self.prompts) and self.prompts[-1] == key
        self.prompts.append(key)
        self._add_texts(place, item, self.seen, answers, split)
        if not is_repeated and (self.search or self.samples.wants(self.name, key)):
            self.waiting.add(key, self.rows, place, asked_text(prompt))
            if self.waiting.characters >= WAITING:
                self.finish()
        self.rows += 1

    def finish(self) -> None:
        """Hashes the prompts that wait: looks for held-out ones in them, and adds to the sample."""
        waiting, self.waiting = self.waiting, Waiting()
        keys = np.array(waiting.keys, np.uint64)
        new = self.search.is_new(keys) if self.search else np.zeros(len(keys), bool)
        hashed: list[int] = []
        for number, key in enumerate(waiting.keys):
            wanted = self.samples.wants(self.name, key)
            same = self.samples.same(key) if wanted and not new[number] else None
            if same is not None:
                place, text = waiting.places[number], waiting.texts[number][:CLIP]
                row = waiting.rows[number]
                self.samples.add(self.name, replace(same, row=row, place=place, text=text))
            elif wanted or new[number]:
                hashed.append(number)
        texts = HashedTexts.of([word_hashes(waiting.texts[number]) for number in hashed])
        for position, number in enumerate(hashed):
            if self.samples.wants(self.name, waiting.keys[number]):
                self.samples.add(self.name, _sampled(waiting, number, texts, position))
        if self.search:
            keys_of = [waiting.keys[number] for number in hashed]
            places = [waiting.places[number] for number in hashed]
            self.search.held_out.look_into(self.name, keys_of, places, texts)

    def _add_preference(self, row: Preference, key: int, first: int, second: int) -> None:
        """Takes in a row by its prompt's key and the words of its candidates."""
        self.judgements.add(row, key)
        is_tie, sign = row.choice is Choice.TIE, -1 if row.choice is Choice.SECOND else 1
        self.choices.append(2 if is_tie else int(sign < 0))
        characters = len(row.candidate_0) - len(row.candidate_1)
        self.words.append(0 if is_tie else sign * (first - second))
        self.characters.append(0 if is_tie else sign * characters)

    def _add_texts(
        self,
        place: str,
        item: Item,
        asked: SeenPrompt,
        answers: tuple[str, ...],
        split: list[list[str]],
    ) -> None:
        """Looks at the characters of all texts; `split` are the words of the answers."""
        self.prompt_words.append(asked.words)
        faults = asked.faults.copy()
        scripts = {asked.script: asked.messages[-1].content}
        if answers:
            self.answer_words.append(max(map(len, split)))
            faults.update(faults_of_answers(item, asked.asked, [*map(normalised, split)]))
        for number, answer in enumerate(answers):
            faults.update(faults_of_text(answer))
            if ":" in answer and (label := label_of(answer)) is not None:
                faults["label_in_answer"] = answer
                self._add_label(label, item, number)
            scripts.setdefault(script_of(answer), answer)
        for name, shown in faults.items():
            self.tally.add(name, place, shown)
        for script, text in scripts.items():
            if script is not None:
                self._add_script(script, place, text)

    def _add_label(self, label: str, item: Item, number: int) -> None:
        counts = self.labels.setdefault(label, [0, 0])
        if isinstance(item, Preference) and item.choice is not Choice.TIE:
            counts[int(item.choice.value != number)] += 1

    def _add_script(self, script: str, place: str, text: str) -> None:
        found = self.scripts.get(script)
        if found is None:
            found = self.scripts[script] = Script()
        found.rows += 1
        if len(found.examples) < EXAMPLES:
            found.examples.append(example(place, text))

    def distinct_prompts(self) -> Keys:
        """Ascending keys of the set's prompts."""
        return np.unique(np.array(self.prompts, np.uint64))


def _sampled(waiting: Waiting, number: int, texts: HashedTexts, position: int) -> Sampled:
    start, end = int(texts.starts[position]), int(texts.starts[position + 1])
    return Sampled(
        key=waiting.keys[number],
        row=waiting.rows[number],
        place=waiting.places[number],
        text=waiting.texts[number][:CLIP],
        words=texts.text(position)[:MAX_WORDS].copy(),  # not a view of all texts
        length=end - start,
        whole=texts.run(start, end),
    )
