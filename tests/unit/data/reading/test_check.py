from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amenable.config.data import (
    DemonstrationSource,
    PreferenceColumns,
    PreferenceSource,
    SourceConfig,
)
from amenable.data.reading import check, fixed_rows, row_ids
from amenable.data.reading.check import MOST_TRIED, check_files
from amenable.data.reading.check_report import FoundFaults
from amenable.data.reading.readers import read_preferences
from amenable.data.reading.row_ids import RowIds
from amenable.errors import DataError, RecipeError, StorageError, UsageError

Write = Callable[..., Path]
Json = dict[str, Any]

PAIR = {"input_text": "Sum it up.", "candidate_0": "Short.", "candidate_1": "Long.", "choice": 1}
TRL = {"prompt": "Sum it up.", "chosen": "Short.", "rejected": "Long."}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def encoded(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = b"".join(encoded(row) + b"\n" for row in rows)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_rows


def lines_of(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# What is found ----------------------------------------------------------------------------------

FAULTS: dict[str, tuple[bytes, str | None, str]] = {
    "not UTF-8": (b'{"input_text": "caf\xe9"}', None, "byte 20 is not UTF-8 (0xe9)"),
    "NaN": (encoded({**PAIR, "margin": float("nan")}), None, "JSON has no NaN"),
    "infinity": (encoded({**PAIR, "weight": float("-inf")}), None, "JSON has no -Infinity"),
    "a 10 MB line": (encoded({**PAIR, "x": "y" * 10**7}), None, "more than 8 MiB"),
    "nested junk": (encoded(PAIR)[:-1] + b', "x": ' + b"[" * 9999, None, "is not valid JSON"),
    "nested too deep": (
        encoded(PAIR)[:-1] + b', "x": ' + b"[" * 101 + b"]" * 101 + b"}",
        None,
        "nested more than 100 deep",
    ),
    "half a line": (encoded(PAIR)[:30], None, "is not valid JSON"),
    "two rows in a line": (encoded(PAIR) * 2, None, "is not valid JSON"),
    "a list": (b"[1, 2]", None, "found [1,2] (a list); expected a JSON object"),
    "a lone surrogate": (encoded({**PAIR, "candidate_0": "\ud800"}), None, "surrogate"),
    "choice as text": (encoded({**PAIR, "choice": "0"}), "choice", 'found "0" (a text)'),
    "choice as truth": (encoded({**PAIR, "choice": True}), "choice", "found true (a truth value)"),
    "no choice": (encoded({**PAIR, "choice": None}), "choice", "found null (nothing)"),
    "equal candidates": (encoded({**PAIR, "candidate_0": "Long."}), "candidate_1", "equals"),
    "empty text": (encoded({**PAIR, "candidate_0": ""}), "candidate_0", "is empty"),
    "blank text": (encoded({**PAIR, "input_text": " \n"}), "input_text", "is empty"),
    "no candidate": (
        encoded({key: PAIR[key] for key in ("input_text", "candidate_0", "choice")}),
        "candidate_1",
        "is missing; the row has 'input_text', 'candidate_0', 'choice'",
    ),
    "weight 0": (encoded({**PAIR, "weight": 0}), "weight", "expected a number above 0"),
    "empty id": (encoded({**PAIR, "id": ""}), "id", "expected a text or a whole number"),
    "strength": (encoded({**PAIR, "strength": 2}), "strength", "contradicts choice"),
    "assistant last": (
        encoded({**PAIR, "input_text": None, "messages": CHAT}),
        "messages",
        "the last message is the assistant's",
    ),
    "another schema": (encoded(TRL), None, "this row looks like 'trl'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_finds_the_fault_with_its_place(write: Write, name: str) -> None:
    raw, field, message = FAULTS[name]
    path = write(PAIR, raw, PAIR)
    report = check_files([path])
    (fault,) = report.faults
    assert (fault.file, fault.line, fault.field) == (str(path), 2, field)
    assert message in fault.reason
    assert not report.ok
    assert report.rows == 2


def test_finds_all_faults_of_several_files_in_their_order(write: Write) -> None:
    raws = [raw for raw, _, _ in FAULTS.values()]
    half = len(raws) // 2
    first = write(PAIR, *raws[:half], PAIR, name="b.jsonl")
    second = write(*(row for raw in raws[half:] for row in (PAIR, raw)), name="a.jsonl.gz")
    report = check_files([first, second], max_errors=0)
    found = [(fault.file, fault.line, fault.field) for fault in report.faults]
    fields = [field for _, field, _ in FAULTS.values()]
    expected = [(str(first), line, field) for line, field in enumerate(fields[:half], 2)]
    expected += [(str(second), 2 * line, f) for line, f in enumerate(fields[half:], 1)]
    assert found == expected
    assert [file.faults for file in report.files] == [half, len(raws) - half]
    assert [file.rows for file in report.files] == [2, len(raws) - half]
    assert sum(report.reasons.values()) == report.fault_count == len(raws)


def test_finds_a_half_written_last_line_and_a_truncated_gzip(write: Write, tmp_path: Path) -> None:
    whole = b"\n".join([encoded(PAIR)] * 3)
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(whole[:-20])
    cut = tmp_path / "cut.jsonl.gz"
    data = gzip.compress(b"".join(encoded({**PAIR, "n": str(n) * 9}) + b"\n" for n in range(5000)))
    cut.write_bytes(data[:-30])
    report = check_files([torn, cut])
    first, *others = report.faults
    assert (first.file, first.line) == (str(torn), 3)
    assert "the file ends in the middle" in first.reason
    assert any("is not a whole gzip file" in fault.reason for fault in others)
    assert all(fault.file == str(cut) for fault in others)
    assert report.files[1].rows > 0


def test_a_byte_order_mark_and_other_coercions_are_named(write: Write) -> None:
    path = write(b"\xef\xbb\xbf" + encoded(PAIR), b"", {**PAIR, "id": 7, "group": None}, b" ")
    report = check_files([path])
    assert report.ok
    assert report.files[0].coerced == {
        "blank line skipped": 2,
        "byte order mark skipped": 1,
        "null read as absent": 1,
        "whole number read as a name (id, group, annotator)": 1,
    }
    assert "    2 × blank line skipped" in "\n".join(report.lines())


def test_says_which_file_is_missing_and_reads_the_others(write: Write, tmp_path: Path) -> None:
    path = write({**PAIR, "choice": 3})
    report = check_files([tmp_path / "none.jsonl", path, path])
    reasons = [fault.reason for fault in report.faults]
    assert "there is no such file" in reasons[0]
    assert "given twice" in reasons[1]
    assert report.faults[2].line == 1


def test_a_file_without_rows_is_a_fault(write: Write) -> None:
    report = check_files([write(name="empty.jsonl"), write(b"nonsense", name="text.jsonl")])
    assert report.fault_count == 2
    assert [file.kind for file in report.files] == [None, None]
    assert "not read; 0 records, 0 rows, 1 fault" in next(iter(report.lines()))


def test_records_before_the_first_known_one_are_faults(write: Write) -> None:
    report = check_files([write({"txt": 1}, {"a": 2}, PAIR, {**PAIR, "choice": 4})])
    assert [fault.line for fault in report.faults] == [1, 2, 4]
    assert "is in no known format" in report.faults[0].reason


def test_gives_up_on_a_file_of_unknown_records(write: Write) -> None:
    path = write(*({"txt": n} for n in range(150)))
    report = check_files([path], max_errors=0)
    assert report.fault_count == MOST_TRIED + 1
    assert "the others were not read" in report.faults[-1].reason
    assert report.faults[-1].line is None


def test_keeps_the_first_faults_and_counts_all(write: Write) -> None:
    rows = [{**PAIR, "choice": str(n), "id": f"r{n}"} for n in range(500)]
    path = write({**PAIR, "id": "a"}, {**PAIR, "id": "a"}, *rows)
    report = check_files([path], max_errors=3)
    assert [(fault.line, fault.field) for fault in report.faults] == [
        (2, "id"),  # found last, but it stands first
        (3, "choice"),
        (4, "choice"),
    ]
    assert report.fault_count == 501
    assert report.reasons["field 'choice': found a text"] == 500
    assert sum(report.reasons.values()) == 501
    told = list(report.lines())
    assert "501 faults, the first 3 shown" in told
    assert "          500 × field 'choice': found a text" in told


def test_faults_of_one_place_stay_in_the_order_in_which_they_were_found() -> None:
    found = FoundFaults(2)
    for line, message in ((5, "a"), (5, "b"), (5, "c"), (1, "d"), (None, "e")):
        found.add(DataError(message, path="p", line=line), 0)
    assert [fault.reason for fault in found.kept()] == ["d", "a"]
    assert found.count == 5


# Kinds and formats --------------------------------------------------------------------------------


def test_each_file_is_of_its_own_kind(write: Write) -> None:
    paths = [
        write(PAIR, name="pairs.jsonl"),
        write({"input_text": "a", "output_text": "b"}, name="shown.jsonl"),
        write({"input_text": "a"}, name="asked.jsonl"),
        write(TRL, name="trl.jsonl"),
        write({**PAIR, "choice": "0"}, name="faulty.jsonl"),
        write({"prompt": "a", "completion": "b"}, name="trl-shown.jsonl"),
    ]
    report = check_files(paths)
    assert [(file.kind, file.format) for file in report.files] == [
        ("preferences", "native"),
        ("demonstrations", "native"),
        ("prompts", "native"),
        ("preferences", "trl"),
        ("preferences", "native"),
        ("demonstrations", "trl"),
    ]
    assert report.fault_count == 1


def test_a_kind_that_is_named_is_held_to(write: Write) -> None:
    path = write({"input_text": "a"}, {"input_text": "b", "output_text": "c"})
    assert check_files([path], "prompts").ok
    assert [fault.field for fault in check_files([path], "demonstrations").faults] == [
        "output_text"
    ]
    source = DemonstrationSource(files=(str(path),))
    assert [fault.line for fault in check_files(source).faults] == [1]


def test_a_format_that_has_no_such_kind_is_one_fault(write: Write) -> None:
    path = write(*[{"prompt": "a", "completion": "b", "label": True}] * 3)
    report = check_files(SourceConfig(files=(str(path),), format="kto"), "demonstrations")
    assert report.fault_count == 1
    assert "has no demonstrations" in report.faults[0].reason
    with pytest.raises(RecipeError, match="unknown"):
        check_files(SourceConfig(files=(str(path),), format="none"))


def test_other_formats_go_the_way_of_training(write: Write) -> None:
    rated = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "c", "label": False},
        {"prompt": "z", "completion": "d", "label": True},
        {"prompt": "a", "completion": "e", "label": 7},
    ]
    report = check_files([write(*rated, name="kto.jsonl"), write(TRL, {**TRL, "chosen": ""})])
    assert [(fault.line, fault.field) for fault in report.faults] == [(4, "label"), (2, "chosen")]
    assert report.files[0].rows == 1
    ((reason, count),) = report.files[0].dropped.items()
    assert (reason.startswith("the only answer"), count) == (True, 1)
    assert "left out: the only answer" in "\n".join(report.lines())


def test_a_column_map_is_followed(write: Write) -> None:
    columns = PreferenceColumns(input_text="q", candidate_0="a", candidate_1="b", choice="best")
    rows = [{"q": "Q", "a": "A", "b": "B", "best": best} for best in (0, 1, 7)]
    report = check_files(PreferenceSource(files=(str(write(*rows)),), columns=columns))
    assert [(fault.line, fault.field) for fault in report.faults] == [(3, "best")]
    assert report.files[0].format == "column map"


READER = """
def pairs(records):
    for number, record in enumerate(records):
        if "boom" in record:
            raise ValueError("boom")
        yield {"input_text": record["q"], "output_text": record["a"], "id": f"x{number // 2}"}

def none(records):
    for record in records:
        pass
    return iter(())
"""


def test_a_reader_function_is_called(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "check_readers.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(
        {"q": "a", "a": "b"}, {"q": "", "a": "b"}, {"q": "c", "a": "d"}, {"q": "c", "a": "e"}
    )
    source = SourceConfig(files=(str(path),), reader="check_readers:pairs")
    report = check_files(source)
    assert [(fault.line, fault.field) for fault in report.faults] == [(2, "input_text"), (4, "id")]
    assert report.files[0].kind == "demonstrations"
    path = write({"boom": 1}, {"q": "a", "a": "b"})
    (fault,) = check_files(source).faults
    assert "the reader check_readers:pairs failed: ValueError: boom" in fault.reason
    assert check_files(SourceConfig(files=(str(path),), reader="check_readers:none")).rows == 0


def test_csv_and_json_arrays_are_checked_like_lines(write: Write, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text(
        "id,input_text,candidate_0,candidate_1,choice\n"
        'a,"One\nTwo",A,B,0\nb,Q,A,A,1\na,Q,A,B,tie\nc,Q,A,B,best\n'
    )
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([{**PAIR, "id": n} for n in ("x", "y", "x", "z", "x")]))
    report = check_files([table, array])
    assert [(fault.file, fault.line, fault.field) for fault in report.faults] == [
        (str(table), 4, "candidate_1"),
        (str(table), 5, "id"),
        (str(table), 6, "choice"),
        (str(array), 1, "id"),
        (str(array), 1, "id"),
    ]


def test_parquet_is_checked_like_lines(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR, {**PAIR, "choice": 5}, PAIR]), path)
    report = check_files([path])
    assert [(fault.line, fault.field) for fault in report.faults] == [(2, "choice")]


