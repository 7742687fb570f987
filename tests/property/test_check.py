"""The check finds what training finds, and its short way takes nothing that is wrong."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from amenable.data.formats.format import Kind
from amenable.data.formats.native import (
    NATIVE,
    demonstration_to_row,
    preference_to_row,
    prompt_to_row,
)
from amenable.data.reading.check import check_files
from amenable.data.reading.plain_rows import PLAIN
from amenable.data.reading.readers import (
    id_used_twice,
    iter_demonstrations,
    iter_preferences,
    iter_prompts,
)
from amenable.data.reading.records import ReadLog, Row
from amenable.errors import DataError

from .data_strategies import (
    RESERVED,
    demonstrations,
    json_values,
    names,
    near_rows,
    preferences,
    prompts,
    texts,
)

Json = dict[str, Any]

KINDS: list[Kind] = ["demonstrations", "preferences", "prompts"]
READERS: dict[Kind, Any] = {
    "demonstrations": iter_demonstrations,
    "preferences": iter_preferences,
    "prompts": iter_prompts,
}

values = (
    json_values
    | texts
    | names
    | st.sampled_from([0, 1, 2, 5, 9, "tie", "0", True, 1.0, -1, 10**400, "", " ", None])
)
good_rows = (
    preferences.map(preference_to_row)
    | demonstrations.map(demonstration_to_row)
    | prompts().map(prompt_to_row)
)


@st.composite
def mutated(draw: st.DrawFn) -> Json:
    """A good row with some keys taken away and some set to anything."""
    row = dict(draw(good_rows))
    for key in draw(st.lists(st.sampled_from(sorted(row)), max_size=2)):
        row.pop(key, None)
    changed = draw(st.dictionaries(st.sampled_from(sorted(RESERVED)), values, max_size=3))
    return {**row, **changed}


@st.composite
def plain_rows(draw: st.DrawFn) -> Json:
    """Rows that are nearly always plain, with every optional key."""
    return draw(
        st.fixed_dictionaries(
            {
                "input_text": texts,
                "output_text": texts,
                "candidate_0": texts,
                "candidate_1": texts,
                "choice": st.sampled_from([0, 1, "tie"]),
            },
            optional={
                "id": names,
                "group": names,
                "annotator": names,
                "weight": st.floats(0, 1e300) | st.integers(0, 2**70),
                "margin": st.floats(-1, 1e300) | st.integers(-1, 2**70),
                "strength": st.integers(0, 10),
                "else": json_values,
            },
        )
    )


lines = st.lists(
    (mutated() | near_rows | plain_rows()).map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b""))
    | mutated().map(lambda row: json.dumps(row, ensure_ascii=False).encode()[:-7]),
    min_size=1,
    max_size=8,
)


@settings(max_examples=1000)
@given(st.sampled_from(KINDS), mutated() | near_rows | plain_rows())
def test_a_plain_row_is_one_row_without_fault_and_coercion(kind: Kind, row: Json) -> None:
    log = ReadLog()
    if not PLAIN[kind](row):
        return
    (item,) = getattr(NATIVE, kind)(Row(row, "rows.jsonl", 1, "rows", log))
    assert not log.coerced
    prompt = item if kind == "prompts" else item.prompt
    assert prompt.id == row.get("id", "rows:1")


@given(st.sampled_from(KINDS), plain_rows())
def test_rows_with_good_values_are_plain(kind: Kind, row: Json) -> None:
    row = {key: value for key, value in row.items() if key not in ("weight", "margin", "strength")}
    assert PLAIN[kind](row) or (kind == "preferences" and row["candidate_0"] == row["candidate_1"])


class Collecting(ReadLog):
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[DataError] = []

    def fault(self, error: DataError, raw: object = None) -> None:
        self.errors.append(error)


def as_training_reads(path: Path, kind: Kind) -> tuple[Collecting, int]:
    """The log of the reader, with ids used twice, and the rows that are left."""
    log = Collecting()
    places: dict[str, str] = {}
    for row, item in READERS[kind]([path], log):
        prompt = item if kind == "prompts" else item.prompt
        if prompt.id in places:
            log.fault(id_used_twice(prompt.id, row, places[prompt.id]))
        places.setdefault(prompt.id, f"{row.path}:{row.line}")
    return log, len(places)


@settings(max_examples=400)
@given(st.sampled_from(KINDS), lines, texts)
def test_the_check_finds_what_training_finds(kind: Kind, raws: list[bytes], text: str) -> None:
    first = {"input_text": text, "output_text": "a", "candidate_0": "b", "candidate_1": "c"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join([json.dumps({**first, "choice": 0}).encode(), *raws]))
        log, rows = as_training_reads(path, kind)
        report = check_files([path], kind, max_errors=0)
        assert [str(fault) for fault in report.faults] == [
            str(error) for error in sorted(log.errors, key=lambda error: error.line or 0)
        ]
        assert report.rows == rows
        assert report.records == log.records
        assert report.files[0].coerced == dict(log.coerced)
        few = check_files([path], kind, max_errors=2)
        assert few.faults == report.faults[:2]
        assert few.reasons == report.reasons


@settings(max_examples=200)
@given(st.sampled_from(KINDS), lines, texts)
def test_the_fixed_file_holds_the_good_rows(kind: Kind, raws: list[bytes], text: str) -> None:
    first = {"input_text": text, "output_text": "a", "candidate_0": "b", "candidate_1": "c"}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "rows.jsonl", Path(folder) / "fixed.jsonl"
        path.write_bytes(b"\n".join([json.dumps({**first, "choice": 0}).encode(), *raws]))
        report = check_files([path], kind, max_errors=0, fix=out)
        assert report.fixed is not None
        again = check_files([out], kind)
        assert again.ok
        assert (again.rows, report.fixed.rejected) == (report.rows, report.fault_count)
        before = [item for _, item in READERS[kind]([path], Collecting())]
        after = [item for _, item in READERS[kind]([out], ReadLog())]
        kept = Counter(map(repr, before))
        assert all(kept[repr(item)] for item in after)
        assert len(after) == report.rows
