"""The recipes of examples/rewards, through every stage: what drove PPO is worked out again."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "rewards"
UPDATES, EPISODES = 6, 8


def run(recipe: str, out: Path, *words: str) -> Path:
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "amenable", "run", recipe, "--out", str(out), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model that is no relative of the tiny model."""
    out = tmp_path_factory.mktemp("judge")
    runpy.run_path(str(EXAMPLES / "make_reward_model.py"))["main"](out)
    return out


@pytest.fixture(scope="module")
def foreign(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the first recipe."""
    out = tmp_path_factory.mktemp("runs") / "foreign"
    return run(
        "examples/rewards/foreign-model.toml", out, "--set", f"policy.rewards[0].source={judge}"
    )


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the second recipe."""
    return run("examples/rewards/function.toml", tmp_path_factory.mktemp("runs") / "function")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "stages" / "policy" / "metrics.jsonl"))


def samples(folder: Path) -> list[dict[str, Any]]:
    """All of them: an update has fewer episodes than it logs."""
    rows = list(read_jsonl(folder / "stages" / "policy" / "samples.jsonl"))
    assert len(rows) == UPDATES * EPISODES
    return rows


@pytest.mark.parametrize("recipe", ["foreign", "function"])
def test_policy_is_tuned_without_a_reward_stage(
    recipe: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(recipe)
    summary = read_json(folder / "summary.json")
    status = {name: row["status"] for name, row in summary["stages"].items()}
    assert [status[name] for name in ("policy", "evaluate", "report")] == ["done"] * 3
    assert status["reward"] != "done"
    assert summary["policy"]["updates"] == UPDATES
    assert (folder / "models" / "tuned" / "model.safetensors").exists()
    assert not (folder / "models" / "reward").exists()


def test_reward_model_reads_texts_in_its_own_tokens(foreign: Path, judge: Path) -> None:
    """Its mean score is that of transformers alone, on the texts that the policy wrote."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judge)
    policys = AutoTokenizer.from_pretrained(foreign / "models" / "tuned")
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    assert model.config.model_type == "bert"
    rows = samples(foreign)
    assert tokenizer(rows[0]["prompt"])["input_ids"] != policys(rows[0]["prompt"])["input_ids"]
    for update, row in enumerate(metrics(foreign)):
        texts = [(r["prompt"], r["completion"]) for r in rows if r["step"] == update]
        with torch.no_grad():
            scores = [
                float(model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]) for pair in texts
            ]
        assert row["policy/reward_judge"] == pytest.approx(sum(scores) / EPISODES, abs=1e-3)


def test_scores_are_the_normalised_and_weighted_sum(foreign: Path) -> None:
    """In the first update, over its own eight scores: the reward model's have mean 0, square 1."""
    first = [row for row in samples(foreign) if row["step"] == 0]
    rule = [0.2 * length_rule(row["completion"]) for row in first]
    judged = [row["score"] - part for row, part in zip(first, rule, strict=True)]
    assert sum(judged) == pytest.approx(0.0, abs=1e-4)
    assert sum(score**2 for score in judged) / EPISODES == pytest.approx(1.0, abs=1e-4)


def length_rule(text: str) -> float:
    """Of the recipe: 2 to 12 words."""
    words = len(text.split())
    return words / 2 if words < 2 else 1.0 if words <= 12 else max(0.0, 2 - words / 12)


def test_function_is_given_the_extra_column(function: Path) -> None:
    """Every score is worked out again from the `keyword` of the prompt's row."""
    keywords = {row["input_text"]: row["keyword"] for row in read_jsonl(EXAMPLES / "prompts.jsonl")}
    scored = [row for row in samples(function) if row["score"] is not None]
    assert len(scored) > UPDATES * EPISODES // 2
    for row in scored:
        text, keyword = row["completion"], keywords[row["prompt"]]
        letters = [letter for letter in text.lower() if not letter.isspace()]
        share = len([letter for letter in letters if letter in keyword]) / len(letters)
        assert row["score"] == pytest.approx(share + 0.5 * 0.1 * len(set(text.split())), abs=1e-5)
    assert {row["policy/reward_failures"] for row in metrics(function)} <= {n / 8 for n in range(9)}
    assert all(
        {"policy/reward_letters", "policy/reward_words"} <= set(m) for m in metrics(function)
    )


@pytest.mark.parametrize("recipe", ["foreign", "function"])
def test_answers_are_compared_by_the_same_rewards(
    recipe: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(recipe)
    (comparison,) = read_json(folder / "summary.json")["evaluate"]
    assert (comparison["a"], comparison["b"]) == ("base", "tuned")
    assert comparison["judge"] == "reward_model"
    rows = list(read_jsonl(folder / "stages" / "evaluate" / "completions.jsonl"))
    assert all(set(row["scores"]["reward_model"]) == {"base", "tuned"} for row in rows)


def test_code_and_weights_of_rewards_are_inputs_of_the_run(
    foreign: Path, function: Path, judge: Path
) -> None:
    """So that a change of either is seen by the next run."""
    inputs = read_json(foreign / "manifest.json")["inputs"]
    assert "policy.rewards[0].source/model.safetensors" in inputs
    state = read_json(function / "stages" / "policy" / "state.json")["ingredients"]
    assert len(state["policy.rewards[0].source"]) == 64, "a hash of the function's file"