# Ids ----------------------------------------------------------------------------------------------


def test_an_id_used_twice_is_told_with_both_places(write: Write) -> None:
    one = write({**PAIR, "id": "a"}, PAIR, {**PAIR, "id": 7}, name="one.jsonl")
    two = write(PAIR, b"rubbish", {**PAIR, "id": "a"}, {**PAIR, "id": "7"}, name="two.jsonl")
    report = check_files([one, two])
    assert [str(fault) for fault in report.faults if fault.field == "id"] == [
        f"{two}:3: field 'id': 'a' is used twice (first at {one}:1); give each row its own",
        f"{two}:4: field 'id': '7' is used twice (first at {one}:3); give each row its own",
    ]
    assert [file.rows for file in report.files] == [3, 1]
    with pytest.raises(DataError) as caught:  # and training says the same
        read_preferences([one, write(PAIR, PAIR, {**PAIR, "id": "a"}, name="two.jsonl")])
    assert str(caught.value) == str(report.faults[1])


def test_a_default_id_can_be_taken(write: Write) -> None:
    path = write({**PAIR, "id": "rows:3"}, PAIR, PAIR)
    (fault,) = check_files([path]).faults
    assert (fault.line, fault.field) == (3, "id")


def test_files_of_one_name_in_two_folders_share_no_default_id(write: Write) -> None:
    paths = [write(PAIR, name="a/rows.jsonl"), write(PAIR, name="b/rows.jsonl")]
    assert check_files(paths).ok


