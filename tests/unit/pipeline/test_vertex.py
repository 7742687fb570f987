"""Google Cloud's pipelines under their own names: parameters, compiling, the course's run.

Needs kfp, which pins other versions of what the environment has: `make test-kfp`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kfp", reason="kfp is tested in an environment of its own: make test-kfp")

from kfp import compiler

from amenable.artifacts import read_json, read_jsonl
from amenable.config.load import load_recipe
from amenable.errors import UsageError
from amenable.pipeline import vertex
from amenable.pipeline.kfp_tasks import TaskFailed

pytestmark = pytest.mark.timeout(900)  # eight processes, each of which imports torch

ROOT = Path(__file__).parents[3]
REQUIRED = inspect.Parameter.empty
SHARED = {
    "reward_model_learning_rate_multiplier": 1.0,
    "reinforcement_learning_rate_multiplier": 1.0,
    "reward_model_train_steps": 1000,
    "reinforcement_learning_train_steps": 1000,
    "kl_coeff": 0.1,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "rlhf_pipeline": {
        "prompt_dataset": REQUIRED,
        "preference_dataset": REQUIRED,
        "large_model_reference": REQUIRED,
        "model_display_name": "",
        "prompt_sequence_length": 512,
        "target_sequence_length": 64,
        **SHARED,
        "instruction": "",
        "deploy_model": True,
        "eval_dataset": "",
        "project": "",
        "accelerator_type": "GPU",
        "location": "",
        "encryption_spec_key_name": "",
        "tensorboard_resource_id": "",
    },
    "infer_pipeline": {
        "large_model_reference": REQUIRED,
        "prompt_dataset": REQUIRED,
        "model_checkpoint": "",
        "prompt_sequence_length": 512,
        "target_sequence_length": 64,
        "sampling_strategy": "greedy",
        "instruction": "",
        "project": "",
        "accelerator_type": "GPU",
        "location": "",
        "encryption_spec_key_name": "",
    },
    "rlaif_pipeline": {
        "prompt_dataset": REQUIRED,
        "preference_prompt_dataset": REQUIRED,
        "large_model_reference": REQUIRED,
        "task_type": REQUIRED,
        "model_display_name": "",
        "prompt_sequence_length": 512,
        "target_sequence_length": 64,
        "large_model_a_reference": "text-bison@001",
        "large_model_b_reference": "t5-small",
        **SHARED,
        "sampling_strategy": "temperature_sampling",
        "instruction": "",
        "eval_dataset": "",
        "project": "",
        "accelerator_type": "GPU",
        "location": "",
        "tensorboard_resource_id": "",
    },
    "autosxs_pipeline": {
        "evaluation_dataset": REQUIRED,
        "task": REQUIRED,
        "id_columns": REQUIRED,
        "autorater_prompt_parameters": REQUIRED,
        "model_a": "",
        "model_b": "",
        "model_a_prompt_parameters": {},
        "model_b_prompt_parameters": {},
        "response_column_a": "",
        "response_column_b": "",
        "model_a_parameters": {},
        "model_b_parameters": {},
        "human_preference_column": "",
        "project": "",
        "location": "",
        "judgments_format": "jsonl",
        "bigquery_destination_prefix": "",
        "experimental_args": {},
        "encryption_spec_key_name": "",
    },
}
"""Of Google Cloud Pipeline Components 2.22, in order; '' for None and for placeholders."""

SETTINGS = """
set = ["model.dtype=fp32", "evaluate.best_of=0", "evaluate.bootstrap_samples=50"]
[models]
llama-2-7b = "tiny"
"""

COURSE = """
from kfp import compiler
from amenable.pipeline.vertex import PipelineJob, rlhf_pipeline

