from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

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


def random_pairs(rng: np.random.Generator, n: int = 300) -> list[Preference]:
    """Pairs of 1 to 30 words on 80 prompts of different lengths, with tags."""
    pairs = []
    for _ in range(n):
        number = int(rng.integers(80))
        words = rng.integers(1, 30, 2)
        prompt = Prompt(
            messages=(Message(Speaker.USER, "say " * (number + 1)),),
            id=str(number),
            group=f"g{number}",
            meta={"tags": ["even" if number % 2 == 0 else "odd"]},
        )
        one, two = ("w " * int(words[0])) + "x", ("w " * int(words[1])) + "yy"
        pairs.append(
            Preference(prompt=prompt, candidate_0=one, candidate_1=two, choice=Choice.FIRST)
        )
    return pairs


def test_p_value_is_an_exact_binomial_of_prompts() -> None:
    """By scipy, on the prompts of which more than half of the pairs are right."""
    rng = np.random.default_rng(3)
    pairs = random_pairs(rng)
    margins = rng.normal(0.2, 1, 300)
    margins[:20] = 0.0
    surplus: dict[str, float] = {}
    for p, margin in zip(pairs, margins, strict=True):
        surplus[p.prompt.group] = surplus.get(p.prompt.group, 0.0) + float(np.sign(margin))
    wins = sum(value > 0 for value in surplus.values())
    losses = sum(value < 0 for value in surplus.values())
    assert 0 < wins + losses < len(surplus), "some prompts are undecided"
    expected = binomtest(wins, wins + losses).pvalue
    found = reward_report([], pairs, margins, 0)["accuracy_p_value"]
    assert found == pytest.approx(expected, abs=1e-9)


def test_accuracy_by_length_by_brute_force() -> None:
    rng = np.random.default_rng(4)
    pairs = random_pairs(rng)
    margins = rng.normal(0.3, 1, 300)
    margins[:10] = 0.0
    found = reward_report([], pairs, margins, 0)
    kinds: dict[str, list[float]] = {"matched": [], "longer": [], "shorter": []}
    for p, margin in zip(pairs, margins, strict=True):
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        chosen, rejected = len(p.chosen.split()), len(p.rejected.split())
        if abs(chosen - rejected) <= 0.1 * max(chosen, rejected):
            kinds["matched"].append(right)
        if (chosen, len(p.chosen)) > (rejected, len(p.rejected)):
            kinds["longer"].append(right)
        if (chosen, len(p.chosen)) < (rejected, len(p.rejected)):
            kinds["shorter"].append(right)
    names = {"matched": "length_matched", "longer": "longer_better", "shorter": "shorter_better"}
    for kind, name in names.items():
        assert len(kinds[kind]) > 10
        assert found[f"{name}_pairs"] == len(kinds[kind])
        assert found[f"{name}_accuracy"] == pytest.approx(np.mean(kinds[kind]), abs=1e-9)
        low, high = found[f"{name}_ci95"]
        assert low < found[f"{name}_accuracy"] < high
    balanced = (np.mean(kinds["longer"]) + np.mean(kinds["shorter"])) / 2
    assert found["length_balanced_accuracy"] == pytest.approx(balanced, abs=1e-9)


def test_a_score_that_is_the_length_is_a_coin_at_equal_weight_of_both_ways() -> None:
    pairs = random_pairs(np.random.default_rng(5))
    lengths = [(len(p.chosen.split()), len(p.rejected.split())) for p in pairs]
    kept = [k for k, (chosen, rejected) in enumerate(lengths) if chosen > 12 and chosen != rejected]
    margins = [lengths[k][0] - lengths[k][1] for k in kept]
    found = reward_report([], [pairs[k] for k in kept], margins, 0)
    assert found["accuracy"] > 0.6
    assert found["length_balanced_accuracy"] == pytest.approx(0.5, abs=1e-12)
    low, high = found["length_balanced_ci95"]
    assert low < 0.5 < high


def test_a_kind_of_pair_that_is_missing_has_no_figure() -> None:
    found = reward_report(
        [], [pair("a b c", "d", Choice.FIRST, str(k)) for k in range(9)], [1] * 9, 0
    )
    for name in ("length_matched", "shorter_better", "length_balanced"):
        assert found[f"{name}_accuracy"] is None
        assert found[f"{name}_ci95"] is None
    assert (found["length_matched_pairs"], found["longer_better_pairs"]) == (0, 9)
    assert found["slices"] == []


def test_slices_by_prompt_length_and_tag_with_holm() -> None:
    """80 prompts that come several times: quarters of twenty prompts each, by their own words."""
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(6)
    pairs = random_pairs(rng, 600)
    assert len({p.prompt.id for p in pairs}) == 80
    margins = rng.normal(0.4, 1, 600)
    rows = reward_report([], pairs, margins, 0)["slices"]
    assert [row["slice"] for row in rows] == [
        *(f"prompt length: {name}" for name in ("shortest", "second", "third", "longest")),
        *("tag: even", "tag: odd"),
    ]
    assert [row["prompts"] for row in rows] == [20, 20, 20, 20, 40, 40]
    members = [[k for k, p in enumerate(pairs) if int(p.prompt.id) // 20 == n] for n in range(4)]
    members += [[k for k, p in enumerate(pairs) if int(p.prompt.id) % 2 == n] for n in range(2)]
    for row, own in zip(rows, members, strict=True):
        assert row["pairs"] == len(own)
        assert row["accuracy"] == pytest.approx(np.mean(margins[own] > 0), abs=1e-9)
        alone = reward_report([], [pairs[k] for k in own], margins[own], 0)
        assert row["accuracy_ci95"] == alone["accuracy_ci95"]
        assert row["p_value"] == alone["accuracy_p_value"]
    raised = multitest.multipletests([row["p_value"] for row in rows], method="holm")[1]
    assert [row["p_holm"] for row in rows] == pytest.approx(raised, abs=1e-9)


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
