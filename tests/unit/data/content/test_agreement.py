from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amenable.data.content.agreement import (
    Judgements,
    count_values,
    krippendorff_alpha,
    pair_key,
    pairwise_agreement,
)
from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker


def preference(
    text: str = "q",
    first: str = "a",
    second: str = "b",
    choice: Choice = Choice.FIRST,
    annotator: str | None = None,
    strength: int | None = None,
) -> Preference:
    prompt = Prompt(messages=(Message(Speaker.USER, text),), id="x", group=text)
    return Preference(
        prompt=prompt,
        candidate_0=first,
        candidate_1=second,
        choice=choice,
        annotator=annotator,
        strength=strength,
    )


def judgements(*rows: Preference) -> Judgements:
    found = Judgements()
    for row in rows:
        found.add(row)
    return found


def test_alpha_of_a_hand_worked_example() -> None:
    """Two annotators, ten units, nominal, worked by hand.

    Values (a, b): 6 times (0, 0), 2 times (1, 1), once (0, 1), once (1, 0).
    Coincidences: o_00 = 12, o_11 = 4, o_01 = o_10 = 2; n_0 = 14, n_1 = 6, n = 20.
    D_o = 4; Σ n_c n_k over c ≠ k = 2 * 14 * 6 = 168; alpha = 1 - 19 * 4 / 168 = 92 / 168.
    """
    counts = [[2, 0]] * 6 + [[0, 2]] * 2 + [[1, 1]] * 2
    found = krippendorff_alpha(counts, (0, 1), "nominal")
    assert found.value == pytest.approx(92 / 168, abs=1e-15)
    assert (found.units, found.values, found.reason) == (10, 20, None)


def test_interval_alpha_of_a_hand_worked_example() -> None:
    """Units (1, 1), (1, 3), (3, 3): o_11 = 2, o_33 = 2, o_13 = o_31 = 1; n_1 = n_3 = 3, n = 6.

    δ² = 4: observed 2 * 4 = 8, expected 2 * 9 * 4 = 72; alpha = 1 - 5 * 8 / 72 = 4 / 9.
    """
    counts = [[2, 0, 0], [1, 0, 1], [0, 0, 2]]
    found = krippendorff_alpha(counts, (1, 2, 3), "interval")
    assert found.value == pytest.approx(4 / 9, abs=1e-15)


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(5))
def test_alpha_equals_the_krippendorff_package(metric: str, seed: int) -> None:
    """Random ratings of 7 annotators, a third of them missing."""
    krippendorff = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 10, 40)
    ratings = np.clip(truth + rng.integers(-2, 3, (7, 40)), 1, 9).astype(float)
    ratings[rng.random(ratings.shape) < 1 / 3] = np.nan
    scale = tuple(range(1, 10))
    counts = np.stack([(ratings == value).sum(0) for value in scale], axis=1)
    expected = krippendorff.alpha(
        value_counts=counts, value_domain=list(scale), level_of_measurement=metric
    )
    found = krippendorff_alpha(counts, scale, metric)  # type: ignore[arg-type]
    assert found.value == pytest.approx(expected, abs=1e-12)


def test_perfect_agreement_is_one_and_opposite_judgements_are_negative() -> None:
    assert krippendorff_alpha([[3, 0], [0, 2]], (0, 1), "nominal").value == 1
    assert krippendorff_alpha([[1, 1]] * 4, (0, 1), "nominal").value < 0  # type: ignore[operator]


def test_independent_judgements_have_an_alpha_near_zero() -> None:
    ones = np.random.default_rng(1).binomial(3, 0.4, 4000)
    found = krippendorff_alpha(np.stack([3 - ones, ones], 1), (0, 1), "nominal")
    assert found.value == pytest.approx(0, abs=0.03)


def test_undefined_alphas_say_why() -> None:
    alone = krippendorff_alpha([[1, 0], [0, 1]], (0, 1), "nominal")
    assert alone.to_json() == {
        "value": None,
        "units": 0,
        "values": 0,
        "reason": "no pair was judged by two annotators",
    }
    same = krippendorff_alpha([[2, 0], [3, 0], [0, 1]], (0, 1), "ordinal")
    assert same.value is None
    assert same.units == 2
    assert "all judgements are the same" in str(same.reason)


def test_counts_and_values_must_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        krippendorff_alpha([[1, 1]], (0, 1, 2), "nominal")


def test_pairwise_agreement_weighs_pairs() -> None:
    """A unit of 3 (2 against 1) has 1 equal pair of 3, one of 2 equal values 1 of 1: 2 of 4."""
    assert pairwise_agreement([[2, 1], [0, 2], [1, 0]]) == pytest.approx(0.5)
    assert pairwise_agreement([[1, 0]]) is None


def test_count_values() -> None:
    units = np.array([5, 9, 5], np.uint64)
    assert count_values(units, np.array([0, -1, 1]), (-1, 0, 1)).tolist() == [[0, 1, 1], [1, 0, 0]]


def test_a_pair_the_other_way_round_is_the_same_unit() -> None:
    one, other = preference("q").prompt, preference("r").prompt
    assert pair_key(one, "a", "b") == (pair_key(one, "b", "a ")[0], False)
    assert pair_key(one, "b", "a")[1]
    assert pair_key(one, "a", "b")[0] != pair_key(other, "a", "b")[0]


def test_another_system_message_is_another_unit() -> None:
    """ "Be brief" and "be long" ask for opposite choices of the same two answers."""
    brief, long = (
        replace(
            preference(choice=choice),
            prompt=Prompt(
                messages=(Message(Speaker.SYSTEM, text), Message(Speaker.USER, "q")),
                id="x",
                group="q",
            ),
        )
        for text, choice in (("Be brief.", Choice.FIRST), ("Be long.", Choice.SECOND))
    )
    found = judgements(brief, long)
    assert len(set(found.units)) == 2
    assert len(set(found.prompts)) == 1
    assert found.agreement()["judged_twice"] == 0


def test_agreement_turns_choices_and_strengths_to_one_order() -> None:
    shown = preference(annotator="ann", choice=Choice.FIRST, strength=2)
    turned = preference(first="b", second="a", annotator="bo", choice=Choice.SECOND, strength=8)
    other = preference("r", annotator="ann", choice=Choice.SECOND, strength=9)
    again = preference("r", annotator="bo", choice=Choice.SECOND, strength=9)
    found = judgements(shown, turned, other, again).agreement()
    assert (found["units"], found["judged_twice"], found["pairwise"]) == (2, 2, 1)
    assert found["choice"]["value"] == 1
    assert found["strength_ordinal"]["value"] == 1
    assert found["strength_interval"]["values"] == 4


def test_ties_are_a_value_of_their_own() -> None:
    found = judgements(
        preference(annotator="ann"), preference(annotator="bo", choice=Choice.TIE)
    ).agreement()
    assert found["pairwise"] == 0
    assert found["choice"]["value"] == 0  # two values that differ: 1 - 1 * 2 / 2
    assert found["strength_ordinal"]["value"] is None


def test_a_second_judgement_by_the_same_annotator_is_left_out() -> None:
    twice = [preference(annotator="ann"), preference(annotator="ann", choice=Choice.SECOND)]
    assert judgements(*twice).agreement()["judged_twice"] == 0
    assert judgements(*twice).independent().tolist() == [True, False]
    nameless = [preference(), preference()]
    assert judgements(*nameless).agreement()["judged_twice"] == 1


def test_agreement_of_no_rows() -> None:
    found = Judgements().agreement()
    assert (found["units"], found["judged_twice"], found["pairwise"]) == (0, 0, None)
    assert found["choice"]["value"] is None
