"""Column maps: the file's own names, dots into objects, verdicts of any words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amenable.config.data import DemonstrationColumns, PreferenceColumns, PromptColumns
from amenable.data.reading.columns import is_mapped, native_row, rows
from amenable.data.reading.records import DroppingLog, ReadLog, Row
from amenable.errors import DataError

PAIR = {"question": "Q", "a": "A", "b": "B", "winner": "left"}
COLUMNS = PreferenceColumns(
    input_text="question",
    candidate_0="a",
    candidate_1="b",
    choice="winner",
    choice_values=("left", "right", "equal"),
)


def row(values: dict[str, Any], log: ReadLog | None = None) -> Row:
    return Row(values, Path("rows.jsonl"), 3, "rows", log or ReadLog())


def test_only_a_map_that_names_something_is_one() -> None:
    assert not is_mapped(PromptColumns())
    assert not is_mapped(PreferenceColumns())
    assert is_mapped(DemonstrationColumns(output_text="x"))


@pytest.mark.parametrize(("verdict", "choice"), [("left", 0), ("right", 1), ("equal", "tie")])
def test_verdicts_in_words(verdict: str, choice: int | str) -> None:
    mapped = native_row(row({**PAIR, "winner": verdict}), COLUMNS).values
    assert mapped == {"input_text": "Q", "candidate_0": "A", "candidate_1": "B", "choice": choice}


@pytest.mark.parametrize(
    ("value", "values", "choice"),
    [
        (1, ("1", "2"), 0),
        (2, ("1", "2"), 1),
        (True, ("true", "false"), 0),
        (1.0, ("1", "2"), 0),
        ("2.0", ("1", "2"), 1),
        (1.0, ("1", "1.0"), 1),
        (None, ("0", "null"), 1),
    ],
)
def test_verdicts_that_are_no_texts(value: Any, values: tuple[str, ...], choice: int) -> None:
    columns = PreferenceColumns(choice="winner", choice_values=values)
    assert native_row(row({"winner": value}), columns).values == {"choice": choice}


def test_unknown_verdict_is_a_fault_that_names_the_column() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: field 'winner': found \"up\" .* 'left' or"):
        native_row(row({**PAIR, "winner": "up"}), COLUMNS)


def test_dots_lead_into_lists_and_objects() -> None:
    values = {"turns": ["one", {"text": "two"}]}
    assert (
        native_row(row(values), PromptColumns(input_text="turns.0")).values["input_text"] == "one"
    )
    columns = PromptColumns(input_text="turns.1.text")
    assert native_row(row(values), columns).values == {
        "input_text": "two",
        "turns": ["one", None],
    }


def test_only_what_is_named_is_taken_out_of_lists_and_objects() -> None:
    values = {"data": {"q": "Q", "doc_id": 7, "a": {"text": "A"}}, "turns": [{"x": 1}, "B"]}
    columns = PreferenceColumns(
        input_text="data.q", group="data.q", candidate_0="data.a.text", candidate_1="turns.1"
    )
    assert native_row(row(values), columns).values == {
        "data": {"doc_id": 7},
        "turns": [{"x": 1}, None],
        "input_text": "Q",
        "group": "Q",
        "candidate_0": "A",
        "candidate_1": "B",
    }
    assert values["data"] == {"q": "Q", "doc_id": 7, "a": {"text": "A"}}
    twice = PromptColumns(input_text="turns.0.x", group="turns.0.x")
    assert native_row(row({"turns": [{"x": "Q"}, 1]}), twice).values == {
        "input_text": "Q",
        "group": "Q",
        "turns": [None, 1],
    }


def test_name_with_a_dot_in_it_is_taken_as_it_stands() -> None:
    values = {"turns.0": "whole", "turns": ["part"]}
    mapped = native_row(row(values), PromptColumns(input_text="turns.0"))
    assert mapped.values == {"input_text": "whole", "turns": ["part"]}


@pytest.mark.parametrize("path", ["turn", "turns.2", "turns.x", "turns.0.x"])
def test_missing_column_says_what_is_there(path: str) -> None:
    with pytest.raises(DataError, match=f"field '{path}': is missing; .*correct the recipe's"):
        native_row(row({"turns": ["one", "two"]}), PromptColumns(input_text=path))


def test_other_columns_stay() -> None:
    mapped = native_row(row({"q": "Q", "topic": 3}), PromptColumns(input_text="q"))
    assert mapped.values == {"input_text": "Q", "topic": 3}


def test_list_is_a_conversation_and_a_named_text_stands_in_for_one() -> None:
    turns = [{"role": "user", "content": "Q"}]
    mapped = native_row(row({"chat": turns}), PromptColumns(input_text="chat"))
    assert mapped.values == {"messages": turns}
    log = ReadLog()
    both = native_row(row({"q": "Q", "messages": turns}, log), PromptColumns(input_text="q"))
    assert both.values == {"input_text": "Q"}
    assert sum(log.coerced.values()) == 1


def test_faulty_records_go_to_the_log_and_the_others_on() -> None:
    log = DroppingLog()
    records = [row({"q": "Q"}, log), row({"p": "Q"}, log), row({"q": "R"}, log)]
    made = list(rows(iter(records), PromptColumns(input_text="q")))
    assert [one.values["input_text"] for one in made] == ["Q", "R"]
    assert sum(log.dropped.values()) == 1
    assert json.dumps(PAIR)