compiler.Compiler().compile(pipeline_func=rlhf_pipeline, package_path="rlhf_pipeline.yaml")
parameter_values = {
    "preference_dataset": "text_small/comparisons/train/*.jsonl",
    "prompt_dataset": "text_small/reddit/train/*.jsonl",
    "eval_dataset": "text_small/reddit/val/*.jsonl",
    "large_model_reference": "llama-2-7b",
    "reward_model_train_steps": 2,
    "reinforcement_learning_train_steps": 1,
    "reward_model_learning_rate_multiplier": 1.0,
    "reinforcement_learning_rate_multiplier": 1.0,
    "kl_coeff": 0.1,
    "instruction": "Summarize in less than 50 words",
}
job = PipelineJob(
    display_name="tutorial-rlhf-tuning",
    template_path="rlhf_pipeline.yaml",
    parameter_values=parameter_values,
)
job.run()
print("outputs", sorted(job.outputs.items()))
"""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_references(name: str) -> None:
    function = getattr(vertex, name).pipeline_func
    found = {key: value.default for key, value in inspect.signature(function).parameters.items()}
    assert list(found.items()) == list(PARAMETERS[name].items())


@pytest.mark.parametrize("name", PARAMETERS)
def test_pipelines_compile_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    texts = []
    for path in (tmp_path / "a.yaml", tmp_path / "b.yaml"):
        compiler.Compiler().compile(getattr(vertex, name), str(path))
        texts.append(path.read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kl_coef": 0.1}, "parameter_values: no parameter 'kl_coef'; did you mean kl_coeff?"),
        (
            {"prompt_dataset": "a", "large_model_reference": "tiny"},
            "parameter_values: preference_dataset is missing, and has no default",
        ),
        (
            {
                "prompt_dataset": "a",
                "preference_dataset": "b",
                "large_model_reference": "tiny",
                "kl_coeff": "much",
            },
            "parameter_values: Incompatible argument passed to the input 'kl_coeff'",
        ),
    ],
)
def test_wrong_parameter_values(
    values: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compiler.Compiler().compile(vertex.rlhf_pipeline, "rlhf.yaml")
    with pytest.raises(UsageError, match=re.escape(words)):
        vertex.PipelineJob(template_path="rlhf.yaml", parameter_values=values).run()
    with pytest.raises(UsageError, match=r"template_path: 'none\.yaml' is no file"):
        vertex.PipelineJob(template_path="none.yaml")


def test_failed_task_raises_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole number stands for 1.0, None for a default, and a bucket as root is told of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{os.environ['PYTHONPATH']}")
    compiler.Compiler().compile(vertex.rlhf_pipeline, "rlhf.yaml")
    values = {
        "prompt_dataset": "a",
        "preference_dataset": "b",
        "large_model_reference": "t5-large",
        "kl_coeff": 1,
        "eval_dataset": None,
    }
    job = vertex.PipelineJob("x", "rlhf.yaml", pipeline_root="gs://b", parameter_values=values)
    with pytest.raises(TaskFailed, match=r"T5 is an encoder-decoder.*\(task prepare\)") as e:
        job.run()
    assert e.value.exit_code == 2
    assert "not honoured: pipeline_root gs://b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "variable", "used"),
    [("own", "there", "own"), ("", "there", "there"), ("gs://b", "", "runs"), ("", "", "runs")],
)
def test_root_of_the_run_folders(
    given: str, variable: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument, else the variable, else runs/; the tasks are told by the variable."""
    told: list[tuple[Path, str]] = []

    def run_pipeline(pipeline: Any, values: Any, tasks: Path, say: Any, *, caching: bool) -> None:
        told.append((tasks.parent, os.environ["AMENABLE_RUNS"]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vertex, "run_pipeline", run_pipeline)
    monkeypatch.setenv("AMENABLE_RUNS", variable)
    compiler.Compiler().compile(vertex.infer_pipeline, "infer.yaml")
    values = {"large_model_reference": "tiny", "prompt_dataset": "a"}
    vertex.PipelineJob(
        template_path="infer.yaml", pipeline_root=given, parameter_values=values
    ).run()
    assert told == [(Path(used), used)]
    assert os.environ["AMENABLE_RUNS"] == variable


# The course -----------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The course's cells, run once on rows of its shape; folder and what was printed."""
    folder = tmp_path_factory.mktemp("course")
    lines = (ROOT / "examples" / "tiny.jsonl").read_text().splitlines()
    texts = [json.loads(line)["input_text"] for line in lines]
    posts = [{"input_text": f"{text}\n\n[summary]: "} for text in texts]
    pairs = [
        {**post, "candidate_0": f" {text[:9]}", "candidate_1": f" {text[:4]}", "choice": n % 2}
        for n, (post, text) in enumerate(zip(posts, texts, strict=True))
    ]
    write(folder / "text_small" / "comparisons" / "train" / "a.jsonl", pairs[:60])
    write(folder / "text_small" / "reddit" / "train" / "a.jsonl", posts[60:100])
    write(folder / "text_small" / "reddit" / "val" / "a.jsonl", posts[100:106])
    (folder / "vertex.toml").write_text(SETTINGS)
    (folder / "course.py").write_text(COURSE)
    return folder, run_course(folder)


def run_course(folder: Path) -> str:
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "course.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "AMENABLE_VERTEX": "vertex.toml"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_course_prints_the_model_and_the_table(course: tuple[Path, str]) -> None:
    _, said = course
    run = "runs/llama-2-7b-rlhf"
    lines = said.splitlines()
    assert f"tuned model: {run}/models/tuned" in lines
    assert f"side by side, 6 prompts: {run}/vertex/side_by_side.jsonl" in lines
    for column in ("prompt", "base_model", "tuned_model"):
        assert sum(line.startswith(f"  {column}") for line in lines) == 5
    assert any(line.startswith("not honoured: deploy_model") for line in lines)
    assert "('endpoint_resource_name', ''), ('model_resource_name', '')" in lines[-1]
    assert f"('tuned_model', '{run}/models/tuned')" in lines[-1]
    assert "KFP" not in said


def test_course_leaves_its_files(course: tuple[Path, str]) -> None:
    run = course[0] / "runs" / "llama-2-7b-rlhf"
    recipe = load_recipe(run / "recipe.toml")
    assert (recipe.model.base, recipe.policy.updates, recipe.reward.max_steps) == ("tiny", 1, 2)
    summary = read_json(run / "summary.json")
    assert (summary["policy"]["updates"], summary["policy"]["algorithm"]) == (1, "ppo")
    assert read_json(run / "models" / "tuned" / "config.json")["architectures"]
    table = list(read_jsonl(run / "vertex" / "side_by_side.jsonl"))
    assert [set(row) for row in table] == [{"prompt", "base_model", "tuned_model"}] * 6
    predictions = list(read_jsonl(run / "vertex" / "predictions.jsonl"))
    asked = [row["inputs"]["inputs_pretokenized"] for row in predictions]
    assert asked[0].startswith("Summarize in less than 50 words\n\n")
    assert all(text.endswith("\n\n[summary]: ") for text in asked)
    assert [set(row) for row in predictions] == [{"inputs", "prediction"}] * 6


def test_second_run_of_the_course_is_cached(course: tuple[Path, str]) -> None:
    folder, first = course
    said = run_course(folder)
    assert re.findall(r"^(\w+): cached$", said, flags=re.M) == [
        "data",
        "reward",
        "policy",
        "evaluate",
        "report",
    ]
    assert said.splitlines()[-1] == first.splitlines()[-1]
