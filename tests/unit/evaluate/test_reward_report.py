from __future__ import annotations

import json

import numpy as np
import pytest

from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker
from amenable.errors import DataError
from amenable.evaluate.reward_report import bag_of_words_accuracy, reward_report


def pair(first: str, second: str, choice: Choice, group: str = "g") -> Preference:
    prompt = Prompt(messages=(Message(Speaker.USER, "say"),), id=group, group=group)
    return Preference(prompt=prompt, candidate_0=first, candidate_1=second, choice=choice)


def good_word_pairs(rng: np.random.Generator, n: int, prefix: str) -> list[Preference]:
    """The text with `well` wins; every text has five words, sides are random."""
    words = np.array(["ant", "bee", "cat", "dog", "elk", "fox"])
    pairs = []
    for k in range(n):
        with_it = " ".join(rng.permutation([*rng.choice(words, 4), "well"]))
        without = " ".join(rng.permutation([*rng.choice(words, 4), "evil"]))
        one = pair(with_it, without, Choice.FIRST, f"{prefix}{k}")
        pairs.append(one if rng.random() < 0.5 else one.swap())
    return pairs


RNG = np.random.default_rng(0)
TRAIN, TEST = good_word_pairs(RNG, 120, "train"), good_word_pairs(RNG, 60, "test")


def test_accuracy_counts_equal_scores_one_half_and_leaves_ties_out() -> None:
    test = [pair("a", "b c", Choice.FIRST, str(k)) for k in range(4)] + [pair("a", "b", Choice.TIE)]
    report = reward_report([], test, [1.0, -1.0, 0.0, 2.0, 9.0], seed=0)
    assert report["accuracy"] == pytest.approx(2.5 / 4)
    assert (report["pairs_eval"], report["ties_eval"], report["pairs_train"]) == (4, 1, 0)
    assert report["bag_of_words_accuracy"] is None
    assert report["longest_wins_accuracy"] == 0.0
    assert report["shortest_wins_accuracy"] == 1.0


def test_bag_of_words_learns_a_word_and_nothing_from_noise() -> None:
    assert bag_of_words_accuracy(TRAIN, TEST, 0) == 1.0
    shuffled = [
        p if RNG.random() < 0.5 else pair(p.rejected, p.chosen, Choice.FIRST, p.prompt.group)
        for p in TRAIN
    ]
    noisy = [
        p if RNG.random() < 0.5 else pair(p.rejected, p.chosen, Choice.FIRST, p.prompt.group)
        for p in TEST
    ]
    assert 0.3 < bag_of_words_accuracy(shuffled, noisy, 0) < 0.7


def test_bag_of_words_learns_that_short_is_good() -> None:
    texts = [("x" + " y" * k, "x" + " y" * (k + 3)) for k in range(1, 21)]
    train = [pair(a, b, Choice.FIRST, str(k)) for k, (a, b) in enumerate(texts)]
    assert bag_of_words_accuracy(train, [t.swap() for t in train], 0) == 1.0


def test_order_of_the_candidates_changes_nothing() -> None:
    margins = RNG.normal(1, 1, len(TEST))
    there = reward_report(TRAIN, TEST, margins, seed=0)
    back = reward_report([p.swap() for p in TRAIN], [p.swap() for p in TEST], margins, seed=0)
    assert json.loads(json.dumps(there)) == back


def test_interval_is_wider_when_prompts_repeat() -> None:
    margins = np.repeat([1.0, -1.0, 1.0], 20)
    apart = reward_report([], [pair("a", "b", Choice.FIRST, str(k)) for k in range(60)], margins, 0)
    together = reward_report(
        [], [pair("a", "b", Choice.FIRST, str(k // 5)) for k in range(60)], margins, 0
    )
    width = [r["accuracy_ci95"][1] - r["accuracy_ci95"][0] for r in (apart, together)]
    assert apart["accuracy"] == together["accuracy"]
    assert width[1] > 1.5 * width[0]


def test_length_correlation_is_one_when_the_score_is_the_length() -> None:
    test = [pair("w " * a, "w " * b, Choice.FIRST, f"{a}{b}") for a in (1, 3, 4) for b in (2, 6, 9)]
    margins = [len(t.chosen.split()) - len(t.rejected.split()) for t in test]
    assert reward_report([], test, margins, 0)["length_correlation"] == pytest.approx(1.0)
    same = [pair("a", "b", Choice.FIRST, str(k)) for k in range(3)]
    assert reward_report([], same, [1, 2, 3], 0)["length_correlation"] is None


def test_calibrated_margins_are_found_calibrated() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 1.5, 2000)
    margins = np.where(rng.random(2000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    test = [pair("a", "b", Choice.FIRST, str(k)) for k in range(2000)]
    report = reward_report([], test, margins, seed=0)
    assert report["ece"] < report["ece_null95"]
    assert report["temperature"] == pytest.approx(1.0, abs=0.1)
    assert (
        sum(b["n"] for b in report["calibration"])
        == sum(b["n"] for b in report["by_margin"])
        == 2000
    )
    accuracies = [b["accuracy"] for b in report["by_margin"]]
    assert accuracies[-1] > accuracies[0] + 0.2


@pytest.mark.parametrize(
    ("test", "margins", "message"),
    [
        ([pair("a", "b", Choice.FIRST)], [], "one finite margin"),
        ([pair("a", "b", Choice.FIRST)], [float("nan")], "one finite margin"),
        ([pair("a", "b", Choice.TIE)], [0.0], "no held-out pair has a winner"),
        ([], [], "no held-out pair has a winner"),
    ],
)
def test_useless_input_is_refused(
    test: list[Preference], margins: list[float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        reward_report([], test, margins, seed=0)
