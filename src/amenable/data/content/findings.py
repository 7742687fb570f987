"""What a check of content reports: findings with examples, and what each of them means.

`EXPLANATIONS` is the one list of all checks; `docs/metrics.md` describes the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]
Level = Literal["note", "warning"]

EXAMPLES = 5
"""Examples shown of one finding; chosen here to fit on a screen."""

CLIP = 80
"""Characters shown of a text."""

MANY = 0.01
"""Share of rows from which a fault of single rows is a warning; chosen here: below one row in a
hundred it hardly moves training, but is still told."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a finding usually means and what to do about it."""

    means: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was seen."""

    name: str
    level: Level
    sets: tuple[str, ...]
    count: int
    of: int
    text: str
    examples: tuple[Json, ...] = ()

    def to_json(self) -> Json:
        """With `share` and the explanation of its name."""
        explanation = EXPLANATIONS[self.name]
        return {
            "name": self.name,
            "level": self.level,
            "sets": list(self.sets),
            "count": self.count,
            "of": self.of,
            "share": self.count / self.of if self.of else 0.0,
            "examples": list(self.examples),
            "text": self.text,
            "means": explanation.means,
            "try": explanation.remedy,
        }


@dataclass(frozen=True, slots=True)
class Draft:
    """A finding, and the rows (set, number from 0) whose place and prompt are still to be shown."""

    finding: Finding
    rows: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of_set(cls, set_name: str, finding: Finding, rows: npt.ArrayLike = ()) -> Draft:
        """A finding and the first of its rows, all of one set."""
        numbers = np.asarray(rows, np.int64)[:EXAMPLES]
        return cls(finding, tuple((set_name, int(number)) for number in numbers))


@dataclass(slots=True)
class Tally:
    """Counts faults of single rows while they pass, and keeps the first examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Json]] = field(default_factory=dict)

    def add(self, name: str, place: str, text: str) -> None:
        """Counts one row; `text` is the part that shows the fault."""
        self.counts[name] = self.counts.get(name, 0) + 1
        kept = self.examples.setdefault(name, [])
        if len(kept) < EXAMPLES:
            kept.append(example(place, text))


def example(place: str, text: str) -> Json:
    """A place and a short text of it."""
    return {"place": place, "text": clip(text)}


