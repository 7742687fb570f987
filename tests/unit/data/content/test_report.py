from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from amenable.data.content import columns
from amenable.data.content.findings import EXPLANATIONS, clip
from amenable.data.content.label_bias import clustered_share, position_share
from amenable.data.content.near_duplicates import (
    jaccard,
    near_clusters,
)
from amenable.data.content.report import content_report
from amenable.data.content.row_findings import repeated
from amenable.data.content.samples import PromptSamples, Sampled
from amenable.data.content.statistics import Item
from amenable.data.content.text_faults import faults_of_text, script_of
from amenable.data.content.two_sample import auc
from amenable.data.content.words import HashedTexts, Words, word_hashes
from amenable.data.content.words import shingles as shingles_of
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker

Json = dict[str, Any]

WORDS = ("river", "stone", "lamp", "quiet", "morning", "garden", "window", "letter", "train")
WORDS += ("copper", "winter", "bread", "music", "island", "paper", "mirror", "silver", "forest")
WORDS += ("market", "candle", "bridge", "harbour", "orange", "planet", "engine", "feather")


def prose(seed: int, words: int = 40) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"{WORDS[rng.integers(len(WORDS))]}{rng.integers(9)}" for _ in range(words))


def prompt(text: str) -> Prompt:
    return Prompt(messages=(Message(Speaker.USER, text),), id=text[:30], group=text)


def pair(
    text: str,
    first: str | None = None,
    second: str | None = None,
    choice: Choice = Choice.FIRST,
    annotator: str | None = None,
) -> Preference:
    return Preference(
        prompt=prompt(text),
        candidate_0=f"The first answer to {len(text)} is short." if first is None else first,
        candidate_1=f"Some other answer of {len(text)} is here." if second is None else second,
        choice=choice,
        annotator=annotator,
    )