def test_ids_of_other_kinds_are_apart(write: Write) -> None:
    paths = [
        write({**PAIR, "id": "a"}, name="pairs.jsonl"),
        write({"input_text": "b", "id": "a"}, name="asked.jsonl"),
    ]
    assert check_files(paths).ok


def test_equal_hashes_of_two_names_are_no_fault(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_ids, "hash", lambda name: len(name), raising=False)
    path = write(*({**PAIR, "id": name} for name in ("a", "b", "cc", "b", "d", "a")))
    report = check_files([path])
    assert [fault.line for fault in report.faults] == [4, 6]


def test_ids_take_eight_bytes_a_row() -> None:
    tracemalloc.start()
    try:
        ids = RowIds()
        ids.begin_file(0)
        for line in range(1, 100_001):
            ids.add(f"row-{line}", line)
        assert tracemalloc.get_traced_memory()[0] < 1_000_000  # arrays grow by an eighth at a time
    finally:
        tracemalloc.stop()
    assert [len(rows) for rows in ids.repeated()] == [0, 0]


def test_rows_find_their_places_again() -> None:
    ids = RowIds()
    places = [(0, 1), (0, 2), (0, 5), (0, 5), (0, 6), (2, 1), (2, 2), (2, 9)]
    for file in range(3):
        ids.begin_file(file)
        for number, line in places:
            if number == file:
                ids.add(f"{len(ids) % 3}", line)
    assert [ids.place(row) for row in range(len(ids))] == places
    later, first = ids.repeated()
    assert later.tolist() == [3, 4, 5, 6, 7]
    assert first.tolist() == [0, 1, 2, 0, 1]
    assert ids.by_file(later) == {0: 2, 2: 3}


