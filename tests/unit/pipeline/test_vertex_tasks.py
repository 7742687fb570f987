"""Inside the tasks of Google Cloud's pipelines: what is judged, chosen, measured and written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from amenable.artifacts import RunFolder, read_json, read_jsonl, write_jsonl
from amenable.cli import main as cli
from amenable.config.load import load_recipe
from amenable.judges import opening
from amenable.judges.types import Question, Reply, Verdict
from amenable.pipeline import vertex_tasks

Json = dict[str, Any]
JUDGE = """
def near_20(prompts, completions, **_):
    return [-abs(len(text) - 20) for text in completions]
"""
COLUMNS = {
    "inference_instruction": {"template": "{{ default_instruction }}Summarize {{ id }}."},
    "inference_context": {"column": "document"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a judge; commands run in this process, which has torch already."""

    def amenable(*words: str) -> None:
        cli.app(list(words), standalone_mode=False)

    monkeypatch.setattr(vertex_tasks, "amenable", amenable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMENABLE_RUNS", "runs")
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def settings(**judge: str) -> str:
    return json.dumps({"judge": {"source": "judge.py:near_20", **judge}})


def sxs(**changes: Any) -> Json:
    """All parameters of AutoSxS."""
    return {
        "evaluation_dataset": "rows.jsonl",
        "task": "summarization@001",
        "id_columns": ["id"],
        "autorater_prompt_parameters": COLUMNS,
        "model_a": "",
        "model_b": "",
        "model_a_prompt_parameters": {},
        "model_b_prompt_parameters": {},
        "response_column_a": "a",
        "response_column_b": "b",
        "model_a_parameters": {},
        "model_b_parameters": {},
        "human_preference_column": "",
        "project": "",
        "location": "",
        "judgments_format": "jsonl",
        "bigquery_destination_prefix": "",
        "experimental_args": {},
        "encryption_spec_key_name": "",
        **changes,
    }


def write_sxs_rows() -> None:
    """a has n letters and b has n + 7, so that b is nearer to 20 while n is 16 or less."""
    write_jsonl(
        Path("rows.jsonl"),
        [
            {
                "id": n,
                "document": f"document {n}",
                "a": "x" * n,
                "b": "y" * (n + 7),
                "human": "A" if n > 12 else "B",
            }
            for n in range(20)
        ],
    )


def test_autosxs_judges_and_measures_the_judge(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """b wins 17 of 20. Of the 19 rows with two texts people give 7 to a, the judge 3 of these."""
    write_sxs_rows()
    found = vertex_tasks.autosxs(sxs(human_preference_column="human"), settings())
    assert found["evaluation_count"] == 20
    assert found["model_b_win_rate"] == pytest.approx(0.85)
    assert found["model_a_evaluation_resource_name"] == ""
    rows = list(read_jsonl(Path(found["judgments"])))
    assert rows[0] == {
        "id": 0,
        "inference_instruction": "Summarize 0.",
        "inference_context": "document 0",
        "response_a": "",
        "response_b": "yyyyyyy",
        "choice": "B",
        "confidence": 1.0,
        "explanation": "-20 against -13\n-13 against -20",
    }
    assert [row["choice"] for row in rows] == ["B"] * 17 + ["A"] * 3
    metrics = read_json(Path(found["judgments"]).with_name("metrics.json"))
    assert metrics["accuracy"] == pytest.approx(15 / 19)
    assert (metrics["precision"], metrics["recall"]) == (1.0, pytest.approx(3 / 7))
    assert metrics["human_preference_model_a_win_rate"] == pytest.approx(7 / 19)
    assert "not honoured: the judge is yours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"response_column_a": "c"}, "response_column_a: no column 'c' in evaluation_dataset"),
        ({"response_column_b": ""}, "model_b and response_column_b: both are empty"),
        ({"id_columns": ["key"]}, "id_columns: no column 'key'"),
        ({"task": "poetry"}, "task: no task 'poetry'; there are summarization, question_answering"),
        (
            {"autorater_prompt_parameters": {"inference_context": {"template": "{{ absent }}"}}},
            "inference_context: template '{{ absent }}': 'absent' is undefined",
        ),
        ({"model_a": "t5-small"}, "model_a: 't5-small' cannot be had: T5 is an encoder-decoder"),
    ],
)
def test_faults_of_autosxs(
    changes: Json, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sxs_rows()
    with pytest.raises(SystemExit) as caught:
        vertex_tasks.autosxs(sxs(**changes), settings())
    assert caught.value.code == 2
    assert words in capsys.readouterr().out


def test_people_say_a_or_b(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sxs_rows()
    with pytest.raises(SystemExit):
        vertex_tasks.autosxs(sxs(human_preference_column="document"), settings())
    assert "0 has 'document 0'; expected A or B" in capsys.readouterr().out


def test_nobody_judges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vertex_tasks.autosxs(sxs(), "{}")
    assert "nobody judges: Google's autorater is closed; name a judge" in capsys.readouterr().out


def look(first: str, verdict: str, confidence: float | None = None) -> Json:
    return {"first": first, "verdict": verdict, "confidence": confidence, "reply": ""}


@pytest.mark.parametrize(
    ("looks", "choice"),
    [
        ([look("a", "first"), look("b", "second")], ("A", 1.0)),
        ([look("a", "second", 0.25), look("b", "first", 0.75)], ("B", 0.75)),
        ([look("a", "first"), look("b", "first")], ("tie", 0.5)),
        ([look("a", "tie"), look("b", "first", 0.9)], ("B", 0.7)),
        ([look("a", "invalid"), look("b", "invalid")], ("Error", None)),
        ([], ("Error", None)),
    ],
)
def test_choice_of_two_orders(looks: list[Json], choice: tuple[str, float | None]) -> None:
    found = vertex_tasks._choice(looks)
    assert found == (choice[0], None if choice[1] is None else pytest.approx(choice[1]))


# AI feedback, inference, reward metrics -------------------------------------------------------


@pytest.fixture
def completions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Models that repeat the prompt as often as their name has letters; who was asked, and how."""
    asked: list[tuple[str, float]] = []

    def complete(
        model: Path | str, recipe: Any, prompts: Sequence[Any], temperature: float
    ) -> list[Json]:
        asked.append((str(model), temperature))
        times = len(str(model))
        return [{"input_text": p.text, "completion": p.text * times} for p in prompts]

    monkeypatch.setattr(vertex_tasks, "_complete", complete)
    return asked


def of_models(**changes: Any) -> Json:
    """What bulk inference and AI feedback have in common."""
    return {
        "large_model_reference": "tiny",
        "prompt_dataset": "prompts.jsonl",
        "model_checkpoint": "",
        "model_display_name": "mine",
        "prompt_sequence_length": 512,
        "target_sequence_length": 64,
        "sampling_strategy": "greedy",
        "instruction": "Say it",
        "accelerator_type": "CPU",
        **changes,
    }


def test_bulk_inference_has_the_references_shape(
    folder: Path, completions: list[tuple[str, float]]
) -> None:
    Path("prompts.jsonl").write_text('{"input_text": "ab\\n\\n[summary]: "}\n')
    out = vertex_tasks.infer(of_models(sampling_strategy="temperature_sampling"), "{}")
    assert out == "runs/mine/predictions.jsonl"
    assert list(read_jsonl(Path(out))) == [
        {
            "inputs": {
                "inputs_pretokenized": "Say it\n\nab\n\n[summary]: ",
                "targets_pretokenized": "",
            },
            "prediction": "ab\n\n[summary]: " * 4,
        }
    ]
    assert completions == [("tiny", 1.0)]
    vertex_tasks.infer(of_models(model_checkpoint="runs/tuned"), "{}")
    assert completions[1:] == [("runs/tuned", 0.0)]


def test_ai_preferences_keep_what_both_orders_agree_on(
    folder: Path, completions: list[tuple[str, float]]
) -> None:
    """a repeats 4 times and b 12 times: of 2 letters a has 8 and b 24, of 1 letter 4 and 12."""
    Path("prompts.jsonl").write_text('{"input_text": "ab"}\n{"input_text": "c"}\n')
    of = of_models(
        preference_prompt_dataset="prompts.jsonl",
        task_type="summarization",
        large_model_a_reference="tiny",
        large_model_b_reference="smollm2-135m",
    )
    out = Path(vertex_tasks.ai_preferences(of, settings()))
    assert out == Path("runs/mine/vertex/preferences.jsonl")
    rows = list(read_jsonl(out))
    assert [(row["input_text"], row["choice"]) for row in rows] == [("ab", 1), ("c", 1)]
    assert (rows[1]["candidate_0"], rows[1]["candidate_1"]) == ("cccc", "c" * 12)


def test_autosxs_asks_a_model(folder: Path, completions: list[tuple[str, float]]) -> None:
    """tiny repeats "document N" four times: 40 letters or more, further from 20 than 7 to 26."""
    write_sxs_rows()
    found = vertex_tasks.autosxs(
        sxs(
            model_a="tiny",
            model_a_prompt_parameters={"prompt": {"column": "document"}},
            model_a_parameters={"temperature": "0.5", "maxOutputTokens": "8"},
            response_column_a="",
        ),
        settings(),
    )
    assert completions == [("tiny", 0.5)]
    assert found["model_b_win_rate"] == 1.0
    (first, *_) = read_jsonl(Path(found["judgments"]))
    assert first["response_a"] == "document 0" * 4


def test_undecided_judge_is_no_teacher(
    folder: Path, completions: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.jsonl").write_text('{"input_text": "ab"}\n')
    of = of_models(
        preference_prompt_dataset="prompts.jsonl",
        task_type="summarization",
        large_model_a_reference="tiny",
        large_model_b_reference="tiny",
    )
    with pytest.raises(SystemExit):
        vertex_tasks.ai_preferences(of, settings())
    assert "decided for neither answer to any prompt" in capsys.readouterr().out


class Sure:
    """A judge that gives 0.8 to texts that begin with x, 0.2 to others."""

    name, identity = "sure", None

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> list[str]:
        for number, question in enumerate(questions):
            p = 0.8 if question.first.startswith("x") else 0.2
            keep(number, Reply(Verdict.FIRST, confidence=p))
        return []


def test_reward_metrics_on_preferences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three chosen texts get 0.8, one 0.2; the tie is left out."""
    monkeypatch.setattr(opening, "open_judge", lambda *_: Sure())
    pairs = [("x1", "y1", 0), ("y2", "x2", 1), ("x3", "y3", 1), ("x4", "y4", "tie")]
    write_jsonl(
        folder / "pairs.jsonl",
        [
            {"input_text": f"p{n}", "candidate_0": a, "candidate_1": b, "choice": choice}
            for n, (a, b, choice) in enumerate(pairs)
        ],
    )
    out = folder / "figures.json"
    vertex_tasks._evaluate_reward(RunFolder(folder / "run"), str(folder / "pairs.jsonl"), out)
    found = read_json(out)
    assert (found["rows"], found["accuracy"]) == (3, pytest.approx(2 / 3))
    assert found["cross_entropy"] == pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3)


def test_side_by_side_is_the_courses_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(folder / "run")
    answers: Mapping[str, str] = {"base": "long " * 60, "tuned": "short"}
    write_jsonl(
        run.stage("evaluate") / "completions.jsonl",
        [{"input_text": f"post {n}", "completions": answers} for n in range(7)],
    )
    recipe = load_recipe(None, ["data.instruction=Do", "data.task=docstrings", "policy.reward=a:b"])
    out = vertex_tasks._side_by_side(run, recipe, folder / "table.jsonl")
    rows = list(read_jsonl(out))
    assert len(rows) == 7
    assert rows[0] == {
        "prompt": "Do\n\npost 0",
        "base_model": answers["base"],
        "tuned_model": "short",
    }
    said = capsys.readouterr().out.splitlines()
    assert sum("tuned_model" in line for line in said) == 5
    assert max(map(len, said)) < 200


def test_run_folders_lie_on_the_volume_unless_the_environment_names_another_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AMENABLE_RUNS", raising=False)
    assert vertex_tasks.runs_root('{"kfp": {"mount": "/data"}}') == Path("/data")
    assert vertex_tasks.runs_root("{}") == Path("/runs")
    monkeypatch.setenv("AMENABLE_RUNS", "here")
    assert vertex_tasks.runs_root('{"kfp": {"mount": "/data"}}') == Path("here")


def test_files_are_made_once(folder: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("x")

    out = folder / "out"
    for of in (["1"], ["1"], ["2"], ["2"]):
        vertex_tasks._unless_made(out, of, make)
    out.unlink()
    vertex_tasks._unless_made(out, ["2"], make)
    assert len(made) == 3