def clip(text: str, length: int = CLIP) -> str:
    """The text on one line, cut to `length` characters; what does not print is escaped."""
    line = " ".join(text[: 4 * length].split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= length else f"{line[: length - 1]}…"


def level_of(share: float, warning: float = MANY) -> Level:
    """`warning` from that share on."""
    return "warning" if share >= warning else "note"


def percent(share: float) -> str:
    """A share for a sentence, with one decimal below 10 %."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


EXPLANATIONS = {
    "duplicate_rows": Explanation(
        "The same prompt with the same answers, counted as new evidence each time.",
        "Remove the copies, or give weight to one row instead; look for a file that was added "
        "twice.",
    ),
    "repeated_judgements": Explanation(
        "Pairs were judged more than once: good for measuring agreement, but rows of one pair are "
        "not independent.",
        "Read the agreement in the statistics; keep all rows, or one per pair by majority.",
    ),
    "contradictory_labels": Explanation(
        "The same two candidates were preferred in opposite ways. No reward model can satisfy "
        "both: accuracy has a ceiling, and the loss learns a margin near zero.",
        "Look at the examples with the annotators; mark pairs that cannot be decided as ties, or "
        "take the majority.",
    ),
    "overlapping_prompts": Explanation(
        "Prompts for evaluation are also in a set to train on: results on them are too good.",
        "Nothing where the data stage splits the rows, which sets exact copies aside; else remove "
        "them from the training set.",
    ),
    "near_duplicate_prompts": Explanation(
        "Prompts that differ in a few words: less variety than the row count suggests, and copies "
        "can fall on two sides of a split.",
        "Give near copies the same group, so that a split keeps them together, or keep one of "
        "each. Long shared boilerplate belongs in data.instruction instead.",
    ),
    "near_duplicate_held_out": Explanation(
        "Prompts for evaluation have a near copy among the prompts that training or the choice of "
        "a checkpoint sees: results on them are too good. Splits set exact copies aside, not "
        "these.",
        "Give both the same group, or remove one of the two.",
    ),
    "overlapping_validation": Explanation(
        "Prompts for validation are also trained on: the checkpoint that has learnt them by heart "
        "looks best.",
        "Remove them from one side; the data stage never splits one prompt.",
    ),
    "near_duplicate_validation": Explanation(
        "Prompts for validation have a near copy among the training prompts: it favours the "
        "checkpoint that has learnt them by heart.",
        "Give near copies the same group, so that a split keeps them together.",
    ),
    "contained_prompts": Explanation(
        "Prompts for evaluation stand word for word, case and punctuation apart, inside longer "
        "training prompts.",
        "Remove them from one side, or give both the same group.",
    ),
    "length_bias": Explanation(
        "The choice goes with length: a reward model can be right by counting words, and the "
        "policy then learns length in place of quality.",
        "Compare the reward model with this share, not with one half; collect pairs of similar "
        "length, or balance them; watch completion length during policy training.",
    ),
    "position_bias": Explanation(
        "One side is chosen more often than chance: annotators favour a position, the candidates "
        "were not shuffled before they were shown, or a file that names a chosen text first is "
        "among others.",
        "Look at each file by itself (`amenable data check FILE --content`). Ask how sides were "
        "assigned, and shuffle them when collecting; training itself does not see the side.",
    ),
    "one_sided_choice": Explanation(
        "Every choice is the same side. That is so in files that name a chosen and a rejected "
        "text; in any other file the labels are wrong or were never shuffled.",
        "Check one row by eye. Position bias cannot be measured here.",
    ),
    "dominant_annotator": Explanation(
        "Most rows are by one annotator: the reward model learns that person's taste.",
        "Give the others' rows more weight, or collect more from them.",
    ),
    "one_sided_annotator": Explanation(
        "An annotator picks nearly always the same side, whatever is shown there.",
        "Look at these rows; leave the annotator's rows out if they were clicked through.",
    ),
    "different_prompts": Explanation(
        "A simple classifier tells the two sets of prompts apart by their words. The reward model "
        "is then asked about prompts unlike those it was trained on, and its scores mean less.",
        "Use prompts of one source for both; read the words that tell them apart: often it is a "
        "template or an instruction that only one set has.",
    ),
    "different_prompt_lengths": Explanation(
        "Prompts of the two sets differ much in length.",
        "Check for an instruction or a document that only one set has.",
    ),
    "control_characters": Explanation(
        "Characters that do not print, from terminals or broken conversions. Models learn to "
        "write them.",
        "Remove them when the file is made.",
    ),
    "carriage_returns": Explanation(
        "Line ends of Windows: other tokens than plain line ends, and models learn to write them.",
        "Convert line ends; not needed where all rows have them.",
    ),
    "replacement_characters": Explanation(
        "U+FFFD stands where a character was lost when the text was decoded.",
        "Decode the source again with its right encoding.",
    ),
    "mojibake": Explanation(
        "Signs of UTF-8 read as Latin-1 or Windows-1252, as in 'Ã©' for 'é'.",
        "Decode the source again as UTF-8.",
    ),
    "invisible_characters": Explanation(
        "Zero-width or direction characters: texts that look equal are not, and tokens change.",
        "Remove them, except in scripts that need them.",
    ),
    "markup": Explanation(
        "HTML tags or entities are left in the text; models learn to write them.",
        "Convert the source to plain text, unless the task is about HTML.",
    ),
    "other_scripts": Explanation(
        "Texts mostly in another script than the rest of the set.",
        "Keep them if the model is to answer in those languages; else filter them out.",
    ),
    "long_texts": Explanation(
        "Texts many times longer than the median: they are cut at the token limits, and may be "
        "files or logs pasted whole.",
        "Look at the examples; raise data.max_prompt_tokens or drop them.",
    ),
    "answer_in_prompt": Explanation(
        "The answer to learn stands word for word in the prompt: copying is rewarded.",
        "Right for extractive tasks; else the prompt was made from a transcript that includes the "
        "answer: cut it there.",
    ),
    "label_in_answer": Explanation(
        "Answers begin with labels, such as 'chosen:', that give the choice away. A reward model "
        "needs to read nothing else.",
        "Remove the labels from the texts.",
    ),
    "role_markers": Explanation(
        "Answers contain the marks of turns, such as 'Human:': the model learns to go on with the "
        "user's part.",
        "Cut answers at the next turn; give conversations as messages.",
    ),
    "output_copies_prompt": Explanation(
        "The demonstration's output is its prompt.",
        "Look for a column that was read twice.",
    ),
    "same_candidates": Explanation(
        "The two candidates differ in white space or case at most, and yet one was chosen.",
        "Mark them as ties or remove them: the choice is noise, or is about layout alone.",
    ),
    "prefix_candidates": Explanation(
        "One candidate is the beginning of the other: one was cut off by a length limit.",
        "Fine as a lesson on unfinished answers; else generate with a higher limit.",
    ),
    "empty_answers": Explanation(
        "Answers without a letter, digit or pictograph.",
        "Remove the rows, unless silence is the right answer.",
    ),
    "placeholder_answers": Explanation(
        "Answers such as 'N/A' or 'none', which often stand where an export had no answer.",
        "Look at the examples: right where the question has such an answer; else remove the rows.",
    ),
}
"""Every finding by its name."""
