from __future__ import annotations

import json
from pathlib import Path

import pytest

from amenable.models.tiny import build_tiny
from amenable.plan.forecast import renderer
from amenable.plan.rows import rows_of

from .conftest import recipe


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """20 demonstrations of 40 and 8 characters, 10 pairs of 40 and 12 and 16."""
    shown = [{"input_text": f"{n:040}", "output_text": "x" * 8} for n in range(20)]
    pairs = [
        {
            "input_text": f"{n:040}",
            "candidate_0": "y" * 12,
            "candidate_1": "z" * 16,
            "choice": 0,
        }
        for n in range(10)
    ]
    demonstrations = write(tmp_path / "d.jsonl", shown)
    preferences = write(tmp_path / "p.jsonl", pairs)
    return (f"data.demonstrations={demonstrations}", f"data.preferences={preferences}")


def test_files_are_counted_and_split_by_the_shares(files: tuple[str, ...]) -> None:
    """20 rows: a tenth tests, a fifth validates; four characters a token, 20 of template."""
    found = rows_of(recipe(*files, "data.test_share=0.1", "data.validation_share=0.2"), None)
    assert found.lengths["demonstrations"] == [(10 + 20, 2 + 1)] * 20
    assert found.lengths["preferences"] == [(30, 3 + 1, 4 + 1)] * 10
    assert found["demonstrations.train"] == 14
    assert found["demonstrations.validation"] == 4
    assert found["prompts.test"] == 2
    assert found["prompts.train"] == 18
    assert found["preferences.train"] == 7
    assert "four characters a token" in found.origin


def test_limits_of_the_recipe_hold(files: tuple[str, ...]) -> None:
    limits = ("data.max_demonstrations=5", "data.max_prompts=6", "data.validation_rows=1")
    found = rows_of(recipe(*files, *limits, "data.max_completion_tokens=2"), None)
    assert found["demonstrations.train"] == 5
    assert found["prompts.train"] == 6
    assert found["demonstrations.validation"] == 1
    assert {row[1] for row in found.lengths["demonstrations"]} == {2}


def test_tokens_are_the_renderers_own(files: tuple[str, ...], tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base")
    config = recipe(*files, f"model.base={base}")
    found = rows_of(config, renderer(config))
    exact = renderer(config)
    (row,) = set(found.lengths["demonstrations"])
    assert row[1] == len(exact.completion_ids("x" * 8))
    assert "tokenized" in found.origin


def test_splits_of_a_run_folder_come_first(files: tuple[str, ...], tmp_path: Path) -> None:
    data = tmp_path / "run" / "data"
    prompt = {"id": "a", "group": "a", "input_text": "w" * 80}
    write(data / "prompts.train.jsonl", [prompt] * 3)
    write(data / "prompts.test.jsonl", [prompt] * 2)
    found = rows_of(recipe(*files), None, data)
    assert found.lengths["prompts"] == [(40,)] * 3
    assert (found["prompts.train"], found["prompts.test"]) == (3, 2)
    assert str(data) in found.origin


def test_pairs_to_be_collected_are_counted() -> None:
    config = recipe(
        "data.preferences=[]",
        "data.task=docstrings",
        "data.demonstrations=[]",
        "collect.annotator=simulated",
        "collect.pairs=100",
        "data.validation_rows=20",
        "data.max_words=36",
    )
    found = rows_of(config, None)
    assert found["prompts.collect"] == 120
    assert found["preferences.train"] == 100
    assert found["preferences.validation"] == 20
    assert len(found.lengths["preferences"][0]) == 3


def test_where_a_file_is_missing_the_longest_rows_are_assumed() -> None:
    found = rows_of(recipe("data.max_prompt_tokens=77", "data.max_completion_tokens=9"), None)
    assert found.lengths["prompts"] == [(77,)]
    assert found.lengths["preferences"] == [(77, 9, 9)]
    assert "longest lengths: d.jsonl: there is no such" in found.origin
