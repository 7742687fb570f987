"""Conversion: what is written, what is refused, what the report says, and in which containers."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amenable.config.data import (
    PreferenceColumns,
    PreferenceSource,
    PromptColumns,
    PromptSource,
    SourceConfig,
)
from amenable.data.reading import row_writer
from amenable.data.reading.convert import convert
from amenable.data.reading.convert import lines as told
from amenable.data.reading.readers import read_demonstrations, read_preferences, read_prompts
from amenable.data.reading.records import DroppingLog
from amenable.data.reading.row_writer import write_rows
from amenable.errors import DataError, StorageError, UsageError

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Yes?"}
PLAIN = {"input_text": "Q", "candidate_0": "A", "candidate_1": "B", "choice": 1}
TIE = {**PLAIN, "choice": "tie"}
CHAT = {"messages": [USER, ANSWER, USER], "candidate_0": "A", "candidate_1": "B", "choice": 0}
WITH_SYSTEM = {**CHAT, "messages": [SYSTEM, USER]}
FULL = {
    **PLAIN,
    "id": "n1",
    "group": "g1",
    "weight": 2.0,
    "margin": 0.5,
    "annotator": "ann",
    "strength": 8,
    "topic": "t",
}


def rows(folder: Path, *records: dict[str, Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


# What is written ------------------------------------------------------------------------------


def test_shapes_of_a_preference(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Q"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in "BA")
    expected: dict[str, list[dict[str, Any]]] = {
        "trl": [{"prompt": "Q", "chosen": "B", "rejected": "A"}],
        "trl-chat": [{"prompt": asked, "chosen": chosen, "rejected": rejected}],
        "kto": [
            {"prompt": asked, "completion": chosen, "label": True},
            {"prompt": asked, "completion": rejected, "label": False},
        ],
        "gcpc": [PLAIN],
        "gcpc-chat": [
            {
                "messages": [{"author": "user", "content": "Q"}],
                "candidate_0": "A",
                "candidate_1": "B",
                "choice": 1,
            }
        ],
        "hh": [
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: B",
                "rejected": "\n\nHuman: Q\n\nAssistant: A",
            }
        ],
        "sharegpt": [
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "B"},
                "rejected": {"from": "gpt", "value": "A"},
            }
        ],
        "alpaca": [{"instruction": "Q", "input": "", "chosen": "B", "rejected": "A"}],
        "openai-preference": [
            {
                "input": {"messages": asked},
                "preferred_output": chosen,
                "non_preferred_output": rejected,
            }
        ],
    }
    path = rows(tmp_path, PLAIN)
    for to, records in expected.items():
        out = tmp_path / f"{to}.jsonl"
        report = convert([path], to, out)
        assert lines(out) == records, to
        assert (report["written"], report["lines"]) == (1, len(records))


def test_margins_are_in_all_rows_or_in_none(tmp_path: Path) -> None:
    path = rows(tmp_path, PLAIN, {**PLAIN, "margin": 0.5})
    report = convert([path], "trl", tmp_path / "out.jsonl")
    assert [row["margin"] for row in lines(tmp_path / "out.jsonl")] == [0.0, 0.5]
    assert report["filled"] == {"margin": 0.0}
    zipped = tmp_path / "out.jsonl.gz"
    convert([path], "trl", zipped)
    assert [row["margin"] for row in lines(zipped)] == [0.0, 0.5]


def test_comparisons_come_back_as_they_were(tmp_path: Path) -> None:
    record = {
        "info": {"id": "t3", "post": "A cat.", "title": "Cats", "subreddit": "aww"},
        "summaries": [
            {"text": " Cat.", "policy": "ref", "note": None},
            {"text": " Dog.", "policy": "ppo", "note": "?"},
        ],
        "choice": 1,
        "worker": "w",
        "batch": "b",
        "split": "train",
        "extra": {"confidence": 8, "seconds": 3},
    }
    article = {**record, "info": {"id": "x", "site": "cnn", "title": "C", "article": "A cat."}}
    undecided = {**record, "extra": {"confidence": 5}}
    path = rows(tmp_path, record, article, undecided)
    report = convert([path], "openai-summarize", tmp_path / "back.jsonl")
    assert lines(tmp_path / "back.jsonl") == [record, article, undecided]
    assert report["not_held"] == {}
    # and by the way of the native format
    convert([path], "native", tmp_path / "native.jsonl")
    convert([tmp_path / "native.jsonl"], "openai-summarize", tmp_path / "again.jsonl")
    assert lines(tmp_path / "again.jsonl") == [record, article, undecided]


def test_edited_query_is_not_written_as_a_comparison(tmp_path: Path) -> None:
    info = {"title": "Cats", "subreddit": "aww"}
    path = rows(tmp_path, {**PLAIN, "info": info}, PLAIN)
    report = convert([path], "openai-summarize", tmp_path / "out.jsonl")
    assert report["not_written"] == {
        "the prompt is no longer the query of its title and subreddit": 1
    }
    for strange in ({"info": 3}, {"summaries": [1, 2]}, {"extra": []}, {"worker": "x"}):
        path, out = rows(tmp_path, {**PLAIN, **strange}, PLAIN), tmp_path / "o.jsonl"
        report = convert([path], "openai-summarize", out, force=True)
        assert sum(report["not_written"].values()) == 1, strange


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "record", "reason"),
    [
        ("trl", TIE, "a tie, which the format cannot say"),
        ("gcpc", TIE, "a tie, which"),
        ("kto", TIE, "a tie, which"),
        ("gcpc", CHAT, "a conversation of several turns"),
        ("trl", CHAT, "a conversation of several turns"),
        ("openai-summarize", CHAT, "a conversation of several turns"),
        ("gcpc", WITH_SYSTEM, "a system message"),
        ("hh", WITH_SYSTEM, "a system message"),
        ("gcpc-chat", {**CHAT, "messages": [USER, SYSTEM, USER]}, "does not stand first"),
        ("gcpc-chat", {**CHAT, "messages": [ANSWER, USER]}, "does not begin with the user"),
        ("alpaca", {**CHAT, "messages": [USER, USER]}, "does not alternate"),
        ("hh", {**PLAIN, "input_text": "Q\n\nHuman: R"}, "a marker of turns"),
        ("hh", {**PLAIN, "candidate_0": "A\n\nAssistant: A"}, "a marker of turns"),
        ("native", PLAIN, ""),
        ("native", TIE, ""),
        ("gcpc-chat", WITH_SYSTEM, ""),
        ("hh", CHAT, ""),
    ],
)
def test_row_is_refused_rather_than_changed(
    to: str, record: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    report = convert([rows(tmp_path, PLAIN, record)], to, tmp_path / "out.jsonl")
    assert report["rows"] == 2
    if not reason:
        assert (report["written"], report["not_written"]) == (2, {})
        return
    assert report["written"] == 1
    ((found, count),) = report["not_written"].items()
    assert reason in found
    assert count == 1
    assert report["first_not_written"] == {found: f"{tmp_path / 'rows.jsonl'}:2"}


def test_nothing_to_write_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"no row can be written as 'trl': 2 × a tie"):
        convert([rows(tmp_path, TIE, TIE)], "trl", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_fault_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("kept\n")
    path = rows(tmp_path, PLAIN, {**PLAIN, "choice": 7})
    with pytest.raises(DataError, match=r"rows.jsonl:2: field 'choice'"):
        convert([path], "trl", out, force=True)
    assert out.read_text() == "kept\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
    report = convert([path], "trl", out, log=DroppingLog(), force=True)
    assert (report["written"], sum(report["dropped"].values())) == (1, 1)


@pytest.mark.parametrize(
    ("to", "out", "message"),
    [
        ("kto", "out.jsonl", "cannot be written with prompts; these can: gcpc"),
        ("hh", "out.jsonl", "cannot be written with prompts"),
        ("trl", "out.txt", "expected a name that ends with .jsonl"),
        ("trl", "rows.jsonl", "is one of the files to read"),
        ("nothing", "out.jsonl", "'nothing' is unknown"),
    ],
)
def test_what_cannot_be_asked_for(to: str, out: str, message: str, tmp_path: Path) -> None:
    path = rows(tmp_path, {"input_text": "Q"})
    with pytest.raises(UsageError, match=message):
        convert([path], to, tmp_path / out)


# What the report says -------------------------------------------------------------------------


def test_report_counts_what_the_format_does_not_hold(tmp_path: Path) -> None:
    path = rows(tmp_path, FULL, {**PLAIN, "choice": 0})
    report = convert([path], "gcpc", tmp_path / "out.jsonl")
    assert report["not_held"] == dict.fromkeys(
        ["id", "group", "weight", "margin", "annotator", "strength", "other keys"], 1
    )
    assert lines(tmp_path / "out.jsonl")[0] == PLAIN
    trl = convert([path], "trl", tmp_path / "trl.jsonl")["not_held"]
    assert trl["order of the candidates"] == 1
    assert "margin" not in trl
    assert convert([path], "native", tmp_path / "native.jsonl")["not_held"] == {}


def test_report_of_a_reading(tmp_path: Path) -> None:
    path = rows(tmp_path, PLAIN)
    report = convert([path], "trl", tmp_path / "out.jsonl")
    assert report["formats"] == {str(path): "native"}
    assert (report["kind"], report["to"], report["records"], report["rows"]) == (
        "preferences",
        "trl",
        1,
        1,
    )
    json.dumps(report)


def test_report_in_words(tmp_path: Path) -> None:
    path = rows(tmp_path, FULL, TIE, {**PLAIN, "choice": "0"}, {**PLAIN, "choice": 0})
    out = tmp_path / "out.jsonl"
    report = convert([path], "trl", out, log=DroppingLog())
    assert told(report) == [
        f"{out}: 2 of 3 preferences written as trl",
        f"    read    {path} as native",
        "    dropped 1 × field 'choice': found a text",
        f"    refused 1 × a tie, which the format cannot say (first: {path}:2)",
        *(
            f"    lost    {what}, of 1 rows"
            for what in (
                "annotator",
                "group",
                "id",
                "order of the candidates",
                "other keys",
                "strength",
                "weight",
            )
        ),
        "    filled  margin = 0.0 where a row had none: it must be in all rows",
    ]
    kto = told(convert([rows(tmp_path, PLAIN)], "kto", tmp_path / "kto.jsonl"))
    assert kto[0] == f"{tmp_path / 'kto.jsonl'}: 1 of 1 preferences written as kto (2 lines)"


# Kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (PLAIN, "preferences"),
        (
            {"messages": [{**USER, "candidate_0": "A", "candidate_1": "B", "choice": 0}]},
            "preferences",
        ),
        ({"input_text": "Q", "output_text": "A"}, "demonstrations"),
        ({"input_text": "Q"}, "prompts"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preferences"),
        ({"prompt": "Q", "completion": "A"}, "demonstrations"),
        ({"prompt": "Q"}, "prompts"),
        ({"instruction": "Q", "output": "A"}, "demonstrations"),
        ({"messages": [USER, ANSWER]}, "demonstrations"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "prompts"),
    ],
)
def test_kind_is_found_by_the_first_record(
    record: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    report = convert([rows(tmp_path, record)], "trl-chat", tmp_path / "out.jsonl")
    assert report["kind"] == kind


def test_history_is_written_where_it_alternates(tmp_path: Path) -> None:
    path = rows(tmp_path, {**CHAT, "messages": [SYSTEM, USER, ANSWER, USER]})
    convert([path], "alpaca", tmp_path / "out.jsonl")
    (written,) = lines(tmp_path / "out.jsonl")
    assert (written["system"], written["history"]) == ("Be kind.", [["Hello?", "Yes?"]])


def test_kind_of_what_a_reader_makes(tmp_path: Path) -> None:
    reader = tmp_path / "mine.py"
    reader.write_text(
        "def f(records):\n    for row in records:\n        yield {'input_text': row['q']}\n"
    )
    path, empty = rows(tmp_path, {"q": "Q"}), rows(tmp_path, name="empty.jsonl")
    source = SourceConfig(files=(str(path),), reader=f"{reader}:f")
    assert convert(source, "gcpc", tmp_path / "out.jsonl")["kind"] == "prompts"
    with pytest.raises(DataError, match=r"empty.jsonl: no file has a row"):
        convert([empty], "gcpc", tmp_path / "none.jsonl")
    skipping = SourceConfig(files=(str(empty), str(path)), reader=f"{reader}:f")
    log = DroppingLog()
    assert convert(skipping, "gcpc", tmp_path / "more.jsonl", log=log)["written"] == 1


def test_kind_may_be_named_and_columns_of_a_section_are_used(tmp_path: Path) -> None:
    path = rows(tmp_path, PLAIN)
    assert convert([path], "gcpc", tmp_path / "p.jsonl", kind="prompts")["lines"] == 1
    assert lines(tmp_path / "p.jsonl") == [{"input_text": "Q"}]
    mapped = rows(tmp_path, {"q": "Q", "a": "A", "b": "B", "best": "b"}, name="mapped.jsonl")
    columns = PreferenceColumns(
        input_text="q", candidate_0="a", candidate_1="b", choice="best", choice_values=("a", "b")
    )
    source = PreferenceSource(files=(str(mapped),), columns=columns)
    convert(source, "gcpc", tmp_path / "m.jsonl")
    assert lines(tmp_path / "m.jsonl") == [PLAIN]
    convert(source, "gcpc", tmp_path / "asked.jsonl", kind="prompts")
    assert lines(tmp_path / "asked.jsonl") == [{"input_text": "Q"}]
    prompts = PromptSource(files=(str(mapped),), columns=PromptColumns(input_text="q"))
    assert convert(prompts, "native", tmp_path / "n.jsonl")["kind"] == "prompts"


# Containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
@pytest.mark.parametrize("to", ["trl", "gcpc", "native", "hh", "alpaca"])
def test_flat_rows_come_back_from_every_container(ending: str, to: str, tmp_path: Path) -> None:
    strange = {**PLAIN, "input_text": 'Q "1",\r\n\tä\u2028 \x00 end', "candidate_0": " 007 "}
    path = rows(tmp_path, strange, {**PLAIN, "margin": 0.5}, {**PLAIN, "choice": 0})
    out = tmp_path / f"out{ending}"
    report = convert([path], to, out)
    assert report["written"] == 3
    before, after = read_preferences([path]), read_preferences([out])
    assert [(row.prompt.text, row.chosen, row.rejected) for row in after] == [
        (row.prompt.text, row.chosen, row.rejected) for row in before
    ]


@pytest.mark.parametrize("to", ["trl-chat", "sharegpt", "gcpc-chat", "openai-preference", "kto"])
def test_nested_rows_come_back_from_parquet_and_are_refused_by_csv(to: str, tmp_path: Path) -> None:
    path = rows(tmp_path, CHAT, WITH_SYSTEM)
    out = tmp_path / "out.parquet"
    convert([path], to, out)
    before, after = read_preferences([path]), read_preferences([out])
    assert [(row.prompt.messages, row.chosen) for row in after] == [
        (row.prompt.messages, row.chosen) for row in before
    ]
    with pytest.raises(DataError, match="has lists or objects, which CSV has no place for"):
        convert([path], to, tmp_path / "out.csv")


def test_rows_of_different_types_fit_no_table(tmp_path: Path) -> None:
    path = rows(tmp_path, {**PLAIN, "topic": 1}, {**PLAIN, "topic": "one"})
    with pytest.raises(DataError, match=r"do not fit into one table .*write .jsonl"):
        convert([path], "native", tmp_path / "out.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_table_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="Parquet needs the package pyarrow"):
        convert([rows(tmp_path, PLAIN)], "trl", tmp_path / "out.parquet")


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    path = rows(tmp_path, PLAIN, FULL)
    outs = [tmp_path / name / "out.jsonl.gz" for name in ("a", "b")]
    for out in outs:
        convert([path], "native", out)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_other_keys_of_any_sort_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    written = [{"large": 10**30, "none": None}]
    assert write_rows(out, iter(written), {}) == (1, [])
    assert lines(out) == written


def test_comparisons_that_nobody_made_are_counted(tmp_path: Path) -> None:
    pair = {"input_text": "Q", "choice": 0}
    path = rows(
        tmp_path,
        {**pair, "candidate_0": "A", "candidate_1": "B"},
        {**pair, "candidate_0": "C", "candidate_1": "D"},
        {**pair, "candidate_0": "C", "candidate_1": "D"},
        {**pair, "input_text": "R", "candidate_0": "C", "candidate_1": "D"},
    )
    report = convert([path], "kto", tmp_path / "out.jsonl")
    assert report["invented"] == 2  # A over D, C over B
    assert report["not_held"] == {"which two answers were compared": 3}
    assert "    added   2 comparisons that nobody made: kto says" in "\n".join(told(report))
    pairs = {(row.chosen, row.rejected) for row in read_preferences([tmp_path / "out.jsonl"])}
    assert pairs == {("A", "B"), ("C", "D"), ("A", "D"), ("C", "B")}
    both = rows(tmp_path, PLAIN, {**PLAIN, "choice": 0}, name="both.jsonl")
    assert convert([both], "kto", tmp_path / "both-out.jsonl")["invented"] == 0


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path, out = rows(tmp_path, PLAIN), tmp_path / "out.jsonl"
    convert([path], "trl", out)
    with pytest.raises(UsageError, match=r"out.jsonl exists and is not overwritten; name another"):
        convert([path], "gcpc", out)
    assert "prompt" in lines(out)[0]
    convert([path], "gcpc", out, force=True)
    assert lines(out) == [PLAIN]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def appearing() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        out.write_text("theirs")

    with pytest.raises(StorageError, match="has appeared since"):
        write_rows(out, appearing(), {})
    assert out.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_two_processes_that_write_one_file_mix_no_rows(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from amenable.data.reading.row_writer import write_rows\n"
        "def rows():\n"
        "    for n in range(60):\n"
        "        time.sleep(0.005)\n"
        "        yield {'who': sys.argv[2], 'text': 'x' * 5000}\n"
        "write_rows(Path(sys.argv[1]), rows(), {}, force=True)\n"
    )
    out = tmp_path / "out.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, out, name]) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    assert len({row["who"] for row in lines(out)}) == 1
    assert len(lines(out)) == 60


@pytest.mark.parametrize(
    ("ending", "others"),
    [
        (".csv", [{"n": 7}, {"n": 8}]),
        (".csv", [{"is": True}, {"is": False}]),
        (".csv", [{"t": ""}, {"t": ""}]),
        (".parquet", [{"o": {"a": 1}}, {"o": {"b": 2}}]),
    ],
)
def test_what_a_table_makes_of_other_keys_is_counted(
    ending: str, others: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = rows(tmp_path, *({**PLAIN, **more} for more in others), PLAIN)
    report = convert([path], "native", tmp_path / f"out{ending}")
    assert report["not_held"] == {"other keys as they stood, which a table changes": 2}
    texts = rows(tmp_path, {**PLAIN, "topic": "a"}, PLAIN, name="texts.jsonl")
    assert convert([texts], "native", tmp_path / f"texts{ending}")["not_held"] == {}


def test_choices_and_ties_fit_no_parquet(tmp_path: Path) -> None:
    path, out = rows(tmp_path, PLAIN, TIE), tmp_path / "out.parquet"
    with pytest.raises(DataError) as caught:
        convert([path], "native", out)
    assert "column 'choice' has numbers and texts); write .jsonl" in caught.value.reason
    assert caught.value.path == out
    convert([path], "native", tmp_path / "out.csv")
    assert len(read_preferences([tmp_path / "out.csv"])) == 2


@pytest.mark.parametrize(
    ("row", "why"), [("Q,A,C,1", "another row; write"), ("Q,A,A,1", r"another row \(equals")]
)
def test_a_table_that_would_be_read_as_other_rows_does_not_appear(
    row: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(path: Path, again: Any, keys: Any) -> None:
        path.write_text(f"input_text,candidate_0,candidate_1,choice\n{row}\n")

    monkeypatch.setitem(row_writer._WRITERS, ".csv", changing)
    with pytest.raises(DataError, match=f"out.csv: row 1: it would be read back as {why}"):
        convert([rows(tmp_path, PLAIN)], "gcpc", tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_demonstrations_and_prompts(tmp_path: Path) -> None:
    path = rows(tmp_path, {"messages": [SYSTEM, USER], "output_text": "Yes."})
    for to in ("trl-chat", "gcpc-chat", "sharegpt", "openai-messages", "native", "alpaca"):
        out = tmp_path / f"{to}.jsonl"
        convert([path], to, out)
        (back,) = read_demonstrations([out])
        assert [turn.content for turn in back.prompt.messages] == ["Be kind.", "Hello?"], to
        assert back.output_text == "Yes."
        assert read_prompts([out])[0].messages == back.prompt.messages