def test_ids_beyond_those_shown_are_counted_and_not_looked_up(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**PAIR, "id": f"r{n // 2}"} for n in range(2000)]
    paths = [write(*rows[:1001], name="a.jsonl"), write(*rows[1001:], name="b.jsonl")]
    whole = check_files(paths, max_errors=0)
    looked_up = 0
    again = check._Check._again

    def counted(self: Any, ids: RowIds, wanted: list[int]) -> Any:
        nonlocal looked_up
        looked_up += len(wanted)
        return again(self, ids, wanted)

    monkeypatch.setattr(check._Check, "_again", counted)
    some = check_files(paths, max_errors=7)
    assert looked_up == 14
    assert some.faults == whole.faults[:7]
    assert (some.fault_count, some.rows) == (whole.fault_count, whole.rows) == (1000, 1000)
    assert some.reasons == whole.reasons
    assert some.files == whole.files


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_ids_of_a_pipe_cannot_be_looked_up_which_is_told(tmp_path: Path) -> None:
    read, write_end = os.pipe()
    rows = [{**PAIR, "id": name} for name in ("a", "b", "a", "a")]
    os.write(write_end, b"".join(encoded(row) + b"\n" for row in rows))
    os.close(write_end)
    try:
        report = check_files([f"/dev/fd/{read}"], fix=tmp_path / "fixed.jsonl")
    finally:
        os.close(read)
    (fault,) = report.faults
    assert fault.field == "id"
    assert "cannot be told where a pipe is read" in fault.reason
    assert (report.fault_count, report.rows, report.files[0].faults) == (2, 2, 2)
    assert [row["id"] for row in lines_of(tmp_path / "fixed.jsonl")] == ["a", "b"]


