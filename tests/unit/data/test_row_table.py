from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amenable.data.formats.native import preference_to_row
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.reading.records import DroppingLog, ReadLog
from amenable.data.row_table import CHOICES, ROW_BYTES, RowTable, read_table
from amenable.data.schemas import Choice, Preference, prompt_key
from amenable.data.splits import rank_bits
from amenable.errors import DataError

PAIR = {"input_text": "one two three", "candidate_0": "good", "candidate_1": "so bad"}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows") -> list[str]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [str(path)]


def preferences(folder: Path, *rows: dict[str, Any], log: ReadLog | None = None) -> RowTable:
    log = log or ReadLog()
    return read_table(folder / "spool", iter_preferences(written(folder, list(rows)), log), log)


def every(table: RowTable) -> Any:
    return np.arange(len(table))


def test_columns_by_hand(tmp_path: Path) -> None:
    table = preferences(
        tmp_path,
        {**PAIR, "id": "ä", "group": "g", "choice": 1},
        {**PAIR, "input_text": "One  two THREE", "choice": "tie", "output_text": "a b c d"},
        {**PAIR, "choice": 1},
    )
    assert table.words.tolist() == [[3, -1, 1, 2], [3, 4, 1, 2], [3, -1, 1, 2]]
    assert [CHOICES[n] for n in table.choice] == [Choice.SECOND, Choice.TIE, Choice.SECOND]
    assert list(table.ids_of(every(table))) == ["ä", "rows:2", "rows:3"]
    assert table.id_of(1) == "rows:2"
    assert len(set(table.key.tolist())) == 1  # case and space apart
    assert table.group[0] == rank_bits("g")
    assert table.asked[0] == table.asked[2] != table.asked[1]
    assert table.content[0] == table.content[2] != table.content[1]
    assert not table.equal.any()


def test_exact_duplicates_are_the_same_as_they_stand(tmp_path: Path) -> None:
    def turns(*contents: str, system: str = "s") -> list[dict[str, str]]:
        roles = ["user", "assistant", "user"][-len(contents) :]
        spoken = zip(roles, contents, strict=True)
        system_turn = {"role": "system", "content": system}
        return [system_turn, *({"role": r, "content": c} for r, c in spoken)]

    asked = [
        {"input_text": "if x:\n  f()"},
        {"input_text": "if x:\n f()"},
        {"input_text": "IF x:\n f()"},
        {"messages": turns("if x:\n f()")},
        {"messages": turns("if x:\n f()", system="t")},
        {"messages": turns("if", "x:", "f()")},
        {"messages": turns("if", "x:f", "()")},
    ]
    rows = [{**row, "output_text": text} for row in asked for text in ("a b", "a  b", "a b")]
    files = written(tmp_path, rows)
    log = ReadLog()
    table = read_table(tmp_path / "spool", iter_demonstrations(files, log), log)
    assert len(set(table.asked.tolist())) == len(asked)
    assert len(set(table.content.tolist())) == 2 * len(asked)
    assert len(set(table.key[:15].tolist())) == 1


def test_lines_are_native_rows_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = [{**PAIR, "choice": n % 2, "id": str(n), "extra": [n]} for n in range(9)]
    table = preferences(tmp_path, *rows)
    read = [item for _, item in iter_preferences(written(tmp_path, rows), ReadLog())]
    assert isinstance(read[0], Preference)
    assert table.key[0] == int(prompt_key(read[0].prompt), 16)
    order = np.array([8, 0, 3])
    expected = [preference_to_row(read[n]) for n in order]
    assert list(table.rows(order)) == expected
    assert [list(row) for row in table.rows(order)] == [list(row) for row in expected]


def test_prompts_of_preferences_hold_no_judgement(tmp_path: Path) -> None:
    row = {**PAIR, "choice": 0, "strength": 2, "annotator": "a", "output_text": "o", "id": "i"}
    prompts = preferences(tmp_path, row).prompts_of_preferences()
    (found,) = prompts.rows(every(prompts))
    assert found == {"id": "i", "group": found["group"], "input_text": "one two three"} | {
        "output_text": "o"
    }
    assert prompts.words.tolist() == [[3, 1, -1, -1]]


def test_a_row_takes_as_many_bytes_as_stated(tmp_path: Path) -> None:
    table = preferences(tmp_path, *({**PAIR, "choice": 0, "id": str(n)} for n in range(50)))
    columns = [getattr(table, field.name) for field in fields(table)]
    size = sum(column.nbytes for column in columns if isinstance(column, np.ndarray))
    assert size == ROW_BYTES * 50
    assert len(table.ids) == 10 + 2 * 40


def test_an_id_used_twice_ends_the_reading_and_names_both_places(tmp_path: Path) -> None:
    names = ["a", "b", "c", "b", "a"]
    rows = [{**PAIR, "choice": 0, "id": name} for name in names]
    with pytest.raises(
        DataError, match=r"rows.jsonl:4: field 'id': 'b' is used twice \(first at .*jsonl:2\); "
    ):
        preferences(tmp_path, *rows)


def test_with_a_dropping_log_the_later_row_of_an_id_goes(tmp_path: Path) -> None:
    log = DroppingLog()
    names = ["a", "b", "c", "b", "a", "a"]
    rows = [{**PAIR, "choice": 0, "id": name, "n": n} for n, name in enumerate(names)]
    table = preferences(tmp_path, *rows, log=log)
    assert [row["n"] for row in table.rows(every(table))] == [0, 1, 2]
    assert list(table.ids_of(every(table))) == ["a", "b", "c"]
    assert (log.records, log.rows, log.dropped.total()) == (6, 3, 3)
    assert len(log.dropped) == 1


def test_two_ids_of_one_hash_are_two_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amenable.data.row_table.hash", lambda name: 7, raising=False)
    assert len(preferences(tmp_path, *({**PAIR, "choice": 0} for _ in range(5)))) == 5
    with pytest.raises(DataError, match="'x' is used twice"):
        preferences(tmp_path, *({**PAIR, "choice": 0, "id": name} for name in "xyzx"))


def test_faulty_rows_are_left_out_with_a_dropping_log(tmp_path: Path) -> None:
    log = DroppingLog()
    good = {**PAIR, "choice": 0}
    table = preferences(tmp_path, good, {**PAIR, "choice": 7}, good, log=log)
    assert list(table.ids_of(every(table))) == ["rows:1", "rows:3"]
    assert (log.records, log.rows, log.dropped.total()) == (3, 2, 1)


def test_no_rows_make_an_empty_table(tmp_path: Path) -> None:
    table = read_table(tmp_path / "spool", iter_prompts([], ReadLog()), ReadLog())
    assert (len(table), list(table.lines(every(table)))) == (0, [])


def test_rows_of_no_file(tmp_path: Path) -> None:
    rows = [{"input_text": f"q {n}", "output_text": "a b"} for n in range(3)]
    read = [item for _, item in iter_demonstrations(written(tmp_path, rows), ReadLog())]

    def nowhere() -> Iterator[tuple[None, Any]]:
        yield from ((None, item) for item in read)

    table = read_table(tmp_path / "spool", nowhere(), ReadLog())
    assert table.words.tolist() == [[2, 2, -1, -1]] * 3
    assert set(table.choice.tolist()) == {-1}
