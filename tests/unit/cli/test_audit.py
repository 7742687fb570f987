from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_jsonl
from amenable.cli import main as cli
from amenable.pipeline.lock import run_lock

from ..judges.chat_service import ChatService  # noqa: TID252 - the tests are no package


def audit(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sys, "argv", ["amenable", "audit", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.fixture
def choices(tmp_path: Path) -> str:
    """People prefer more a's in 30 of 40 rows; every fourth row the other way."""
    rows = [
        {
            "input_text": f"Text {n}.",
            "candidate_0": "aa" if n % 2 else "a",
            "candidate_1": "a" if n % 2 else "aa",
            "choice": (0 if n % 2 else 1) if n % 4 else (1 if n % 2 else 0),
        }
        for n in range(40)
    ]
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_service_against_people(
    choices: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with ChatService() as service:
        words = (choices, "--judge", service.url, "--judge-model", "m", "--out", str(out))
        assert audit(monkeypatch, *words) == 0
        shown = capsys.readouterr().out
        assert audit(monkeypatch, *words, "--json") == 0
    assert sum(service.asked.values()) == 80
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "audit.json").read_text())
    assert (found["rows"], found["accuracy"], found["better_than_chance"]) == (40, 0.75, True)
    rows = list(read_jsonl(out / "disagreements.jsonl"))
    assert [row["input_text"] for row in rows] == [f"Text {n}." for n in range(0, 40, 4)]
    assert "Verdict" in rows[0]["replies"]["candidate_0 first"]
    assert "accuracy                0.750  [" in shown
    assert "Fewer than 100 rows" in shown
    assert "no pair was judged twice" in shown


def test_a_second_command_on_the_same_folder_is_refused(
    choices: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with run_lock(out / ".lock"):
        assert audit(monkeypatch, choices, "--judge", "none.py:f", "--out", str(out)) == 1
    assert "is writing this folder; wait for it" in capsys.readouterr().err


def test_a_url_is_no_place_for_results(
    choices: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(monkeypatch, choices, "--judge", "none.py:f", "--out", "s3://bucket/x") == 2
    assert "--out: takes a folder on this machine, no URL; copy it" in capsys.readouterr().err


def test_a_judge_at_chance_is_told_so(
    choices: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import hashlib\n"
        "def draw(prompts, completions, **_):\n"
        "    pairs = zip(prompts, completions)\n"
        "    return [hashlib.sha256(repr(pair).encode()).digest()[0] for pair in pairs]\n"
    )
    words = (choices, "--judge", f"{scorer}:draw", "--out", str(tmp_path / "out"))
    assert audit(monkeypatch, *words) == 0
    assert "CHANCE on these rows" in capsys.readouterr().out


def test_a_judge_that_likes_a_place_is_undecided(
    choices: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ChatService() as service:
        service.texts = ["Verdict: A"] * 80
        words = (choices, "--judge", service.url, "--judge-model", "m")
        assert audit(monkeypatch, *words, "--out", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "Undecided in 40 rows" in shown
    assert "NO BETTER THAN CHANCE" in shown


def rewardbench_rows(tmp_path: Path) -> str:
    """Six rows of Math, of which a scorer of lengths gets four; a pair of Ties, which it gets."""
    rows: list[dict[str, object]] = [
        {
            "id": str(n),
            "prompt": f"{n} + {n}?",
            "chosen": ["the sum" if n < 4 else "s"],
            "rejected": ["no", "two", "" if n else "?" * 40],
            "subset": "Math",
        }
        for n in range(1, 7)
    ]
    for kind, right in (("ref", ["a very long answer"]), ("tied", ["long enough", "long again!"])):
        rows.append(
            {
                "id": f"{kind}:0",
                "prompt": "Name one.",
                "chosen": right,
                "rejected": ["x"],
                "subset": "Ties",
            }
        )
    path = tmp_path / "rewardbench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_scorer_on_rewardbench_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "def length(prompts, completions, **_):\n"
        "    return [None if p == '6 + 6?' else len(c) for p, c in zip(prompts, completions)]\n"
    )
    out = tmp_path / "out"
    words = (rewardbench_rows(tmp_path), "--judge", f"{scorer}:length", "--out", str(out))
    assert audit(monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    assert "length on RewardBench 2, 8 rows" in shown
    assert "  Math            0.600  [" in shown
    assert "5 rows; chance 0.250" in shown
    assert "Not among the rows, so not in the mean: Factuality, Precise IF, Safety, Focus." in shown
    assert "1 rows have no score and are left out (" in shown
    assert audit(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "rewardbench.json").read_text())
    assert [row["score"] for row in found["domains"]] == pytest.approx([3 / 5, 1.01])
    assert found["overall"] == pytest.approx((0.6 + 1.01) / 2)
    rows = list(read_jsonl(out / "rewardbench.jsonl"))
    assert rows[0]["chosen"] == [7.0]
    assert rows[0]["rejected"] == [2.0, 3.0, 0.0]
    assert rows[5]["chosen"] == [None]
    assert rows[5]["reason"]
    assert audit(monkeypatch, *words, "--rows", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["overall"] == 1.0


def test_a_judge_that_reads_cannot_score_rewardbench_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatService() as service:
        words = (rewardbench_rows(tmp_path), "--judge", service.url, "--judge-model", "m")
        assert audit(monkeypatch, *words, "--out", str(tmp_path / "out")) == 2
        assert not service.asked
    assert "name a reward model, or a function that scores" in capsys.readouterr().err


def test_a_judge_that_reads_compares_the_pairs_of_rewardbench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "id": n,
            "prompt": f"Text {n}.",
            "chosen": "aa",
            "rejected": "a",
            "subset": "alpacaeval-easy",
        }
        for n in range(8)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatService() as service:
        words = (str(path), "--judge", service.url, "--judge-model", "m", "--json")
        assert audit(monkeypatch, *words, "--out", str(tmp_path / "out")) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
