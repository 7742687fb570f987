from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amenable.data.render import Renderer
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.lab.problems import (
    PROBLEMS,
    Problem,
    present,
    present_scores,
    write_model,
)
from amenable.models.load import eos_ids, load_tokenizer

each = pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])


@each
def test_at_most_500_completions_and_all_of_them(problem: Problem) -> None:
    letters = len(problem.letters)
    wanted = sum(letters**length for length in range(problem.max_tokens + 1))
    assert len(problem.texts) == len(set(problem.texts)) == wanted <= 500


@each
def test_text_and_ids_are_one_to_one_through_the_renderer(problem: Problem, tmp_path: Path) -> None:
    folder = write_model(problem, tmp_path)
    tokenizer = load_tokenizer(folder)
    renderer = Renderer(
        tokenizer, eos_ids(folder, tokenizer), max_completion_tokens=problem.max_tokens
    )
    for text in problem.texts:
        assert tuple(renderer.completion_ids(text)) == problem.completion_ids(text)
        assert renderer.completion_text(problem.completion_ids(text)) == text
    for prompt in problem.prompts:
        typed = Prompt(messages=(Message(Speaker.USER, prompt),), id="0", group="0")
        assert tuple(renderer.prompt_ids(typed)) == problem.prompt_ids(prompt)


def test_the_same_problem_has_the_same_model(tmp_path: Path) -> None:
    first, second = (
        write_model(PROBLEMS[2], tmp_path / name) / "model.safetensors" for name in "ab"
    )
    assert first.read_bytes() == second.read_bytes()
    other = write_model(replace(PROBLEMS[2], seed=99), tmp_path / "c") / "model.safetensors"
    assert other.read_bytes() != first.read_bytes()


def test_present_scores_answers_for_prompt_and_text() -> None:
    problem = PROBLEMS[1]
    rewards = np.arange(len(problem.prompts) * len(problem.texts), dtype=np.float64)
    present(problem, rewards.reshape(len(problem.prompts), -1))
    asked = [("b", problem.texts[3]), ("a", "")]
    scores = present_scores([p for p, _ in asked], [t for _, t in asked], [{}, {}])
    assert scores == [len(problem.texts) + 3.0, 0.0]
