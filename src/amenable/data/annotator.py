"""A stated, seeded stand-in for people who choose the better of two answers.

Its true preference is known, which theirs never is: over-optimisation can be seen.
"""

from __future__ import annotations

import re
from collections import Counter

from amenable.config.collect import CollectConfig
from amenable.data.schemas import Choice, Prompt
from amenable.data.splits import rank
from amenable.errors import DataError

_WORD = re.compile(r"\w+(?:['.-]\w+)*")

_STOP_WORDS = frozenset(
    """
    a about after all also an and any are as at be been before being between both but by can could
    did do does during each either for from further had has have having he her here his how i if in
    into is it its itself may might more most must my no nor not of on once only onto or other our
    out over own per s same shall she should so some such t than that the their them then there
    these they this those through to too under until up us very via was we were what when where
    whether which while who whose why will with within without would you your
    """.split()  # noqa: SIM905 - a paragraph is easier to read than a list of 127 lines
)


def words(text: str) -> list[str]:
    """Casefolded words; punctuation around them is dropped, inside them (`x.y`, `don't`) kept."""
    return _WORD.findall(text.casefold())


def stem(word: str) -> str:
    """The word without a common ending: `returns`, `returned`, `returning` are `return`.

    Crude on purpose (no dictionary, no exceptions): first a plural `s`, then `ing`, `ed` or `e`,
    while three letters are left.
    """
    word = word.removesuffix("'s")
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        word = word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]
    for ending in ("ing", "ed", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def unigram_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, in [0, 1]; 0 if either text has none.

    A word counts as often as it occurs in both.

    Source: the token F1 of SQuAD, Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1 (articles
        are kept here).
    """
    own, other = Counter(words(text)), Counter(words(reference))
    shared = (own & other).total()
    return 2 * shared / (own.total() + other.total()) if shared else 0.0


def grounding(text: str, source: str) -> float:
    """Share of the content words of `text` that `source` has too, endings apart.

    In [0, 1]; 0 where `text` has no content words.
    """
    content = [stem(word) for word in words(text) if word not in _STOP_WORDS]
    known = {stem(word) for word in words(source)}
    return sum(word in known for word in content) / len(content) if content else 0.0


class SimulatedAnnotator:
    """Scores an answer by a fixed formula and chooses by it, with a stated rate of wrong choices.

    score = closeness_weight * F1(answer, author's own line) + grounding_weight * grounding(answer,
    input)
            - brevity_weight * max(0, words - brevity_words)

    An answer without a word scores below any other of up to a hundred words: -(1 + 100 *
    brevity_weight).

    Args:
        config: weights and noise rate.
        seed: the run's seed; with the key of a choice it decides whether that choice is a wrong
            one.
    """

    def __init__(self, config: CollectConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def score(self, prompt: Prompt, completion: str) -> float:
        """The noise-free score: the true preference, about -1 to 1.5 with the default weights.

        Args:
            prompt: with the author's own line as `meta["output_text"]`.
            completion: the answer.

        Raises:
            DataError: the prompt has no such line.
        """
        config, reference = self.config, reference_of(prompt)
        length = len(words(completion))
        if length == 0:
            return -(1.0 + 100 * config.brevity_weight)
        return (
            config.closeness_weight * unigram_f1(completion, reference)
            + config.grounding_weight * grounding(completion, prompt.text)
            - config.brevity_weight * max(0, length - config.brevity_words)
        )

    def choose(self, prompt: Prompt, first: str, second: str, key: str) -> Choice:
        """The answer of the higher score, or the other by `noise`; a tie where they are equal.

        Whether it errs depends on the seed and `key` alone, not on the order of calls: with the
        sides swapped the same key gives the swapped choice.

        Args:
            prompt: with the author's own line as `meta["output_text"]`.
            first: one answer.
            second: another.
            key: names this choice; a new key is a new, independent draw.

        Raises:
            DataError: the prompt has no author's line.
        """
        scores = self.score(prompt, first), self.score(prompt, second)
        if scores[0] == scores[1]:
            return Choice.TIE
        better = Choice.FIRST if scores[0] > scores[1] else Choice.SECOND
        errs = rank(key, f"annotator {self.seed}") < self.config.noise
        return better.swapped() if errs else better

    def describe(self) -> str:
        """One honest sentence for screen and report."""
        config = self.config
        return (
            "The annotator is a SIMULATION, not people: it prefers the answer with the higher "
            f"{config.closeness_weight:g} x word F1 with the author's own line "
            f"+ {config.grounding_weight:g} x share of content words found in the input "
            f"- {config.brevity_weight:g} a word beyond {config.brevity_words}, "
            f"and picks the other one in {config.noise:.0%} of its choices."
        )


def reference_of(prompt: Prompt) -> str:
    """The author's own line: `meta["output_text"]`.

    Raises:
        DataError: there is none.
    """
    reference = prompt.meta.get("output_text")
    if not isinstance(reference, str) or not reference.strip():
        raise DataError(
            f"prompt {prompt.id!r} has no author's line for the simulated annotator to compare "
            "with; give prompt rows an output_text, or name data.preferences and set "
            'collect.annotator = "none" (with a ready reward, that alone)',
            field="output_text",
        )
    return reference
