"""`amenable data` as it is typed: what it prints, what it writes, how it ends."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amenable.cli import data
from amenable.cli import main as cli
from amenable.errors import DataError

PAIR = {"input_text": "Sum it up.", "candidate_0": "Short.", "candidate_1": "Long.", "choice": 1}
LLMBAR = {"input": "Say hi.", "output_1": "Hi.", "output_2": "Ho.", "label": 2}
COLUMNS = [
    *("--column", "input_text=input", "--column", "candidate_0=output_1"),
    *("--column", "candidate_1=output_2", "--column", "choice=label"),
    *("--column", "choice_values=1,2"),
]
READER = """
def pairs(records):
    for row in records:
        yield {"input_text": row["q"], "candidate_0": "a", "candidate_1": "b", "choice": 0}
"""

Run = Callable[..., tuple[int, str, str]]
Write = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_here(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["amenable", "data", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        streams = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, streams.out, streams.err

    return run_here


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: object, name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
        return str(path)

    return write_rows


def test_check_tells_every_fault_and_ends_with_2(run: Run, write: Write) -> None:
    path = write(PAIR, {**PAIR, "choice": "1"}, {**PAIR, "candidate_1": ""})
    code, out, _ = run("check", path)
    assert code == 2
    assert f"{path}:2: field 'choice': found \"1\" (a text); expected 0 or 1" in out
    assert f"{path}:3: field 'candidate_1': is empty" in out
    assert "2 faults" in out
    code, out, _ = run("check", path, "--max-errors", "1", "--json")
    assert code == 2
    assert [fault["line"] for fault in json.loads(out)["faults"]] == [2]
    assert run("check", write(PAIR))[0] == 0


def test_check_mends(run: Run, write: Write, tmp_path: Path) -> None:
    path = write(PAIR, {**PAIR, "choice": 7})
    good = tmp_path / "good.jsonl"
    assert run("check", path, "--fix", good)[0] == 2
    assert run("check", good)[0] == 0
    (reject,) = (tmp_path / "good.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["field"] == "choice"
    code, _, err = run("check", path, "--fix", good)
    assert code == 2
    assert "good.jsonl" in err


def test_check_looks_at_the_content(run: Run, write: Write) -> None:
    rows = [{**PAIR, "input_text": f"Question {n}?"} for n in range(40)]
    seen = write(*rows, name="seen.jsonl")
    held = write(rows[0], name="held.jsonl")
    code, out, _ = run("check", seen, "--content", "--held-out", held)
    assert code == 0
    assert "warning: 1 of 1 prompts of" in out
    assert f"{held}:1  Question 0?" in out
    _, out, _ = run("check", seen, "--content", "--json")
    assert json.loads(out)["content"]["sets"][seen]["rows"] == 40


def test_content_follows_the_faults_of_files_that_cannot_be_read(
    run: Run, write: Write, tmp_path: Path
) -> None:
    good = write(*({**PAIR, "input_text": f"Question {n}?"} for n in range(9)))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(json.dumps(PAIR).encode() * 99)[:-9])
    unknown = write({"a": 1}, name="unknown.jsonl")
    code, out, _ = run("check", good, "none.jsonl", torn, unknown, "--content", "--json")
    assert code == 2
    told = json.loads(out)
    assert told["fault_count"] >= 3
    assert told["content"]["sets"][good]["rows"] == 9
    code, out, err = run("check", good, "none.jsonl", "--content", "--held-out", "no.jsonl")
    assert code == 2
    assert "none.jsonl: there is no such file" in out
    assert "no.jsonl: there is no such file" in err
    code, out, _ = run("check", "none.jsonl", "--content", "--json")
    assert json.loads(out)["content"]["findings"] == []


def test_content_passes_over_records_before_the_first_known_one(run: Run, write: Write) -> None:
    path = write({"a": 1}, PAIR, PAIR)
    code, out, _ = run("check", path, "--content", "--json")
    assert code == 2
    assert json.loads(out)["content"]["sets"][path]["rows"] == 2


def test_secrets_are_not_printed(run: Run, tmp_path: Path) -> None:
    said = run("check", "https:/user:SECRET@h/x.jsonl")
    said += run("stats", "https:/user:SECRET@h/x.jsonl")
    said += run("convert", "memory://u:SECRET@h/x.jsonl", tmp_path / "o.jsonl", "--to", "trl")
    recipe = tmp_path / "r.toml"
    url = "https://u:SEC/RET@h/x?sig=SECRET"
    for line in (f"seed = '{url}'", f"data.'{url}' = 1", f"data.prompts = ['{url}', 1]"):
        recipe.write_text(line)
        said += run("show", recipe)
    assert "SECRET" not in str(said)
    assert "SEC/RET" not in str(said)


def test_secrets_of_any_error_are_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error in (DataError("at https://u:SECRET@h/x?sig=SECRET"), OSError("//u:SECRET@h")):
        for words in (["amenable"], ["amenable", "--debug"]):
            monkeypatch.setattr(sys, "argv", words)
            monkeypatch.setattr(cli, "app", lambda error=error, **_: fail(error))
            with pytest.raises(SystemExit):
                cli.main()
    said = capsys.readouterr().err
    assert "SECRET" not in said
    assert "Traceback" in said
    assert "at https://h/x?…" in said


def test_columns_and_readers_are_given_on_the_command_line(
    run: Run, write: Write, tmp_path: Path
) -> None:
    path = write(LLMBAR)
    code, out, _ = run("check", path)
    assert code == 2
    assert "is in no known format" in out
    assert run("check", path, *COLUMNS)[0] == 0
    reader = tmp_path / "mine.py"
    reader.write_text(READER)
    code, out, _ = run("stats", write({"q": "Which?"}), "--reader", f"{reader}:pairs", "--json")
    assert code == 0
    assert next(iter(json.loads(out).values()))["choices"]["0"] == 1


def test_convert_tells_what_was_lost(run: Run, write: Write, tmp_path: Path) -> None:
    path = write({**PAIR, "annotator": "ann"}, {**PAIR, "choice": "tie", "id": "t"})
    out_path = tmp_path / "out.jsonl"
    code, out, _ = run("convert", path, out_path, "--to", "trl")
    assert code == 0
    assert "1 of 2 preferences written as trl" in out
    assert "annotator, of 1 row" in out
    (row,) = map(json.loads, out_path.read_text().splitlines())
    assert row == {"prompt": "Sum it up.", "chosen": "Long.", "rejected": "Short."}
    words = ("convert", path, out_path, "--to", "native", "--json")
    assert run(*words)[0] == 2
    _, out, _ = run(*words, "--force")
    assert json.loads(out)["written"] == 2


def test_stats_prints_figures_and_stops_at_a_fault(run: Run, write: Write) -> None:
    code, out, _ = run("stats", write(PAIR, {**PAIR, "choice": "tie"}))
    assert code == 0
    assert "0 candidate_0, 1 candidate_1, 1 ties" in out
    code, _, err = run("stats", write(PAIR, {**PAIR, "choice": 3}))
    assert code == 2
    assert ":2: field 'choice': found 3" in err


def test_formats_are_listed(run: Run) -> None:
    _, out, _ = run("formats")
    assert "hh: chosen, rejected: two dialogues" in out
    _, out, _ = run("formats", "--json")
    rows: list[dict[str, Any]] = json.loads(out)
    assert {"native", "trl", "kto", "hh", "oasst"} <= {row["name"] for row in rows}
    assert next(row for row in rows if row["name"] == "oasst")["writes"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "none.jsonl", "--as", "pears"), "--as 'pears': expected one of demonstrations"),
        (("check", "none.jsonl", "--column", "choice"), "no KEY=COLUMN; write --column choice="),
        (
            ("check", "none.jsonl", "--column", "chioce=x"),
            "expected one of input_text, id, group, ",
        ),
        (("check", "none.jsonl", "--format", "lisp"), "format 'lisp' is unknown; expected auto"),
        (("stats", "none.jsonl"), "none.jsonl: there is no such file"),
        (("convert", "none.jsonl", "out.jsonl", "--to", "lisp"), "format 'lisp' is unknown"),
    ],
)
def test_bad_usage_is_told(run: Run, words: tuple[str, ...], message: str) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert message in f"{out}{err}"


def test_show_prints_tokens_writes_a_page_and_json(
    run: Run, write: Write, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("torch")
    tiny = request.getfixturevalue("tiny")
    path = write(PAIR)
    code, out, _ = run("show", path, "--model", tiny)
    assert code == 0
    assert "candidate_1 · chosen" in out
    page = tmp_path / "page.html"
    assert run("show", path, "--model", tiny, "--html", page)[0] == 0
    assert "candidate_1" in page.read_text("utf-8")
    _, out, _ = run("show", path, "--model", tiny, "--json")
    told = json.loads(out)
    assert len(told["rows"]) == 1
    assert told["tokens"]["kinds"]["preferences"]["rows"] == 1


def test_show_takes_a_recipe(
    run: Run, write: Write, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("torch")
    tiny = request.getfixturevalue("tiny")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'policy.reward = "m:f"\ndata.instruction = "Be brief."\ndata.prompts = ["{write(PAIR)}"]\n'
        f'model.base = "{tiny}"\n'
    )
    code, out, _ = run("show", recipe)
    assert code == 0
    assert "brief" in out.replace("|", "")


def test_a_held_out_file_may_not_be_trained_on(run: Run, write: Write) -> None:
    path = write(PAIR)
    code, out, err = run("check", path, "--content", "--held-out", path)
    assert code == 2
    assert "no faults in 1 record" in out
    assert "--held-out: " in err
    assert "is also among the files to train on" in err


@pytest.mark.parametrize("command", ["check", "convert"])
def test_a_terminated_command_leaves_nothing(command: str, tmp_path: Path) -> None:
    """The file is a pipe that never ends, so that the command is caught at work."""
    pipe, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    words = ["--fix", str(out)] if command == "check" else [str(out), "--to", "trl"]
    kind = ["--as", "preferences"]
    command_line = [sys.executable, "-m", "amenable", "data", command, str(pipe), *words, *kind]
    started = subprocess.Popen(
        command_line,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    with started, pipe.open("w") as file:
        file.write(f"{json.dumps(PAIR)}\n")
        file.flush()
        for _ in range(200):
            if len(list(tmp_path.iterdir())) > 1:
                break
            time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) > 1, "it never began to write"
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_signal_that_does_not_interrupt_a_read_ends_it_all_the_same() -> None:
    """It lands on another thread here, as it may land just before a read begins."""
    empty, end = os.pipe()

    def terminate_elsewhere() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    give_up = threading.Timer(10, os.write, (end, b"late"))
    give_up.start()
    threading.Thread(target=terminate_elsewhere).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, data._sigterm_cleans_up():
        os.read(empty, 4)
    assert not give_up.finished.is_set(), "the read ended by itself"
    give_up.cancel()
    os.close(empty)
    os.close(end)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
