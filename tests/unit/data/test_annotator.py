from __future__ import annotations

import pytest

from amenable.config.collect import CollectConfig
from amenable.data.annotator import SimulatedAnnotator, grounding, stem, unigram_f1, words
from amenable.data.schemas import Choice, Message, Prompt, Speaker
from amenable.errors import DataError

CERTAIN = CollectConfig(annotator="simulated", noise=0.0)


def prompt(reference: object = "Return the sum of two numbers.") -> Prompt:
    text = "Both arguments are numbers, and their sum is returned."
    meta = {} if reference is None else {"output_text": reference}
    return Prompt(messages=(Message(Speaker.USER, text),), id="p1", group="g", meta=meta)


def test_words_drop_case_and_outer_punctuation() -> None:
    assert words('Don\'t call "x.y()", now!') == ["don't", "call", "x.y", "now"]
    assert words(" ... -- ") == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("returns", "return"),
        ("returned", "return"),
        ("returning", "return"),
        ("values", "valu"),
        ("value", "valu"),
        ("strings", "str"),
        ("string", "str"),
        ("entries", "entry"),
        ("entry", "entry"),
        ("class", "class"),
        ("classes", "class"),
        ("axis", "axis"),
        ("bus", "bus"),
        ("is", "is"),
        ("ties", "tie"),
        ("user's", "user"),
        ("red", "red"),
    ],
)
def test_stems_of_one_word_are_equal(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_unigram_f1_by_hand() -> None:
    """3 of 4 words are in the reference of 6: 2 * 3 / (4 + 6); "the" counts once."""
    assert unigram_f1("the sum of the", "Return the sum of two numbers.") == pytest.approx(0.6)
    assert unigram_f1("A B", "b a") == 1.0
    assert unigram_f1("", "a") == 0.0
    assert unigram_f1("", "") == 0.0


def test_grounding_by_hand() -> None:
    """Content words: returns (there as returned), sum (there), product (not there)."""
    source = "The sum is returned."
    assert grounding("It returns the sum and the product.", source) == pytest.approx(2 / 3)
    assert grounding("of the", source) == 0.0
    assert grounding("", source) == 0.0


def test_score_by_hand() -> None:
    """F1 2*2/(3+6) = 4/9; content words return, sum: both found, 0.5; 3 words are brief."""
    annotator = SimulatedAnnotator(CERTAIN, seed=0)
    assert annotator.score(prompt(), "Returns the sum.") == pytest.approx(4 / 9 + 0.5)


def test_every_word_beyond_the_free_ones_costs() -> None:
    annotator = SimulatedAnnotator(CERTAIN, seed=0)
    eight, ten = "xx " * 8, "xx " * 10
    assert annotator.score(prompt(), eight) == 0.0
    assert annotator.score(prompt(), ten) == pytest.approx(-0.1)


@pytest.mark.parametrize("brevity_weight", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("empty", ["", " \n", "..."])
def test_an_empty_answer_is_worse_than_a_hundred_wrong_words(
    brevity_weight: float, empty: str
) -> None:
    annotator = SimulatedAnnotator(CollectConfig(brevity_weight=brevity_weight), seed=0)
    assert annotator.score(prompt(), empty) < annotator.score(prompt(), "xx " * 100)


def test_chooses_the_better_and_ties_the_equal() -> None:
    annotator = SimulatedAnnotator(CERTAIN, seed=0)
    good, bad = "Return the sum of two numbers.", "Nothing of this sort."
    assert annotator.choose(prompt(), good, bad, "k") is Choice.FIRST
    assert annotator.choose(prompt(), bad, good, "k") is Choice.SECOND
    assert annotator.choose(prompt(), good, good, "k") is Choice.TIE


def test_noise_has_the_stated_rate_depends_on_the_key_and_swaps_with_the_sides() -> None:
    config = CollectConfig(annotator="simulated", noise=0.25)
    good, bad = "Return the sum of two numbers.", "Nothing of this sort."
    annotator = SimulatedAnnotator(config, seed=3)
    keys = [f"pair {number}" for number in range(2000)]
    chosen = [annotator.choose(prompt(), good, bad, key) for key in keys]
    errors = sum(choice is Choice.SECOND for choice in chosen)
    assert abs(errors - 500) < 4 * 19.4  # sqrt(2000 * 0.25 * 0.75) = 19.4
    backwards = [annotator.choose(prompt(), bad, good, key) for key in reversed(keys)]
    assert [choice.swapped() for choice in reversed(backwards)] == chosen
    other = SimulatedAnnotator(config, seed=4)
    assert [other.choose(prompt(), good, bad, key) for key in keys] != chosen


@pytest.mark.parametrize("reference", [None, "", 3])
def test_a_prompt_without_the_authors_line_is_refused(reference: object) -> None:
    annotator = SimulatedAnnotator(CERTAIN, seed=0)
    with pytest.raises(DataError, match="prompt 'p1' has no author's line") as caught:
        annotator.score(prompt(reference), "x")
    assert "field 'output_text'" in str(caught.value)
    assert "give prompt rows an output_text, or name data.preferences" in str(caught.value)


def test_describes_itself_as_a_simulation() -> None:
    text = SimulatedAnnotator(CollectConfig(noise=0.1), seed=0).describe()
    assert text.startswith("The annotator is a SIMULATION, not people")
    assert "0.05 a word beyond 8, and picks the other one in 10% of its choices." in text
