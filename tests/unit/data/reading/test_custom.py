"""Reader functions of the user's own: from a file or a module, joined, dropped, faulty."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from amenable.config.data import DemonstrationSource, PreferenceSource
from amenable.data.reading.custom import load_reader
from amenable.data.reading.readers import iter_demonstrations, iter_preferences
from amenable.data.reading.records import ReadLog
from amenable.data.schemas import Drop
from amenable.errors import DataError, RecipeError

READER = """
from __future__ import annotations
from dataclasses import dataclass
from amenable.data.schemas import Drop

@dataclass
class Kept:
    text: str

def pairs(records):
    for row in records:
        if row["skip"]:
            yield Drop("skipped")
        else:
            row = Kept(row["q"])
            yield {"input_text": row.text, "candidate_0": "A", "candidate_1": "B", "choice": 0}

def joined(records):
    for row in list(records):
        yield {"input_text": row["q"], "output_text": "A"}

def twice(records):
    for row in records:
        yield {"input_text": row["q"], "output_text": "A"}
        yield {"input_text": row["q"], "output_text": "B"}

def failing(records):
    for row in records:
        yield {"input_text": row["nothing"]}

def failing_first(records):
    raise ValueError("not today")

def early(records):
    yield {"input_text": "Q"}

def wrong(records):
    for row in records:
        yield row["q"]

def incomplete(records):
    for row in records:
        yield {"input_text": row["q"]}

def array(records):
    import numpy
    for row in records:
        yield {"input_text": row["q"], "output_text": "A", "choice": numpy.array([0, 1])}

def deep(records):
    value = []
    for _ in range(3000):
        value = [value]
    for row in records:
        yield {"input_text": row["q"], "output_text": "A", "deep": value}

def surrogate(records):
    for row in records:
        yield {"input_text": row["q"], "output_text": "A", "half": "\\ud83d"}

def sets(records):
    for row in records:
        yield {"input_text": row["q"], "output_text": "A", "tags": {1, 2}}

def numbers(records):
    for row in records:
        yield {7: row["q"]}

def leaving(records):
    raise SystemExit(3)

def one_row(records):
    return {"input_text": "Q", "output_text": "A"}

def nothing(records):
    for row in records:
        pass

def the_class(records):
    for row in records:
        yield Drop

def no_ids(records):
    for row in records:
        yield {"id": None, "input_text": row["q"], "output_text": "A"}
        yield {"id": None, "input_text": row["q"], "output_text": "B"}