def clean_pairs(n: int = 200, start: int = 0) -> list[Item]:
    """Different prompts, choices and lengths that balance: nothing to find."""
    return [
        pair(
            prose(start + i),
            prose(10_000 + start + i, 10 + i // 2 % 2),
            prose(20_000 + start + i, 11 - i // 2 % 2),
            Choice(i % 2),
            annotator=f"annotator {i % 5 // 1}{i % 3}",
        )
        for i in range(n)
    ]


def shingles(text: str) -> Words:
    return shingles_of([word_hashes(text)], 3)[0]


def placed(rows: Sequence[Item], path: str) -> Iterator[tuple[str, Item]]:
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


def report(parts: Mapping[str, Sequence[Item]], **options: Any) -> Json:
    def part(name: str) -> Any:
        return lambda: placed(parts[name], f"{name}.jsonl")

    found = content_report({name: part(name) for name in parts}, **options)
    json.dumps(found, allow_nan=False)
    return found


def of_name(found: Json, name: str) -> list[Json]:
    return [finding for finding in found["findings"] if finding["name"] == name]


def only(found: Json, name: str) -> Json:
    (finding,) = of_name(found, name)
    return finding


def places(finding: Json) -> list[str]:
    return [example["place"] for example in finding["examples"]]


def test_clean_sets_have_no_findings() -> None:
    found = report(
        {
            "preferences": clean_pairs(),
            "demonstrations": [
                Demonstration(prompt=prompt(prose(1000 + i)), output_text=prose(2000 + i, 12))
                for i in range(100)
            ],
            "prompts": [prompt(prose(3000 + i)) for i in range(100)],
            "evaluation_prompts": [prompt(prose(4000 + i)) for i in range(100)],
        }
    )
    assert found["findings"] == []
    assert (found["warnings"], found["notes"]) == (0, 0)
    assert found["clean"] == list(EXPLANATIONS)
    assert found["sets"]["prompts"] == {
        "kind": "prompt",
        "rows": 100,
        "prompts": 100,
        "sampled_prompts": 100,
    }
    assert found["measures"]["preferences"]["longest_wins"]["share"] == pytest.approx(0.5)
    assert found["measures"]["distance"]["preferences"]["auc"] == pytest.approx(0.5, abs=0.12)


def test_empty_sets() -> None:
    found = report({"preferences": [], "prompts": [], "evaluation_prompts": []})
    assert found["findings"] == []
    assert found["sets"]["prompts"]["rows"] == 0


def test_a_finding_has_its_explanation_and_share() -> None:
    rows = clean_pairs()
    finding = only(report({"preferences": [*rows, rows[16]]}), "duplicate_rows")
    assert finding["means"] == EXPLANATIONS["duplicate_rows"].means
    assert finding["try"] == EXPLANATIONS["duplicate_rows"].remedy
    assert (finding["count"], finding["of"]) == (1, 201)
    assert finding["share"] == 1 / 201
    assert finding["sets"] == ["preferences"]


# Duplicates and contradictions ---------------------------------------------------------------


def test_repeated_rows_are_found_whichever_way_round() -> None:
    rows = clean_pairs(50)
    first = rows[3]
    assert isinstance(first, Preference)
    found = report({"preferences": [*rows, first.swap(), first]})
    finding = only(found, "duplicate_rows")
    assert finding["level"] == "warning"  # 2 of 52
    assert places(finding) == ["preferences.jsonl:51", "preferences.jsonl:52"]
    assert finding["examples"][0]["text"] == clip(first.prompt.text)
    assert not of_name(found, "contradictory_labels")


def test_repeated_demonstrations_and_prompts() -> None:
    shown = Demonstration(prompt=prompt("Say it"), output_text="Now then")
    other = Demonstration(prompt=prompt("Say it"), output_text="Another")
    found = report(
        {"demonstrations": [shown, other, shown], "prompts": [shown.prompt, other.prompt]}
    )
    by_set = {finding["sets"][0]: finding for finding in of_name(found, "duplicate_rows")}
    assert places(by_set["demonstrations"]) == ["demonstrations.jsonl:3"]
    assert places(by_set["prompts"]) == ["prompts.jsonl:2"]


def test_opposite_choices_of_nameless_rows_are_contradictions() -> None:
    rows = clean_pairs(40)
    twice = [pair("Which?", "one", "two"), pair("Which?", "two", "one ")]
    finding = only(report({"preferences": [*rows, *twice]}), "contradictory_labels")
    assert (finding["level"], finding["count"], finding["of"]) == ("warning", 1, 1)
    assert places(finding) == ["preferences.jsonl:41", "preferences.jsonl:42"]
    assert "1 of them by the same annotator or without a name" in finding["text"]


def test_some_disagreement_between_annotators_is_a_note() -> None:
    rows: list[Item] = []
    for number in range(100):
        text, side = prose(number), Choice(number % 2)
        other = side.swapped() if number < 25 else side
        rows += [pair(text, choice=side, annotator="a"), pair(text, choice=other, annotator="b")]
    found = report({"preferences": rows})
    finding = only(found, "contradictory_labels")
    assert (finding["level"], finding["count"], finding["of"]) == ("note", 25, 100)
    assert "; 0 of them" in finding["text"]
    assert only(found, "repeated_judgements")["count"] == 100
    assert not of_name(found, "duplicate_rows")


def test_an_annotator_who_contradicts_himself_is_a_warning() -> None:
    rows: list[Item] = []
    for number in range(50):
        text, side = prose(number), Choice(number % 2)
        rows += [pair(text, choice=side, annotator="a"), pair(text, choice=side, annotator="b")]
    rows += [pair(prose(7), choice=Choice.FIRST, annotator="b")]
    finding = only(report({"preferences": rows}), "contradictory_labels")
    assert finding["level"] == "warning"
    assert "; 1 of them" in finding["text"]


def test_a_tie_contradicts_nothing() -> None:
    rows = [pair("q", choice=Choice.FIRST), pair("q", choice=Choice.TIE)]
    assert not of_name(report({"preferences": rows}), "contradictory_labels")


def test_repeated_looks_at_all_columns() -> None:
    columns = (np.array([1, 1, 2, 1, 1]), np.array([5, 6, 5, 5, 6]))
    assert repeated(columns).tolist() == [False, False, False, True, True]
    assert repeated((np.array([]),)).tolist() == []


# Between sets --------------------------------------------------------------------------------


def test_prompts_of_evaluation_and_training_overlap() -> None:
    shared = prompt(prose(7))
    found = report(
        {
            "preferences": [*clean_pairs(30, start=100), pair(shared.text, "a b", "c d")],
            "evaluation_prompts": [prompt(prose(500)), shared],
            "prompts": [prompt(prose(600)), shared],
        }
    )
    both = of_name(found, "overlapping_prompts")
    assert sorted(finding["sets"] for finding in both) == [
        ["evaluation_prompts", "preferences"],
        ["evaluation_prompts", "prompts"],
    ]
    for finding in both:
        assert finding["level"] == "warning"
        assert (finding["count"], finding["of"]) == (1, 2)
        assert places(finding) == ["evaluation_prompts.jsonl:2"]
    shared_by = {tuple(entry["sets"]): entry["prompts"] for entry in found["measures"]["overlap"]}
    assert shared_by["preferences", "prompts"] == 1
    assert not of_name(found, "near_duplicate_held_out")  # exact copies are told once


def test_which_sets_are_held_out_can_be_named() -> None:
    rows = [prompt(prose(1)), prompt(prose(2))]
    assert not of_name(report({"prompts": rows, "mine": rows}), "overlapping_prompts")
    assert of_name(
        report({"prompts": rows, "mine": rows}, held_out=["mine"]), "overlapping_prompts"
    )
    splits = report({"prompts.train": rows, "prompts.test": rows[:1]})
    assert of_name(splits, "overlapping_prompts")


def changed(text: str, at: int) -> str:
    words = text.split()
    words[at] = "entirely"
    return " ".join(words)


def test_near_duplicates_within_a_set_are_clustered() -> None:
    rows = [prompt(prose(number)) for number in range(60)]
    near = [prompt(changed(rows[4].text, 20)), prompt(rows[4].text.upper() + "!")]
    other = prompt(changed(rows[9].text, 0))
    finding = only(report({"prompts": [*rows, *near, other]}), "near_duplicate_prompts")
    assert (finding["count"], finding["of"], finding["level"]) == (3, 63, "note")
    assert "in 2 clusters, the largest of 3" in finding["text"]
    shown = " ".join(places(finding)) + finding["examples"][0]["text"]
    assert "prompts.jsonl:5" in shown or "prompts.jsonl:61" in shown


def test_many_near_duplicates_are_a_warning() -> None:
    rows = [prompt(prose(1)), *(prompt(changed(prose(1), at)) for at in range(1, 39, 4))]
    assert only(report({"prompts": rows}), "near_duplicate_prompts")["level"] == "warning"


def test_less_similar_prompts_are_no_near_duplicates() -> None:
    """Four words changed apart from each other in 40: 12 of 38 runs, (38 - 12) / (38 + 12)."""
    text = prose(1)
    for at in (5, 14, 23, 32):
        text = changed(text, at)
    assert not of_name(
        report({"prompts": [prompt(prose(1)), prompt(text)]}), "near_duplicate_prompts"
    )


def test_a_held_out_prompt_with_a_near_copy_in_training() -> None:
    rows = [prompt(prose(number)) for number in range(50)]
    held = [prompt(prose(900)), prompt(changed(rows[11].text, 30))]
    found = report({"prompts": rows, "evaluation_prompts": held})
    finding = only(found, "near_duplicate_held_out")
    assert finding["level"] == "warning"
    assert (finding["count"], finding["of"]) == (1, 2)
    assert finding["sets"] == ["evaluation_prompts", "prompts"]
    assert places(finding) == ["evaluation_prompts.jsonl:2"]
    assert finding["examples"][0]["text"].startswith("like prompts.jsonl:12:")
    assert not of_name(found, "near_duplicate_prompts")


def test_a_held_out_prompt_inside_a_training_prompt() -> None:
    rows = [prompt(prose(number)) for number in range(20)]
    inside = rows[6].text.split()[10:22]
    held = [prompt(prose(900)), prompt(" ".join(inside) + "?"), prompt("stone lamp")]
    finding = only(report({"prompts": rows, "evaluation_prompts": held}), "contained_prompts")
    assert (finding["count"], finding["of"]) == (1, 2)  # two words are too few to look for
    assert places(finding) == ["evaluation_prompts.jsonl:2"]
    assert finding["examples"][0]["text"].startswith("in prompts.jsonl:7:")


def test_a_held_out_prompt_late_in_a_long_training_prompt() -> None:
    rows = [prompt(f"{prose(1, 2500)} {prose(2, 30)} {prose(3, 9)}")]
    finding = only(
        report({"prompts.train": rows, "prompts.test": [prompt(prose(2, 30))]}), "contained_prompts"
    )
    assert finding["sets"] == ["prompts.test", "prompts.train"]


def test_all_words_of_a_long_held_out_prompt_count() -> None:
    held = [prompt(prose(2, 2500))]
    cut = [prompt(f"{prose(3, 9)} {prose(2, 2400)} {prose(4, 300)}")]
    whole = [prompt(f"{prose(3, 9)} {prose(2, 2500)} {prose(4, 300)}")]
    for rows, count in ((cut, 0), (whole, 1)):
        found = report({"prompts.train": rows, "prompts.test": held})
        assert len(of_name(found, "contained_prompts")) == count


def test_contained_prompts_are_counted_by_set() -> None:
    held = prompt(prose(1, 30))
    longer = prompt(f"{prose(2, 3)} {held.text} {prose(3, 90)}")
    found = report(
        {
            "prompts.test": [held, prompt(prose(4))],
            "preferences.test": [pair(held.text)],
            "preferences.validation": [pair(longer.text)],
            "prompts.train": [longer],
        }
    )
    told = [(f["sets"], f["count"], f["of"]) for f in of_name(found, "contained_prompts")]
    assert told == [
        (["prompts.test", "prompts.train"], 1, 2),
        (["preferences.test", "prompts.train"], 1, 1),
    ]
    unread = report({"prompts.test": [held], "preferences.validation": [pair(longer.text)]})
    assert not of_name(unread, "contained_prompts")


def test_validation_prompts_that_are_trained_on() -> None:
    train = [pair(prose(n)) for n in range(30)]
    held = [pair(prose(n + 100)) for n in range(20)]
    found = report({"preferences.train": train, "preferences.validation": [*held, train[3]]})
    finding = only(found, "overlapping_validation")
    assert (finding["level"], finding["count"], finding["of"]) == ("warning", 1, 21)
    assert finding["sets"] == ["preferences.validation", "preferences.train"]
    assert places(finding) == ["preferences.validation.jsonl:21"]


def test_near_copies_of_training_prompts_in_validation() -> None:
    train = [pair(prose(n)) for n in range(30)]
    near = [pair(changed(prose(n), 20)) for n in range(3)]
    held = [pair(prose(n + 100)) for n in range(20)]
    for own, level in ((near[:1], "note"), (near, "warning")):
        found = report({"preferences.train": train, "preferences.validation": [*held, *own]})
        finding = only(found, "near_duplicate_validation")
        assert (finding["level"], finding["count"]) == (level, len(own))
        assert finding["sets"] == ["preferences.validation", "preferences.train"]


def test_prompts_repeat_those_of_other_kinds_by_design() -> None:
    """Prompts for training are those of demonstrations and preferences, validation included."""
    shown = [
        Demonstration(prompt=prompt(prose(n)), output_text=prose(n + 500, 12)) for n in range(60)
    ]
    found = report(
        {
            "demonstrations.train": shown[:40],
            "demonstrations.validation": shown[40:],
            "prompts.train": [row.prompt for row in shown],
            "prompts.collect": [row.prompt for row in shown[:20]],
        }
    )
    assert found["findings"] == []


def test_prompts_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of training sets that repeat another set's are not looked into again."""
    asked: list[str] = []
    monkeypatch.setattr(
        columns, "word_hashes", lambda text: asked.append(text) or word_hashes(text)
    )
    pairs = [pair(prose(n // 2)) for n in range(40)]
    report({"preferences.train": pairs, "prompts.train": [row.prompt for row in pairs]})
    assert len(asked) == 20


def test_a_template_in_all_prompts_does_not_hide_a_contained_one() -> None:
    template = "Summarise the following text in less than fifty words please:"
    held = [prompt(f"{template} {prose(100 + number)}") for number in range(40)]
    rows = [prompt(f"{template} {prose(number)}") for number in range(40)]
    rows.append(prompt(f"Well. {held[33].text} Thank you. {prose(7)}"))
    finding = only(report({"prompts": rows, "evaluation_prompts": held}), "contained_prompts")
    assert (finding["count"], finding["of"]) == (1, 40)
    assert places(finding) == ["evaluation_prompts.jsonl:34"]


def test_a_set_has_rows_of_one_kind() -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:2: a prompt in rows, a set of preferences"):
        report({"rows": [pair("q"), prompt("q")]})


def test_the_sample_is_told_and_does_not_depend_on_the_order() -> None:
    rows = [prompt(changed(prose(number // 2), 20 * (number % 2))) for number in range(80)]
    one = report({"prompts": rows}, sample=30)
    other = report({"prompts": rows[::-1]}, sample=30)
    assert one["sets"]["prompts"]["sampled_prompts"] == 30
    text = only(one, "near_duplicate_prompts")["text"]
    assert "on a sample of 30 of 80" in text
    assert text == only(other, "near_duplicate_prompts")["text"]


def sampled(key: int) -> Sampled:
    return Sampled(key, key, "p", "t", np.zeros(0, np.uint32), 0, 0)


def test_samples_keep_the_smallest_keys_within_one_budget() -> None:
    """Three prompts of one set leave 27 of 30 to two others: 13 each."""
    keys = np.random.default_rng(0).permutation(1000).tolist()
    samples = PromptSamples(30)
    for name, own in (("few", [5, 3, 4]), ("many", keys), ("more", keys[::-1])):
        for key in own:
            if samples.wants(name, key):
                samples.add(name, sampled(key))
            assert sum(len(kept.prompts) for kept in samples.sets.values()) <= 1.25 * 30 + 1
    assert [prompt.key for prompt in samples.of("few")] == [3, 4, 5]
    for name in ("many", "more"):
        assert [prompt.key for prompt in samples.of(name)] == list(range(13))
    assert not samples.wants("many", 13)
    assert samples.of("none") == []


def test_runs_have_equal_hashes_wherever_they_stand() -> None:
    one, other = word_hashes("a b c d e"), word_hashes("Well: B c, d!")
    texts = HashedTexts.of([one, other, word_hashes("")])
    runs = texts.runs(3)
    assert len(runs) == 7
    assert runs[1] == runs[6] == texts.run(6, 9) == HashedTexts.of([other]).runs(3)[1]
    assert len(set(runs.tolist())) == 6
    assert texts.text_of(np.array([0, 4, 5, 8])).tolist() == [0, 0, 1, 1]
    assert texts.run(4, 4) == 0
    assert len(HashedTexts.of([]).runs(3)) == 0


@pytest.mark.parametrize(
    "text", ["It's a_b, C-3!", "tab\there\x1fthere", "", "...", "naïve Straße"]
)
def test_words_of_ascii_texts_are_found_in_the_same_way(text: str) -> None:
    spaced = f"é {text}"  # takes the general way
    assert word_hashes(spaced)[1:].tolist() == word_hashes(text).tolist()


def test_jaccard_by_hand() -> None:
    """Runs of three words: abc bcd cde against abc bcd cdx: 2 shared of 4."""
    one, other = shingles("a b c d e"), shingles("A, b c d x")
    assert jaccard(one, other) == 0.5
    assert jaccard(one, one) == 1
    assert len(shingles("two words")) == 1
    assert len(shingles("...")) == 0
    assert jaccard(shingles(""), shingles("...")) == 1
    assert len(word_hashes("日本語のテスト")) == 7  # no spaces: each letter is a word


def test_clusters_hold_at_scale_against_all_pairs() -> None:
    """Every pair that exact comparison finds is found, and no other."""
    rng = np.random.default_rng(3)
    texts = []
    for number in range(60):
        text = prose(number, int(rng.integers(5, 120)))
        texts.append(text)
        for _ in range(int(rng.integers(3))):
            text = changed(text, int(rng.integers(len(text.split()))))
            texts.append(text)
    shingled = [shingles(text) for text in texts]
    labels = near_clusters(shingled)
    linked = [
        (i, j)
        for i in range(len(texts))
        for j in range(i)
        if jaccard(shingled[i], shingled[j]) >= 0.8
    ]
    assert len(linked) > 20
    assert all(labels[i] == labels[j] for i, j in linked)
    alone = set(range(len(texts))) - {number for both in linked for number in both}
    assert all((labels == labels[number]).sum() == 1 for number in alone)


def test_boilerplate_costs_no_more_than_its_bucket() -> None:
    shingled = [shingles("the same words for everybody here")] * 3000
    assert len(set(near_clusters(shingled).tolist())) == 1
    assert len(near_clusters([])) == 0


def test_prompts_unlike_those_of_the_policy() -> None:
    asked = [prompt(f"Please summarise this text: {prose(number)}") for number in range(150)]
    compared = [pair(f"Human: {prose(1000 + n)} Assistant:", "a", "b") for n in range(150)]
    found = report({"prompts": asked, "preferences": compared})
    finding = only(found, "different_prompts")
    assert finding["level"] == "warning"
    assert finding["sets"] == ["preferences", "prompts"]
    measured = found["measures"]["distance"]["preferences"]
    assert measured["auc"] > 0.99
    assert {"human", "assistant"} <= set(measured["words"]["preferences"])
    assert {"please", "summarise"} <= set(measured["words"]["prompts"])


def test_a_difference_in_some_prompts_is_a_note() -> None:
    asked = [prompt(prose(number)) for number in range(300)]
    compared = [
        pair(
            f"Human: {prose(1000 + n)}" if n % 2 else prose(1000 + n),
            prose(n, 5),
            prose(-n % 999, 5),
        )
        for n in range(300)
    ]
    found = report({"prompts": asked, "preferences": compared})
    assert only(found, "different_prompts")["level"] == "note"
    assert 0.7 < found["measures"]["distance"]["preferences"]["auc"] < 0.9


def test_the_same_prompts_are_no_distance_apart() -> None:
    texts = [prose(number) for number in range(120)]
    found = report({"prompts": [*map(prompt, texts)], "preferences": [pair(t) for t in texts]})
    assert found["measures"]["distance"]["preferences"]["auc"] == pytest.approx(0.5)
    assert found["measures"]["distance"]["preferences"]["prompts"] == {
        "preferences": 120,
        "prompts": 120,
    }


def test_too_few_prompts_have_no_distance() -> None:
    found = report({"prompts": [prompt(prose(1))], "preferences": [pair("q")]})
    measured = found["measures"]["distance"]["preferences"]
    assert measured["auc"] is None
    assert measured["reason"] == "too few different prompts"


def test_prompts_of_other_lengths() -> None:
    asked = [prompt(prose(number, 60)) for number in range(30)]
    compared = [pair(prose(1000 + number, 20)) for number in range(30)]
    finding = only(report({"prompts": asked, "preferences": compared}), "different_prompt_lengths")
    assert "a median of 20 words, those of prompts of 60" in finding["text"]


def test_auc_by_hand() -> None:
    """Positives 3 and 1 against negatives 2 and 1: above in 1 + 1, equal in 1, below in 1."""
    scores, labels = np.array([3.0, 1, 2, 1]), np.array([1.0, 1, 0, 0])
    assert auc(scores, labels) == (2 + 0.5) / 4


# Biases of the labels ------------------------------------------------------------------------


def test_length_bias_is_found_with_its_interval() -> None:
    rows = [
        pair(prose(n), prose(n + 1, 20 if n % 10 < 8 else 8), prose(n + 2, 12), Choice.FIRST)
        for n in range(200)
    ]
    rows = [row if n % 2 else row.swap() for n, row in enumerate(rows)]
    found = report({"preferences": rows})
    finding = only(found, "length_bias")
    assert (finding["level"], finding["count"], finding["of"]) == ("warning", 160, 200)
    measured = found["measures"]["preferences"]["longest_wins"]
    assert measured["share"] == 0.8
    assert 0.7 < measured["low"] < 0.8 < measured["high"] < 0.9
    assert "80 %" in finding["text"]


def test_preferring_the_shorter_is_length_bias_too() -> None:
    rows = [pair(prose(n), prose(n, 9), prose(n, 12), Choice.FIRST) for n in range(50)]
    rows = [row if n % 2 else row.swap() for n, row in enumerate(rows)]
    finding = only(report({"preferences": rows}), "length_bias")
    assert (finding["level"], finding["count"]) == ("warning", 0)
    assert places(finding)[0] == "preferences.jsonl:1"


def test_length_bias_of_few_prompts_is_not_told() -> None:
    """A hundred pairs of two prompts are no evidence: the interval counts prompts."""
    rows = [
        pair(prose(n % 2), f"{prose(n, 20)}", f"{prose(n, 10)}", Choice(int(n % 20 == 0)))
        for n in range(100)
    ]
    rows = [row if n // 2 % 2 else row.swap() for n, row in enumerate(rows)]
    assert not of_name(report({"preferences": rows}), "length_bias")


@pytest.mark.parametrize(
    ("sizes", "bounds"),
    [
        (np.arange(40) % 7 + 1, (0.92, 0.98)),
        (np.full(100, 5), (0.92, 0.98)),
        (np.ones(100, np.int64), (0.92, 0.98)),
        (np.r_[200, np.ones(19, np.int64)], (0.92, 1.0)),
        (np.r_[40, np.ones(40, np.int64)], (0.92, 1.0)),
    ],
    ids=["uneven", "even", "single", "one with most rows", "one with half"],
)
def test_clustered_intervals_cover_the_truth(
    sizes: np.ndarray[Any, Any], bounds: tuple[float, float]
) -> None:
    """Each cluster has a probability of its own, one half in the mean."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    covered = 0
    for _ in range(500):
        hits = rng.random(len(clusters)) < np.repeat(rng.beta(2, 2, len(sizes)), sizes)
        found = clustered_share(hits, clusters)
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert bounds[0] <= covered / 500 <= bounds[1]


def test_clustered_share_by_hand() -> None:
    """Two clusters of two, hits 2 and 0: p = 0.5, residuals ±1, variance 2/1 * 2 / 16 = 1/4.

    One effective row: with t of 1 degree of freedom the interval is nearly [0, 1].
    """
    hits = np.array([True, True, False, False])
    found = clustered_share(hits, np.array([1, 1, 2, 2], np.uint64))
    assert found is not None
    assert (found.share, found.rows, found.clusters) == (0.5, 4, 2)
    t = 12.706204736
    half = t / (1 + t * t) * np.sqrt(0.25 + t * t / 4)
    assert found.high - found.low == pytest.approx(2 * half)
    assert clustered_share(hits[:0], np.zeros(0, np.uint64)) is None
    alone = clustered_share(hits, np.ones(4, np.uint64))
    assert alone is not None
    assert (alone.low, alone.high) == (0, 1)


def test_position_bias() -> None:
    rows = [pair(prose(n), choice=Choice(int(n % 10 < 3))) for n in range(300)]
    found = report({"preferences": rows})
    finding = only(found, "position_bias")
    assert (finding["level"], finding["count"], finding["of"]) == ("warning", 210, 300)
    assert found["measures"]["preferences"]["position"]["p"] < 1e-10


def test_position_test_is_exact() -> None:
    """Nine of ten: 2 * (1 + 10) / 1024."""
    units = np.arange(11, dtype=np.uint64)
    found = position_share(np.array([0] * 9 + [1, 2]), units)
    assert (found["share"], found["rows"], found["pairs"]) == (0.9, 10, 10)
    assert found["p"] == pytest.approx(22 / 1024)
    assert position_share(np.array([2, 2]), units[:2]) == {"rows": 0}


def test_judgements_of_one_pair_count_once_for_position() -> None:
    """Three agreeing judgements of nine pairs, one of a tenth, and a pair of both sides."""
    choices = np.array([0] * 27 + [1] + [0, 1])
    units = np.array([*np.repeat(np.arange(9), 3), 9, 10, 10], np.uint64)
    found = position_share(choices, units)
    assert found["pairs"] == 10
    assert found["p"] == pytest.approx(22 / 1024)
    assert (found["share"], found["rows"]) == (28 / 30, 30)


def test_agreeing_annotators_of_shuffled_pairs_are_no_position_bias() -> None:
    """100 prompts, 10 annotators: where rows counted one by one, every fourth run was a warning."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(100, dtype=np.uint64), 10)
    told = [
        position_share(np.repeat(rng.integers(0, 2, 100), 10), units)["p"] < 0.001
        for _ in range(300)
    ]
    assert sum(told) <= 2


def test_a_small_bias_or_few_rows_are_not_told() -> None:
    few = [pair(prose(n), choice=Choice(int(n % 10 < 3))) for n in range(20)]
    assert not of_name(report({"preferences": few}), "position_bias")


def test_choices_that_are_all_one_side_are_a_note() -> None:
    rows = [pair(prose(n), annotator="ann") for n in range(40)]
    found = report({"preferences": rows})
    assert only(found, "one_sided_choice")["level"] == "note"
    assert places(only(found, "one_sided_choice")) == ["preferences.jsonl:1"]
    assert not of_name(found, "position_bias")
    assert not of_name(found, "one_sided_annotator")


def test_one_annotator_with_most_rows_and_one_side() -> None:
    rows = clean_pairs(60)
    clicks = [pair(prose(500 + n), annotator="clicker") for n in range(70)]
    found = report({"preferences": [*rows, *clicks]})
    finding = only(found, "dominant_annotator")
    assert (finding["level"], finding["count"], finding["of"]) == ("note", 70, 130)
    finding = only(found, "one_sided_annotator")
    assert (finding["level"], finding["count"], finding["of"]) == ("warning", 70, 70)
    assert "'clicker'" in finding["text"]
    assert places(finding)[0] == "preferences.jsonl:61"


# Faults of single rows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("control_characters", "bell \x07 rings"),
        ("carriage_returns", "a line\r\nanother"),
        ("replacement_characters", "na\ufffdve"),
        ("mojibake", "caf\u00c3\u00a9"),
        ("mojibake", "it\u00e2\u20ac\u2122s"),
        ("mojibake", "it\u00e2\u0080\u0099s"),
        ("mojibake", "\u00c2\u00a35"),
        ("invisible_characters", "zero\u200bwidth"),
        ("invisible_characters", "turned \u202eround"),
        ("markup", "salt &amp; pepper"),
        ("markup", "<p class='x'>text</p>"),
    ],
)
def test_faults_of_characters(name: str, text: str) -> None:
    assert name in dict(faults_of_text(text))
    rows = [*clean_pairs(50), pair(prose(77), "an answer", text)]
    finding = only(report({"preferences": rows}), name)
    assert places(finding) == ["preferences.jsonl:51"]
    assert (finding["count"], finding["of"]) == (1, 51)
    always = name in ("markup", "carriage_returns")
    assert finding["level"] == ("note" if always else "warning")


@pytest.mark.parametrize(
    "text",
    [
        "plain text\n\twith tabs",
        "naïve café, SÃO PAULO, Ângela",
        "emoji 👩\u200d🚀 with a joiner",
        "שלום\u200f עולם",
        "a < b and b > c & so on",
        "if x<y: print(x)",
        "“quotes” – dashes… €5",
    ],
)
def test_texts_without_faults(text: str) -> None:
    assert dict(faults_of_text(text)) == {}


def test_faults_are_counted_in_prompts_too() -> None:
    rows = [prompt(prose(1)), prompt("bell \x07 rings"), prompt("bell \x07 rings")]
    assert only(report({"prompts": rows}), "control_characters")["count"] == 2


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Plain English text", "latin"),
        ("Voilà, c'est français", "latin"),
        ("Это русский текст", "cyrillic"),
        ("これは日本語の文章です。", "han or kana"),
        ("한국어 문장을 여기에 씁니다", "hangul"),
        ("مرحبا بالعالم العربي", "arabic"),
        ("1 + 1 = 2", None),
        ("short", None),
        ("half латиница половина halves x я", None),
    ],
)
def test_script_of(text: str, script: str | None) -> None:
    if text.startswith("half"):
        assert script_of(text) in ("latin", "cyrillic")
    else:
        assert script_of(text) == script


def test_texts_in_another_script() -> None:
    rows = [*clean_pairs(30), pair(prose(99), "Это русский текст ответа", prose(98, 5))]
    finding = only(report({"preferences": rows}), "other_scripts")
    assert (finding["count"], finding["level"]) == (1, "note")
    assert places(finding) == ["preferences.jsonl:31"]
    assert "(cyrillic) than most of the set (latin)" in finding["text"]


def test_long_texts() -> None:
    rows = [prompt(prose(number, 30)) for number in range(50)]
    rows.insert(20, prompt(prose(99, 900)))
    finding = only(report({"prompts": rows}), "long_texts")
    assert places(finding) == ["prompts.jsonl:21"]
    assert "prompt 30" in finding["text"]
    short = [prompt(f"q{number}") for number in range(50)] + [prompt(prose(1, 150))]
    assert not of_name(report({"prompts": short}), "long_texts")


def planted(name: str, row: Item) -> Json:
    """The finding of a row put in the third place of 20 clean ones."""
    if isinstance(row, Demonstration):
        rows: list[Item] = [
            Demonstration(prompt=prompt(prose(n)), output_text=prose(n + 500, 12))
            for n in range(20)
        ]
    else:
        rows = clean_pairs(20)
    rows.insert(2, row)
    finding = only(report({"rows": rows}), name)
    assert places(finding) == ["rows.jsonl:3"]
    return finding


def test_answers_in_the_prompt() -> None:
    text = f"{prose(1)} The Answer is  here in full. {prose(2)}"
    row = pair(text, "the answer is here in full.", "Nothing of it")
    assert planted("answer_in_prompt", row)["level"] == "note"
    shown = Demonstration(prompt=prompt(text), output_text="The answer is here in full.")
    planted("answer_in_prompt", shown)
    turns = (Message(Speaker.USER, text), Message(Speaker.USER, "Go on"))
    earlier = Prompt(messages=turns, id="e", group="e")
    planted("answer_in_prompt", Demonstration(prompt=earlier, output_text="answer is here in full"))


def test_rejected_or_short_answers_in_the_prompt_are_fine() -> None:
    text = f"{prose(1)} the answer is here in full. {prose(2)}"
    rows = [
        pair(text, "the answer is here in full.", "Nothing of it", Choice.SECOND),
        pair(f"{text} a", "the answer is here", "Nothing of it"),
        pair(f"{text} b", "the answer is here in full.", "Nothing of it", Choice.TIE),
    ]
    assert not of_name(report({"preferences": rows}), "answer_in_prompt")


def labelled(chosen: str, rejected: str, n: int = 40) -> list[Item]:
    rows = [pair(prose(n), f"{chosen} it is", f"{rejected} so", Choice.FIRST) for n in range(n)]
    return [row if n % 2 else row.swap() for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("chosen:", "rejected:"), ("**Better**:", "**Worse**:"), (" (candidate_0):", "candidate 1:")],
)
def test_labels_in_answers_that_tell_the_choice(chosen: str, rejected: str) -> None:
    finding = only(
        report({"rows": [*clean_pairs(100), *labelled(chosen, rejected)]}), "label_in_answer"
    )
    assert (finding["level"], finding["count"], finding["of"]) == ("warning", 40, 140)
    assert "for 80 of 80 such answers" in finding["text"]
    assert places(finding)[0] == "rows.jsonl:101"


def test_labels_that_tell_nothing() -> None:
    """One row, one label, labels of both sides alike, and texts that only look like labels."""
    sides = [
        pair(prose(n), "Response 1: a", "Response 2: b", Choice(n // 2 % 2)) for n in range(40)
    ]
    for rows in (
        [*clean_pairs(500), *labelled("chosen:", "rejected:", 1)],
        labelled("Winner:", "The"),
        sides,
        labelled("Better late than never:", "Good:"),
        [Demonstration(prompt=prompt(prose(n)), output_text="Answer 1: so") for n in range(40)],
    ):
        assert not of_name(report({"rows": rows}), "label_in_answer")


@pytest.mark.parametrize(
    "text", ["Fine.\n\nHuman: and then?", "Assistant: yes", "yes<|im_end|>", "so </s>"]
)
def test_role_markers_in_answers(text: str) -> None:
    planted("role_markers", pair(prose(50), "It is so", text))


def test_output_that_is_the_prompt() -> None:
    text = prose(50)
    planted("output_copies_prompt", Demonstration(prompt=prompt(text), output_text=f" {text}\n"))


def test_candidates_that_hardly_differ() -> None:
    row = pair(prose(50), "It is  so.", "it is so.\n")
    assert planted("same_candidates", row)["level"] == "warning"
    tie = pair(prose(50), "It is  so.", "it is so.\n", Choice.TIE)
    assert not of_name(report({"preferences": [tie]}), "same_candidates")


def test_candidates_one_of_which_was_cut_off() -> None:
    row = pair(prose(50), "It is so because", "It is so because of that.")
    finding = planted("prefix_candidates", row)
    assert finding["level"] == "note"
    assert finding["examples"][0]["text"] == "It is so because"


@pytest.mark.parametrize("text", ["", " \n", "...", "- ``"])
def test_empty_answers(text: str) -> None:
    assert planted("empty_answers", pair(prose(50), "It is so", text))["level"] == "warning"


@pytest.mark.parametrize("text", ["N/A", "none.", "[deleted]", "null"])
def test_answers_that_often_stand_for_none_are_a_note(text: str) -> None:
    assert planted("placeholder_answers", pair(prose(50), "It is so", text))["level"] == "note"
    assert not of_name(report({"rows": [pair("q", "It is so", text)]}), "empty_answers")


@pytest.mark.parametrize("text", ["😀", "- 😌😊", "✓", "5"])
def test_pictographs_are_answers(text: str) -> None:
    found = report({"rows": [*clean_pairs(20), pair(prose(50), "It is so", text)]})
    assert not of_name(found, "empty_answers")


def test_examples_are_few_and_short() -> None:
    rows = [pair(prose(n, 100), "x", "") for n in range(20)]
    finding = only(report({"preferences": rows}), "empty_answers")
    assert (finding["count"], len(finding["examples"])) == (20, 5)
    assert clip("a\nb" + "c" * 100) == "a b" + "c" * 76 + "…"
    assert clip("a\x07b") == "a\\x07b"
    assert len(clip("\x07" * 100)) == 80


def test_every_explanation_is_a_sentence() -> None:
    for explanation in EXPLANATIONS.values():
        for text in (explanation.means, explanation.remedy):
            assert text[0].isupper() or text.startswith("U+")
            assert text.endswith(".")
