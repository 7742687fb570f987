from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import write_jsonl
from amenable.config.data import DataConfig
from amenable.data.quality import quality, refuse, warnings
from amenable.data.render import Renderer
from amenable.errors import DataError
from amenable.models.tiny import tiny_tokenizer

EOS = 2


def look_at(root: Path, splits: dict[str, list[dict[str, Any]]], **limits: int) -> dict[str, Any]:
    for name, rows in splits.items():
        write_jsonl(root / f"{name}.jsonl", rows)
    tokenizer = tiny_tokenizer()
    return quality(
        root, list(splits), DataConfig(), lambda: Renderer(tokenizer, frozenset({EOS}), **limits)
    )


def prompts(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": str(n), "group": str(n), "input_text": f"Ask {n}?"} for n in numbers]


def answered(text: str) -> list[dict[str, Any]]:
    return [{**row, "output_text": text} for row in prompts(1, 2)]


def test_a_prompt_of_two_splits_is_counted_once(tmp_path: Path) -> None:
    found = look_at(
        tmp_path,
        {
            "prompts.train": prompts(1, 2, 3),
            "prompts.collect": prompts(3, 4),
            "prompts.test": prompts(5),
        },
    )
    kind = found["tokens"]["kinds"]["prompts"]
    assert (kind["rows"], kind["of"], kind["prompt"]["count"]) == (5, 5, 5)


def test_rows_that_cannot_be_trained_on_are_told_before_they_are_refused(tmp_path: Path) -> None:
    found = look_at(
        tmp_path, {"demonstrations.train": answered("Word " * 40)}, max_completion_tokens=10
    )
    assert found["tokens"]["findings"][0]["level"] == "error"
    assert [line for line in warnings(found) if "never" in line] == []
    with pytest.raises(DataError) as caught:
        refuse(found)
    for part in (
        "no completion of the 2 demonstrations ends with an end-of-sequence token",
        "never learns to stop",
        "Raise data.max_completion_tokens",
        "(data.token_checks = false leaves this check out)",
    ):
        assert part in str(caught.value)


def test_what_may_go_well_is_not_refused(tmp_path: Path) -> None:
    rows = [*answered("Word " * 40), {**prompts(3)[0], "output_text": "Yes."}]
    found = look_at(tmp_path, {"demonstrations.train": rows}, max_completion_tokens=10)
    refuse(found)
    assert any("have a completion above 10 tokens" in line for line in warnings(found))
    refuse({})  # neither content nor tokens were looked at