answer = 42
"""
ROWS = '{"q": "One", "skip": false}\n{"q": "Two", "skip": true}\n{"q": "Three", "skip": false}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_readers.py").write_text(READER)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def demonstrations(reader: str) -> list[tuple[int, str, str]]:
    source = DemonstrationSource(files=("rows.jsonl",), reader=reader)
    found = iter_demonstrations(source, ReadLog())
    return [(row.line, item.prompt.id, item.output_text) for row, item in found]


@pytest.mark.parametrize("place", ["my_readers.py", "./my_readers.py", "my_readers"])
def test_rows_and_drops(place: str) -> None:
    log = ReadLog()
    source = PreferenceSource(files=("rows.jsonl",), reader=f"{place}:pairs")
    found = list(iter_preferences(source, log))
    assert [(row.line, item.prompt.text, item.prompt.id) for row, item in found] == [
        (1, "One", "rows:1"),
        (3, "Three", "rows:3"),
    ]
    assert (log.records, log.rows, log.dropped) == (3, 2, {"skipped": 1})
    assert log.formats == {"rows.jsonl": f"reader {place}:pairs"}


def test_every_row_of_one_record_has_an_id_of_its_own() -> None:
    ids = [name for _, name, _ in demonstrations("my_readers.py:twice")]
    assert ids == ["rows:1", "rows:1.2", "rows:2", "rows:2.2", "rows:3", "rows:3.2"]


def test_an_id_of_none_is_no_id() -> None:
    ids = [name for _, name, _ in demonstrations("my_readers.py:no_ids")]
    assert ids == ["rows:1", "rows:1.2", "rows:2", "rows:2.2", "rows:3", "rows:3.2"]


def test_numpy_becomes_json(folder: Path) -> None:
    source = DemonstrationSource(files=("rows.jsonl",), reader="my_readers.py:array")
    (_, first), *_ = iter_demonstrations(source, ReadLog())
    assert first.prompt.meta == {"choice": [0, 1]}
    choosing = PreferenceSource(files=("rows.jsonl",), reader="my_readers.py:array")
    with pytest.raises(DataError, match=r"rows.jsonl:1: field"):
        list(iter_preferences(choosing, ReadLog()))


@pytest.mark.parametrize("code", ["import sys; sys.exit(2)", "raise SystemExit"])
@pytest.mark.parametrize("place", ["leaves.py", "leaves"])
def test_a_module_that_ends_the_program_cannot_be_loaded(
    code: str, place: str, folder: Path
) -> None:
    (folder / "leaves.py").write_text(code)
    with pytest.raises(RecipeError, match=r"cannot be (loaded|imported) \(SystemExit"):
        load_reader(f"{place}:pairs")


def test_rows_of_a_whole_file_stand_at_its_last_record() -> None:
    found = demonstrations("my_readers.py:joined")
    assert [(line, name) for line, name, _ in found] == [
        (3, "rows:3"),
        (3, "rows:3.2"),
        (3, "rows:3.3"),
    ]


def test_file_hides_no_module_of_its_name(folder: Path) -> None:
    (folder / "json.py").write_text("def pairs(records):\n    return []\n")
    import json

    assert load_reader("json.py:pairs")([]) == []
    assert json.loads("1") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_readers.py", "is no file and function; write"),
        (":pairs", "is no file and function"),
        ("my_readers:", "is no file and function"),
        ("elsewhere.py:pairs", "there is no file .*elsewhere.py"),
        ("elsewhere:pairs", r"elsewhere cannot be imported .*path/to/elsewhere.py:pairs"),
        ("my_readers.py:none", "there is no function none in my_readers.py"),
        ("my_readers.py:answer", "there is no function answer"),
        ("my_readers.py:Kept", "Kept is a class; name a function"),
        ("broken.py:pairs", r"cannot be loaded \(SyntaxError"),
    ],
)
def test_reader_that_is_not_there(name: str, message: str, folder: Path) -> None:
    (folder / "broken.py").write_text("def pairs(:\n")
    with pytest.raises(RecipeError, match=message):
        load_reader(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("failing", r"rows.jsonl:1: the reader .* failed: KeyError: 'nothing'"),
        ("failing_first", r"^rows.jsonl: the reader .* failed: ValueError: not today"),
        ("leaving", r"^rows.jsonl: the reader .* failed: SystemExit: 3"),
        ("one_row", r"^rows.jsonl: the reader .* returned {.* \(an object\); expected rows: `yi"),
        ("nothing", r"^rows.jsonl: the reader .* returned null \(nothing\); expected rows"),
        ("the_class", r"^rows.jsonl:1: .* yielded the class Drop; expected a dict.* or Drop\(\"re"),
        ("deep", r"^rows.jsonl:1: field 'deep': .* nested more than 100 deep"),
        ("surrogate", r"^rows.jsonl:1: field 'half': .* half a surrogate pair"),
        ("sets", r"^rows.jsonl:1: field 'tags': .* found a set, which JSON cannot hold"),
        ("numbers", r"^rows.jsonl:1: .* yielded the key 7; expected texts as keys"),
        ("early", "yielded a row before it took a record"),
        ("wrong", r"rows.jsonl:1: the reader .* yielded \"One\" \(a text\); expected a dict"),
        ("incomplete", r"rows.jsonl:1: field 'output_text': is missing"),
    ],
)
def test_faulty_reader(function: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        demonstrations(f"my_readers.py:{function}")


def test_current_directory_is_looked_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(folder)])
    (folder / "lying_here.py").write_text("def pairs(records):\n    return []\n")
    assert load_reader("lying_here:pairs")([]) == []


def test_drop_has_a_reason() -> None:
    assert Drop("why").reason == "why"


def test_a_reader_may_import_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "helper_of_mine.py").write_text("ANSWER = 'Hi.'\n")
    reader = tmp_path / "mine.py"
    reader.write_text("import helper_of_mine\n\ndef pairs(records):\n    return records\n")
    assert callable(load_reader(f"{reader}:pairs"))
