from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_jsonl
from amenable.cli import main as cli
from amenable.models import load as loading
from amenable.pipeline.lock import run_lock

from ..judges.chat_service import ChatService  # noqa: TID252 - the tests are no package


def compare(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sys, "argv", ["amenable", "compare", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Completions of three systems for twelve prompts: one, two and three a's."""
    found = {}
    for name, text in (("base", "a"), ("tuned", "aa"), ("best", "aaa")):
        rows: list[dict[str, Any]] = [
            {"input_text": f"Text {n}.", "completion": text} for n in range(12)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(path)
    return found


def test_three_systems_by_a_service(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with ChatService() as service:
        words = (*files.values(), "--judge", service.url, "--judge-model", "m", "--out", str(out))
        assert compare(monkeypatch, *words, "--price", "1", "2", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert compare(monkeypatch, *words) == 0
    assert sum(service.asked.values()) == 72, "the second run asks nothing"
    assert found == json.loads((out / "comparison.json").read_text()) | {
        "comparisons": found["comparisons"]
    }
    rows = {(row["a"], row["b"]): row for row in found["comparisons"]}
    assert list(rows) == [("base", "tuned"), ("base", "best"), ("tuned", "best")]
    assert all(
        (row["win_rate"], row["prompts"], row["calls"]) == (1, 12, 24) for row in rows.values()
    )
    assert rows["base", "tuned"]["cost"] == pytest.approx(24 * (100 * 1 + 10 * 2) / 1e6)
    assert [row["system"] for row in found["rankings"]["m"]] == ["best", "tuned", "base"]
    looks = list(read_jsonl(out / "looks.jsonl"))
    assert len(looks) == 72
    assert {(look["first"], look["verdict"]) for look in looks[:2]} == {
        ("base", "second"),
        ("tuned", "first"),
    }
    assert "tuned against base 1.000 [" in capsys.readouterr().out
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "best ranks first of 3 systems" in page
    assert page.count("<li data-margins") == 12
    assert page.count("The first has 1, the second 2.") == 12


def test_unanswered_questions_are_told_in_the_page(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A judge whose scores are missing for a prompt; the comparison of the others stands."""
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "def f(prompts, completions, **_):\n"
        "    return [None if '7' in str(p) else len(c) for p, c in zip(prompts, completions)]\n"
    )
    out = tmp_path / "out"
    words = (files["base"], files["tuned"], "--judge", f"{scorer}:f", "--out", str(out))
    assert compare(monkeypatch, *words) == 1
    assert "2 questions went without a reply" in capsys.readouterr().err
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "Not finished:" in page
    assert page.count("no reply") == 1
    assert page.count("tuned won in both orders") == 11


def test_models_answer_and_judge(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model against ready completions, by a local model and by a function."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"input_text": f"Text {n}.", "completion": "ready " * n} for n in range(1, 7)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "def words(completions, **_):\n    return [len(c.split()) for c in completions]\n"
    )
    out = tmp_path / "out"
    words = (f"tiny={tiny}", f"ready={prompts}", "--prompts", str(prompts), "--out", str(out))
    judges = ("--judge", str(tiny), "--judge", f"{scorer}:words")
    assert compare(monkeypatch, *words, *judges) == 0
    found = json.loads((out / "comparison.json").read_text())["comparisons"]
    assert [(row["a"], row["b"], row["judge"]) for row in found] == [
        ("tiny", "ready", tiny.name),
        ("tiny", "ready", "words"),
    ]
    completions = list(read_jsonl(out / "completions.jsonl"))
    assert [row["completions"]["ready"] for row in completions] == [
        "ready " * n for n in range(1, 7)
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("{base}", "{tuned}"), "nobody judges"),
        (("{base}", "--judge", "m:f"), "needs two systems"),
        (("{base}", "{base}", "--judge", "m:f"), "two systems are called 'base'"),
        (("{base}", "{tuned}", "--judge", "http://127.0.0.1:9/v1"), "--judge-model"),
        (("{base}", "{tuned}", "--judge", "rule:length"), "cannot judge"),
        (("{base}", "{tuned}", "--judge", "file:///etc/hosts"), "no http or https URL"),
        (("{base}", "{tuned}", *("--judge", "{scorer}:f") * 2), "two judges have the same name"),
        (("{none}", "{tuned}", "--judge", "{scorer}:f"), "none.jsonl"),
        (("{base}", "smollm2-135m", "--judge", "{scorer}:f"), "name prompts with --prompts"),
        (("{base}", "{other}", "--judge", "{scorer}:f"), "other.jsonl: has no completion of"),
        (("{base}", "{empty}", "--judge", "{scorer}:f"), "a completion is missing"),
        (
            ("{base}", "{tuned}", "--judge", "{scorer}:f", "--audited", "nowhere"),
            "nowhere/audit.json: no such file; make it with `amenable audit FILE --judge JUDGE "
            "--out nowhere`",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    (tmp_path / "other.jsonl").write_text('{"input_text": "Else.", "completion": "x"}\n')
    (tmp_path / "empty.jsonl").write_text('{"input_text": "Text 0."}\n')
    (tmp_path / "scorer.py").write_text(
        "def f(completions, **_):\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "none.jsonl").write_text("")
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("other", "empty", "none")}
    places |= {"scorer": str(tmp_path / "scorer.py"), **files}
    filled = [word.format(**places) for word in words]
    assert compare(monkeypatch, *filled, "--out", str(tmp_path / "out")) == 2
    assert told in capsys.readouterr().err


def test_a_judge_without_verdicts_fails_the_comparison(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ChatService() as service:
        service.texts = ["I cannot say."] * 3
        words = (files["base"], files["tuned"], "--judge", service.url, "--judge-model", "m")
        assert compare(monkeypatch, *words, "--out", str(tmp_path / "out")) == 1
    assert "no verdict in 12.5%" in capsys.readouterr().err
    assert (tmp_path / "out" / "comparison.json").exists()


def test_a_second_command_on_the_same_folder_is_refused(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with ChatService() as service:
        words = (files["base"], files["tuned"], "--judge", service.url, "--judge-model", "m")
        with run_lock(out / ".lock"):
            assert compare(monkeypatch, *words, "--out", str(out)) == 1
            assert not service.asked
            assert [path.name for path in out.iterdir()] == [".lock"]
        told = capsys.readouterr().err
        assert f"{out}: process {os.getpid()} on " in told
        assert "is writing this folder; wait for it, stop it, or choose another folder" in told
        assert compare(monkeypatch, *words, "--out", str(out)) == 0


def test_judging_ready_completions_imports_no_torch(files: dict[str, str], tmp_path: Path) -> None:
    with ChatService() as service:
        code = (
            "import sys\nfrom amenable.cli.main import main\n"
            f"sys.argv = ['amenable', 'compare', {files['base']!r}, {files['tuned']!r}, '--judge', "
            f"{service.url!r}, '--judge-model', 'm', '--out', {str(tmp_path / 'out')!r}]\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"no_proxy": "127.0.0.1", "PATH": ""},
            check=True,
        )
    assert done.stdout.splitlines()[-1] == "0 False"


def test_a_reward_models_folder_judges_by_its_scores(
    tiny: Path,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its confidence is that of the temperature in its folder, or of 1, and it says which."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    out = tmp_path / "out"
    words = (files["base"], files["tuned"], "--judge", str(folder), "--out", str(out))
    assert compare(monkeypatch, *words) == 0
    (row,) = json.loads((out / "comparison.json").read_text())["comparisons"]
    assert (row["judge"], row["prompts"], row["bias"]["flips"]) == ("reward", 12, 0)
    assert "no reward_temperature is stored with it" in capsys.readouterr().err
    plain = [row["confidence"] for row in read_jsonl(out / "looks.jsonl")]
    config = json.loads((folder / "config.json").read_text()) | {"reward_temperature": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    assert compare(monkeypatch, *words) == 0
    assert "T = 0.25, which is stored with it" in capsys.readouterr().err
    calibrated = [row["confidence"] for row in read_jsonl(out / "looks.jsonl")]
    margins = [math.log(p / (1 - p)) for p in plain]
    assert max(map(abs, margins)) > 1e-3
    expected = [1 / (1 + math.exp(-margin / 0.25)) for margin in margins]
    assert calibrated == pytest.approx(expected, abs=1e-9)


def test_people_judge_by_a_sheet(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first run writes it; filled in, the same command reads it back."""
    out = tmp_path / "out"
    words = (files["base"], files["best"], "--judge", "people", "--out", str(out))
    assert compare(monkeypatch, *words) == 1
    assert "sheet.csv waits for people: 12 pairs" in capsys.readouterr().err
    assert not (out / "comparison.html").exists()
    sheet = out / "sheet.csv"
    with sheet.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["A"] for row in rows} == {"a", "aaa"}, "sides are drawn"
    assert "base" not in sheet.read_text()
    for row in rows:
        row["better"] = "A" if row["A"] == "aaa" else "b"
    rows[0]["better"] = "tie"
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert compare(monkeypatch, *words, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert (found["wins"], found["ties"], found["losses"]) == (11, 1, 0)
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert page.count("best won in both orders") == 11
    assert "says nothing of people" in page


def test_one_sheet_holds_all_pairs_of_systems(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (*files.values(), "--judge", "people", "--out", str(tmp_path / "out"))
    assert compare(monkeypatch, *words) == 1
    assert "sheet.csv waits for people: 36 pairs" in capsys.readouterr().err
    with (tmp_path / "out" / "sheet.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sides = [{row["A"], row["B"]} for row in rows]
    assert [sides.count(pair) for pair in ({"a", "aa"}, {"a", "aaa"}, {"aa", "aaa"})] == [12] * 3


def test_an_audit_corrects_the_win_rate(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A judge that people contradict in a quarter of the rows is not taken at its word."""
    people = tmp_path / "people.jsonl"
    rows = [
        {
            "input_text": f"Asked {n}.",
            "candidate_0": "a" * (1 + n % 2),
            "candidate_1": "a" * (2 - n % 2),
            "choice": (1 - n % 2) if n % 8 > 1 else n % 2,
        }
        for n in range(80)
    ]
    people.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "audit")
    with ChatService() as service:
        asked = ("--judge", service.url, "--judge-model", "m", "--template", "help-1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(
            sys, "argv", ["amenable", "audit", str(people), *asked, "--out", out, "--json"]
        )
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        audited = json.loads(capsys.readouterr().out)
        assert audited["accuracy"] == pytest.approx(0.75)
        words = (files["base"], files["tuned"], *asked, "--out", str(tmp_path / "out"))
        assert compare(monkeypatch, *words, "--audited", out, "--json") == 0
        (found,) = json.loads(capsys.readouterr().out)["comparisons"]
        assert found["win_rate"] == 1
        low, high = found["corrected_ci95"]
        assert low < found["corrected_win_rate"] <= high
        assert low < 0.95, "twelve prompts by a judge that errs prove less than it says"
        other = [*words, "--template", "answer-1", "--audited", out]
        assert compare(monkeypatch, *other) == 2
        assert "was asked another way" in capsys.readouterr().err


def test_models_are_also_sampled_for_their_diversity(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"input_text": f"Text {n}.", "completion": f"ready {n}"} for n in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "def length(prompts, completions, rows): return [len(c) for c in completions]"
    )
    words = (f"model={tiny}", f"ready={prompts}", "--prompts", str(prompts), "--json")
    judge = ("--judge", f"{scorer}:length", "--out", str(tmp_path / "out"))
    load, loaded = loading.load_causal_lm, []
    monkeypatch.setattr(
        loading, "load_causal_lm", lambda *given: loaded.append(given) or load(*given)
    )
    assert compare(monkeypatch, *words, *judge) == 0
    assert len(loaded) == 1, "one loading for both temperatures"
    found = json.loads(capsys.readouterr().out)["diversity"]
    assert list(found) == ["model"]
    assert set(found["model"]) == {"distinct_1", "distinct_2", "distinct_3", "duplicates"}
    assert compare(monkeypatch, *words, *judge, "--diversity", "0") == 0
    assert json.loads(capsys.readouterr().out)["diversity"] == {}
