"""The rows of the sample browser, and how many of them fit."""

from __future__ import annotations

import json

from amenable.evaluate.samples import Answer, Look, Outcome, Sample, browser, pairs

SYSTEMS = ("base", "sft", "tuned")


def sample(number: int = 0, *texts: str, **changed: object) -> Sample:
    settings: dict[str, object] = {
        "id": f"p{number}",
        "prompt": f"Prompt {number}.",
        "answers": [Answer(text) for text in texts or ("one two", "one two three", "one two")],
        "outcomes": [[Outcome(0.12345678), Outcome(None), Outcome(-1e-9, contradicts=True)]],
    }
    return Sample(**settings | changed)  # type: ignore[arg-type]


def test_pairs_are_in_the_order_of_the_outcomes() -> None:
    assert pairs(SYSTEMS) == [("base", "sft"), ("base", "tuned"), ("sft", "tuned")]


def test_a_sample_carries_what_the_script_filters_and_orders_by() -> None:
    row = sample()
    assert json.loads(row.margins) == [[0.1235, None, -1e-9]], "nothing but a tie becomes 0"
    assert json.loads(row.contradictions) == [[0, 0, 1]]
    assert json.loads(row.same) == [0, 1, 0]
    assert json.loads(row.words) == [2, 3, 2]
    missing = sample(answers=[Answer(""), None, Answer("a")])
    assert json.loads(missing.words) == [0, None, 1]
    assert json.loads(missing.same) == [0, 0, 0]


def test_rows_stop_where_the_budget_ends() -> None:
    """Bytes are counted, not characters: each of these texts is 100 characters and 300 bytes."""
    samples = [sample(n, "日" * 100, "x", "x") for n in range(9)]

    def rows(count: int, budget: int) -> list[str]:
        found = browser(SYSTEMS, ["m"], samples[:count], budget=budget, chosen=(1, 2))
        assert found.shown == found.rows.count("<li")
        return [f"<li{row}" for row in found.rows.split("<li")[1:]]

    four = sum(len(row.encode()) for row in rows(4, 10**6))
    assert four > 4 * 300
    assert [len(rows(9, budget)) for budget in (0, four - 1, four)] == [0, 3, 4]
    assert len(rows(9, 10**6)) == 9


def test_an_answer_that_cannot_be_seen_is_named() -> None:
    html = browser(SYSTEMS, ["m"], [sample(0, "", " \n", "a")], budget=10**6, chosen=(0, 1)).rows
    assert html.count("an empty answer") == html.count("nothing but white space") == 1


def test_texts_of_models_and_judges_stay_texts() -> None:
    hostile = "<script>alert(1)</script>\u202e"
    said = Outcome(0.5, words=hostile, looks=(Look(hostile, hostile),))
    row = sample(0, hostile, "a", "b", prompt=hostile, id=hostile, outcomes=[[said, None, None]])
    html = browser([hostile, "sft", "tuned"], [hostile], [row], budget=10**6, chosen=(0, 1)).rows
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;⟨U+202E⟩") == 8
