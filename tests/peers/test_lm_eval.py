"""`amenable benchmark` by the real lm-evaluation-harness, on task files with local data.

The harness's own way to evaluate the same model folders is the oracle of every value.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="in an environment of its own: make test-peers")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from amenable.cli import main as cli
from amenable.config.load import load_recipe, to_toml
from amenable.evaluate import harness
from amenable.models.load import resolve_dtype
from amenable.models.tiny import build_tiny

pytestmark = pytest.mark.peers

SOURCE = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TASKS = {
    "choice": f"task: choice\n{SOURCE}{CHOICE}  - metric: brier_score\n",
    "written": f"""task: written
{SOURCE}output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["\\n"]}}
metric_list:
  - metric: exact_match
""",
    "text": f"""task: text
{SOURCE}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "unsafe": f"task: unsafe\nunsafe_code: true\n{SOURCE}{CHOICE}",
    "lost": f"task: lost\n{SOURCE}{CHOICE}".replace("rows.jsonl", "nowhere.jsonl"),
    "hub": f"task: hub\ndataset_path: allenai/ai2_arc\ntest_split: test\n{CHOICE}",
    "broken": "task: [",
}
INDENTED = "".join(f"    {line}\n" for line in (SOURCE + CHOICE).splitlines())
GROUP = f"""\
group: both
task:
  - task: small
{INDENTED.replace("rows.jsonl", "few.jsonl")}  - task: large
{INDENTED}aggregate_metric_list:
  - metric: acc
    weight_by_size: WEIGHT
"""
NOUNS = ("sum", "list", "name", "river", "water", "file", "line", "mean")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data, in one folder."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"What is the {NOUNS[n % 8]} of {NOUNS[n * 5 % 8]} {n}?",
            "choices": [f"{NOUNS[(n + k * 5) % 8]} {NOUNS[n * k % 8]}" for k in range(3)],
            "answer": n % 3,
        }
        for n in range(40)
    ]
    for name, kept in (("rows", rows), ("few", rows[:10])):
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (folder / f"{name}.jsonl").write_text(text)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text)
    for name, weight in (("pooled", "true"), ("even", "false")):
        (folder / f"{name}.yaml").write_text(GROUP.replace("WEIGHT", weight))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tiny model, and the same with other weights."""
    root = tmp_path_factory.mktemp("models")
    before, after = build_tiny(root / "before"), root / "after"
    model = AutoModelForCausalLM.from_pretrained(before)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3 * weight.std())
    model.save_pretrained(after)
    AutoTokenizer.from_pretrained(before).save_pretrained(after)
    return {"before": str(before), "after": str(after)}


def benchmark(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["amenable", "benchmark", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def measured(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, str], out: Path, *words: str
) -> dict[tuple[str, str], dict[str, Any]]:
    """Comparisons by task and metric."""
    assert benchmark(monkeypatch, *models.values(), *words, "--out", str(out)) == 0
    found = json.loads((out / "benchmark.json").read_text())
    return {(row["task"], row["metric"]): row for row in found["comparisons"]}


def by_the_harness(folder: str, task: Path, **options: Any) -> dict[str, Any]:
    """The harness opens folder and data by itself, in the precision that this machine decides."""
    dtype = str(resolve_dtype("auto")).removeprefix("torch.")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(task.parent)
    alone = Path(tempfile.mkdtemp()) / task.name  # by its path it opens no group
    alone.write_text(task.read_text())
    manager = TaskManager(include_defaults=False, include_path=alone.parent)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "dtype": dtype, "softmax_dtype": "float32"},
        device="cpu",
        tasks=manager.all_groups or manager.all_tasks,
        batch_size=8,
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )
    monkeypatch.undo()
    return results["results"]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("choice", {}),
        ("choice", {"apply_chat_template": True}),
        ("choice", {"limit": 12}),
        ("choice", {"num_fewshot": 2}),
        ("written", {}),
        ("text", {}),
        ("pooled", {}),
        ("even", {}),
    ],
)
def test_values_are_the_harness_own(
    tasks: Path,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    options: dict[str, Any],
) -> None:
    words = ["--chat-template"] if "apply_chat_template" in options else []
    words += ["--limit", str(options["limit"])] if "limit" in options else []
    words += ["--few-shot", str(options["num_fewshot"])] if "num_fewshot" in options else []
    file = tasks / f"{task}.yaml"
    found = measured(monkeypatch, models, tmp_path, "--tasks", str(file), *words)
    for side in ("before", "after"):
        expected = {
            (name, key.split(",")[0]): value
            for name, row in by_the_harness(models[side], file, **options).items()
            for key, value in row.items()
            if "," in key and "_stderr" not in key
        }
        values = {key: row[f"{side}_value"] for key, row in found.items()}
        assert values == pytest.approx(expected, rel=1e-5)


def test_chat_template_changes_what_is_asked(
    tasks: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tasks", str(tasks / "choice.yaml"))
    plain = measured(monkeypatch, models, tmp_path / "plain", *words)
    chat = measured(monkeypatch, models, tmp_path / "chat", *words, "--chat-template")
    key = ("choice", "brier_score")
    assert plain[key]["before_value"] != pytest.approx(chat[key]["before_value"], rel=1e-4)


def test_a_model_and_itself_differ_nowhere(
    tasks: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = {"a": f"a={models['before']}", "b": f"b={models['before']}"}
    names = ",".join(str(tasks / f"{name}.yaml") for name in ("choice", "text"))
    found = measured(monkeypatch, twice, tmp_path, "--tasks", names)
    assert len(found) == 5
    for row in found.values():
        assert (row["difference"], row["p_value"], row["verdict"]) == (0, 1, "nothing shown")


def test_groups_and_their_tasks(
    tasks: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 documents together; where every task counts alike, those of the small one count more."""
    for name in ("pooled", "even"):
        found = measured(
            monkeypatch, models, tmp_path / name, "--tasks", str(tasks / f"{name}.yaml")
        )
        parts = [found[f"both::{part}", "acc"] for part in ("small", "large")]
        group = found["both", "acc"]
        assert [row["documents"] for row in (*parts, group)] == [10, 40, 50]
        weights = (0.2, 0.8) if name == "pooled" else (0.5, 0.5)
        assert group["difference"] == pytest.approx(
            sum(w * row["difference"] for w, row in zip(weights, parts, strict=True))
        )