def test_a_file_that_changes_between_the_readings_is_told(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write({**PAIR, "id": "a"}, {**PAIR, "id": "a"})
    before = RowIds.repeated

    def changed(ids: RowIds) -> Any:
        path.write_bytes(encoded({**PAIR, "id": "b"}) + b"\n")
        return before(ids)

    monkeypatch.setattr(RowIds, "repeated", changed)
    with pytest.raises(DataError, match="changed while it was read"):
        check_files([path])


# Fixing -------------------------------------------------------------------------------------------


def test_the_fixed_file_is_clean_and_nothing_is_lost(write: Write, tmp_path: Path) -> None:
    good = [{**PAIR, "id": f"r{n}", "source": {"page": n}} for n in range(5)]
    chat = {**PAIR, "messages": CHAT[:1], "weight": 2, "annotator": 3, "choice": "tie"}
    del chat["input_text"]
    again = {**PAIR, "id": "r2", "choice": 0}
    raws = [raw for raw, _, _ in FAULTS.values()]
    one = write(*good, *raws, chat, again, name="one.jsonl")
    two = write(again, PAIR, {**PAIR, "margin": 10**30}, name="two.jsonl.gz")
    out = tmp_path / "out" / "fixed.jsonl"
    report = check_files([one, two], fix=out)
    assert report.fixed is not None
    rejects = lines_of(tmp_path / "out" / "fixed.rejects.jsonl")
    assert check_files([out]).ok
    assert check_files([out]).rows == report.fixed.rows == report.rows == 8
    assert len(rejects) == report.fixed.rejected == report.fault_count == len(raws) + 2
    kept = read_preferences([out])
    assert kept[:5] == read_preferences([write(*good, name="good.jsonl")])
    assert [row.prompt.id for row in kept[5:]] == [f"one:{6 + len(raws)}", "two:2", "two:3"]
    assert kept[5].prompt.messages[0].content == "Hi"
    assert (kept[5].weight, kept[5].annotator, kept[7].margin) == (2.0, "3", 1e30)
    for entry, (raw, field, message) in zip(rejects, FAULTS.values(), strict=False):
        assert (entry["field"], entry["file"]) == (field, str(one))
        assert message in entry["reason"]
        if isinstance(entry["raw"], dict):
            assert entry["raw"] == json.loads(raw)
        else:  # of a line that is too long only the beginning
            text = raw.decode("utf-8", "backslashreplace")
            assert entry["raw"] == (text[:1000] if len(raw) > 10**7 else text)
    assert [entry["line"] for entry in rejects[: len(raws)]] == [6 + n for n in range(len(raws))]
    assert [(entry["line"], entry["raw"]) for entry in rejects[-2:]] == [
        (7 + len(raws), again),
        (1, again),
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "fixed.jsonl",
        "fixed.rejects.jsonl",
    ]
    assert any(line.endswith("fixed.jsonl: 8 rows written") for line in report.lines())


def test_a_clean_file_leaves_no_rejects_and_other_formats_become_native(
    write: Write, tmp_path: Path
) -> None:
    out = tmp_path / "fixed.jsonl"
    report = check_files([write(TRL, {**TRL, "margin": 2, "source": "s"})], fix=out)
    assert report.fixed is not None
    assert report.fixed.rejects is None
    assert not (tmp_path / "fixed.rejects.jsonl").exists()
    assert [row["candidate_0"] for row in lines_of(out)] == ["Short.", "Short."]
    assert lines_of(out)[1]["source"] == "s"
    assert check_files([out], "preferences").files[0].format == "native"


def test_nothing_is_written_over(write: Write, tmp_path: Path) -> None:
    path = write(PAIR)
    out = tmp_path / "fixed.jsonl"
    check_files([path], fix=out)
    before = out.read_bytes()
    for name, said in (
        ("fixed.jsonl", "exists and is not overwritten"),
        ("rows.jsonl", "is one of the files to check"),
        ("fixed.json", r"ends with \.jsonl"),
    ):
        with pytest.raises(UsageError, match=said):
            check_files([path], fix=tmp_path / name)
    (tmp_path / "new.rejects.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"new\.rejects\.jsonl exists"):
        check_files([path], fix=tmp_path / "new.jsonl")
    assert out.read_bytes() == before
    assert lines_of(path) == [PAIR]


def test_a_file_that_appears_meanwhile_is_not_written_over(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "fixed.jsonl", RowIds.repeated
    monkeypatch.setattr(RowIds, "repeated", lambda ids: out.write_text("mine") and before(ids))
    with pytest.raises(StorageError, match="has appeared since"):
        check_files([write(PAIR)], fix=out)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed.jsonl", "rows.jsonl"]


def test_files_of_several_kinds_are_not_fixed_into_one(write: Write, tmp_path: Path) -> None:
    paths = [write(PAIR, name="a.jsonl"), write({"input_text": "x"}, name="b.jsonl")]
    with pytest.raises(UsageError, match="hold preferences and prompts; fix one kind at a time"):
        check_files(paths, fix=tmp_path / "fixed.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert check_files(paths, "prompts", fix=tmp_path / "fixed.jsonl").ok


@pytest.mark.parametrize("moment", ["write", "reject", "finish"])
def test_an_interrupted_fix_leaves_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = write(PAIR, b"rubbish", PAIR)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fixed_rows.FixedRows, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            check_files([path], fix=tmp_path / "fixed.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]
    assert check_files([path], fix=tmp_path / "fixed.jsonl").fixed is not None


def test_a_full_disk_is_told_and_leaves_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fixed_rows.os, "fsync", full)
    with pytest.raises(StorageError, match="cannot write"):
        check_files([write(PAIR)], fix=tmp_path / "fixed.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_other_keys_that_native_rows_need_for_themselves_are_kept(
    write: Write, tmp_path: Path
) -> None:
    path = write({**TRL, "choice": 5, "other_choice": 6}, {**TRL, "n": 10**25})
    assert check_files([path]).ok
    report = check_files([path], fix=tmp_path / "fixed.jsonl")
    assert report.ok
    assert sum(report.files[0].coerced.values()) == 1
    first, second = lines_of(tmp_path / "fixed.jsonl")
    assert (first["choice"], first["other_choice"], first["other_other_choice"]) == (0, 6, 5)
    assert second["n"] == pytest.approx(10**25)


# The report ---------------------------------------------------------------------------------------


def test_the_report_as_json_and_as_lines(write: Write) -> None:
    path = write(PAIR, {**PAIR, "choice": 2})
    report = check_files([path])
    told = json.loads(json.dumps(report.as_json()))
    reason = 'found 2 (a number); expected 0 or 1 (a number, the preferred candidate) or "tie"'
    assert told == {
        "ok": False,
        "records": 2,
        "rows": 1,
        "fault_count": 1,
        "faults": [{"file": str(path), "line": 2, "field": "choice", "reason": reason}],
        "faults_by_reason": {"field 'choice': found a number": 1},
        "files": [
            {
                "file": str(path),
                "kind": "preferences",
                "format": "native",
                "records": 2,
                "rows": 1,
                "faults": 1,
                "dropped": {},
                "coerced": {},
            }
        ],
        "fixed": None,
    }
    assert list(report.lines()) == [
        f"{path}: preferences, native; 2 records, 1 row, 1 fault",
        f"{path}:2: field 'choice': {reason}",
        "1 fault",
    ]
    clean = check_files([write(PAIR)])
    assert clean.ok
    assert list(clean.lines())[-1] == "no faults in 1 record"


def test_a_second_check_says_the_same(write: Write) -> None:
    path = write(PAIR, *(raw for raw, _, _ in FAULTS.values()), {**PAIR, "id": "rows:1"})
    assert check_files([path]).as_json() == check_files([path]).as_json()


def test_the_short_way_says_what_the_full_way_says(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [PAIR, *(raw for raw, _, _ in FAULTS.values()), {**PAIR, "id": "rows:1"}, {"a": 1}]
    path = write(*rows)
    short = check_files([path]).as_json()
    monkeypatch.setattr(check, "PLAIN", dict.fromkeys(check.PLAIN, lambda values: False))
    assert check_files([path]).as_json() == short


def test_a_whole_check_imports_nothing_heavy(write: Write, tmp_path: Path) -> None:
    path = write({**PAIR, "id": "a"}, {**PAIR, "id": "a"}, b"rubbish", TRL)
    code = (
        "import sys; import amenable.data.reading.check as c; from pathlib import Path\n"
        f"report = c.check_files([{str(path)!r}], fix=Path({str(tmp_path / 'fixed.jsonl')!r}))\n"
        "assert report.fault_count == 3\n"
        "heavy = ('torch', 'transformers', 'pyarrow', 'datasets', 'fsspec', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
