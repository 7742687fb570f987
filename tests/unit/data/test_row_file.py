from __future__ import annotations

import math
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amenable.artifacts import write_jsonl
from amenable.data.formats.native import (
    demonstration_to_row,
    preference_to_row,
    prompt_to_row,
)
from amenable.data.row_file import (
    open_demonstrations,
    open_preferences,
    open_prompts,
    row_line,
    write_lines,
)
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.errors import DataError, StorageError


def prompt(name: str, *earlier: Message, **meta: Any) -> Prompt:
    messages = (*earlier, Message(Speaker.USER, f"Was ist {name}? 你好"))
    return Prompt(messages=messages, id=name, group=f"group {name}", meta=meta)


PROMPTS = [
    prompt("a", output_text="kept"),
    prompt("b", Message(Speaker.SYSTEM, "s"), Message(Speaker.USER, "u")),
    prompt("c", meta={"deep": [1, None]}),
]
PAIRS = [
    Preference(prompt=PROMPTS[0], candidate_0="x", candidate_1="y", choice=Choice.SECOND),
    Preference(
        prompt=PROMPTS[1],
        candidate_0="",
        candidate_1="y",
        choice=Choice.TIE,
        weight=2.0,
        margin=0.0,
        annotator="ann",
        strength=5,
    ),
]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    demonstrations = [Demonstration(prompt=prompt("d", k=1), output_text="  out\n")]
    write_jsonl(tmp_path / "p.jsonl", map(prompt_to_row, PROMPTS))
    write_jsonl(tmp_path / "d.jsonl", map(demonstration_to_row, demonstrations))
    write_jsonl(tmp_path / "c.jsonl", map(preference_to_row, PAIRS))
    assert list(open_prompts(tmp_path / "p.jsonl")) == PROMPTS
    assert list(open_demonstrations(tmp_path / "d.jsonl")) == demonstrations
    assert list(open_preferences(tmp_path / "c.jsonl")) == PAIRS


def test_it_is_a_sequence_and_slices_are_views(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_jsonl(path, map(prompt_to_row, PROMPTS))
    rows = open_prompts(path)
    assert len(rows) == 3
    assert rows[-1] == PROMPTS[2]
    assert list(rows[1:]) == PROMPTS[1:]
    assert list(rows[::-1][:2]) == [PROMPTS[2], PROMPTS[1]]
    assert PROMPTS[1] in rows
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(IndexError):
        rows[1:][2]


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_last_line_may_end_without_a_line_feed(tmp_path: Path, end: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "1", "group": "g", "input_text": "a"}' + end, "utf-8")
    assert [row.id for row in open_prompts(path)] == ["1"]
    path.write_text("", "utf-8")
    assert list(open_prompts(path)) == []


def test_lines_may_lie_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.jsonl"
    write_jsonl(path, map(prompt_to_row, PROMPTS))
    for size in (1, 7, path.stat().st_size):
        monkeypatch.setattr("amenable.data.row_file.BLOCK_BYTES", size)
        assert list(open_prompts(path)) == PROMPTS


def test_a_missing_file_and_a_foreign_row_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: no such file; run the stage that makes it"):
        open_prompts(tmp_path / "none.jsonl")
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "1", "group": "g", "input_text": "a"}\n{"id": "2"}\n{"id"', "utf-8")
    rows = open_prompts(path)
    assert rows[0].text == "a"
    with pytest.raises(DataError, match=r"p.jsonl:2: is no row that Amenable wrote \(KeyError"):
        rows[1]
    with pytest.raises(DataError, match=r"p.jsonl:3: is no row that Amenable wrote .*run the data"):
        rows[2]


def ids(rows: Any, where: list[int], results: Any) -> None:
    results.put([rows[place].id for place in where])


def test_processes_read_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_jsonl(path, (prompt_to_row(prompt(str(number))) for number in range(200)))
    rows = open_prompts(path)
    assert rows[0].id == "0"  # the file is open when the others begin
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    orders = [list(range(200)), list(range(199, -1, -1))]
    workers = [fork.Process(target=ids, args=(rows, order, results)) for order in orders]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == sorted([[str(n) for n in order] for order in orders])
    assert pickle.loads(pickle.dumps(rows[5:]))[0].id == "5"


def test_a_row_is_written_as_write_jsonl_writes_it(tmp_path: Path) -> None:
    row = {"text": "é \u2028 \0", "big": 2**70, "small": 1e-300, "list": [None, True, {"a": 1.5}]}
    strange = {"nan": math.nan, "array": np.arange(2), "path": Path("a")}
    write_jsonl(tmp_path / "rows", [row, strange])
    assert (tmp_path / "rows").read_bytes() == row_line(row) + row_line(strange)


def test_lines_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    lines = [b"%d\n" % number for number in range(1000)]
    write_lines(path, iter(lines))
    assert path.read_bytes() == b"".join(lines)

    def broken() -> Any:
        yield b"new\n"
        raise DataError("stop")

    with pytest.raises(DataError, match="stop"):
        write_lines(path, broken())
    assert path.read_bytes() == b"".join(lines)
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    with pytest.raises(StorageError, match="cannot write"):
        write_lines(path / "below", [b"x\n"])