def test_a_run_is_measured_with_each_document(
    tasks: Path,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(models["after"], run / "models" / "tuned")
    overrides = [f"model.base={models['before']}", "model.dtype=fp32", "data.prompts=x.jsonl"]
    recipe = load_recipe(None, [*overrides, "policy.reward=m:f"])
    (run / "recipe.toml").write_text(to_toml(recipe))
    words = ("--tasks", str(tasks / "choice.yaml"), "--out", str(tmp_path / "out"))
    assert benchmark(monkeypatch, str(run), *words) == 0
    told = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [system["name"] for system in found["systems"]] == ["base", "tuned"]
    assert found["precision"] == "float32"
    (task,) = found["tasks"]
    assert (task["documents"], task["of"], task["few_shot"]) == (40, 40, 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").open()]
    acc = [row["values"] for row in rows if row["metric"] == "acc"]
    row = next(row for row in found["comparisons"] if row["metric"] == "acc")
    assert sum(v["base"] for v in acc) / 40 == pytest.approx(row["before_value"])
    assert sum(v["tuned"] > v["base"] for v in acc) == row["improved"]
    assert sum(v["tuned"] < v["base"] for v in acc) == row["worsened"]
    assert row["meaning"].endswith("; 40 documents say little")
    assert "fatal" not in told.err
    assert f"tuned {row['after_value']:.3f}: {row['difference']:+.3f} [" in told.out
    assert told.err.count("benchmark: base") >= 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("arc_esy",), "no task 'arc_esy'; did you mean 'arc_easy'?"),
        (("{tasks}/none.yaml",), "none.yaml: no such task file"),
        (("{tasks}/broken.yaml",), "broken.yaml: no task that the harness can open"),
        (("{tasks}/lost.yaml",), "paths are taken from the task file's folder"),
        (("{tasks}/unsafe.yaml",), "unsafe runs code that the model writes"),
        (("{tasks}/hub.yaml",), "the Hugging Face hub does not give its data"),
        (("arc_easy",), "arc_easy: the Hugging Face hub does not give its data"),
        (("{tasks}/choice.yaml,{tasks}/choice.yaml",), "'choice' is named twice"),
    ],
)
def test_a_task_that_cannot_be_asked_is_told_before_a_weight_is_read(
    tasks: Path,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("amenable.models.load.load_causal_lm", read)
    filled = [word.format(tasks=tasks) for word in words]
    out = tmp_path / "out"
    assert benchmark(monkeypatch, *models.values(), "--tasks", *filled, "--out", str(out)) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1
    assert not out.exists()


def test_a_model_without_a_chat_template_is_told_before_a_weight_is_read(
    tasks: Path,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(models["before"]).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(models["before"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    words = ("--tasks", str(tasks / "choice.yaml"), "--chat-template")
    assert benchmark(monkeypatch, models["after"], str(bare), *words) == 2
    assert "bare" in (shown := capsys.readouterr().err)
    assert "has no chat template; leave it out" in shown


def test_a_task_that_fails_names_the_system(
    tasks: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tasks / "fails.yaml"
    broken.write_text(f"task: fails\n{SOURCE}{CHOICE}process_results: !function fails.score\n")
    (tasks / "fails.py").write_text("def score(doc, results):\n    raise ValueError('odd')\n")
    words = ("--tasks", str(broken), "--out", str(tmp_path))
    assert benchmark(monkeypatch, *models.values(), *words) == 1


def test_recorded_results_have_the_shape_of_today(
    tasks: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """tests/unit reads a recording; what it has of keys, the harness still gives."""
    path = Path(__file__).parents[1] / "unit" / "evaluate" / "lm_eval_results.json"
    recorded = json.loads(path.read_text())["before"]
    opened = harness.open_tasks([str(tasks / "pooled.yaml")])
    model = HFLM(pretrained=models["before"], device="cpu", dtype="float32")
    results = lm_eval.evaluate(
        model, {"tasks": opened.leaves, "groups": opened.nodes}, limit=3, bootstrap_iters=0
    )
    for key in ("samples", "higher_is_better", "versions", "configs", "n-shot", "n-samples"):
        assert recorded[key].keys() <= results[key].keys(), key
    (sample, *_) = results["samples"]["both::small"]
    assert recorded["samples"]["both::small"][0].keys() <= sample.keys()
