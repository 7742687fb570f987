"""What holds of reading and choosing, whatever the rows."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from amenable.config.collect import CollectConfig
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.docstrings import docstring_pair
from amenable.data.formats.native import demonstration_to_row, preference_to_row, prompt_to_row
from amenable.data.reading.readers import read_demonstrations, read_preferences, read_prompts
from amenable.data.schemas import Demonstration, Message, Preference, Prompt, Speaker, prompt_key
from amenable.errors import DataError

from .data_strategies import (
    demonstrations,
    names,
    near_rows,
    preferences,
    prompts,
    texts,
)


def read_back(read: Callable[[list[Path]], list[Any]], data: bytes, name: str = "r.jsonl") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return read([path])


def outcome(read: Any, data: bytes, name: str) -> tuple[list[Any], DataError | None]:
    try:
        return read_back(read, data, name), None
    except DataError as error:
        return [], error


def line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@given(prompts())
def test_prompt_to_row_and_back(prompt: Prompt) -> None:
    assert read_back(read_prompts, line(prompt_to_row(prompt))) == [prompt]


@given(demonstrations)
def test_demonstration_to_row_and_back(row: Demonstration) -> None:
    assert read_back(read_demonstrations, line(demonstration_to_row(row))) == [row]


@given(preferences)
def test_preference_to_row_and_back(row: Preference) -> None:
    assert read_back(read_preferences, line(preference_to_row(row))) == [row]
    assert row.swap().swap() == row
    assert read_back(read_preferences, line(preference_to_row(row.swap()))) == [row.swap()]


MORE = int(os.environ.get("AMENABLE_READING_EXAMPLES", "500"))
"""More for a long run: with 20,000 each about ten minutes."""

READERS = st.sampled_from([read_demonstrations, read_preferences, read_prompts])


@settings(max_examples=MORE)
@given(READERS, st.binary(max_size=80), st.sampled_from(["r.jsonl", "r.jsonl.gz"]))
def test_any_bytes_end_in_rows_or_a_clear_error(read: Any, data: bytes, name: str) -> None:
    parsed, error = outcome(read, data, name)
    assert parsed or "r.jsonl" in str(error)


@settings(max_examples=MORE)
@given(READERS, near_rows, st.booleans())
def test_any_object_ends_in_rows_or_an_error_that_names_its_field(
    read: Any, row: dict[str, Any], zipped: bool
) -> None:
    data = gzip.compress(line(row)) if zipped else line(row)
    parsed, error = outcome(read, data, "r.jsonl.gz" if zipped else "r.jsonl")
    if error is None:
        assert len(parsed) == 1
    else:
        assert error.line == 1
        assert error.field or "in no known format" in error.reason or "looks like" in error.reason


@given(texts)
def test_the_default_group_ignores_case_and_space(text: str) -> None:
    def key(content: str) -> str:
        return prompt_key(Prompt(messages=(Message(Speaker.USER, content),), id="", group=""))

    assert key(text) == key(f"  {text}\n")
    assert key(text) == key(text.casefold()) or text.casefold().casefold() != text.casefold()


@given(texts, texts, texts, texts, names, st.integers(0, 5))
def test_swapping_the_sides_swaps_the_choice(
    asked: str, reference: str, first: str, second: str, key: str, seed: int
) -> None:
    annotator = SimulatedAnnotator(CollectConfig(annotator="simulated", noise=0.4), seed)
    message = (Message(Speaker.USER, asked),)
    prompt = Prompt(messages=message, id="p", group="g", meta={"output_text": reference})
    choice = annotator.choose(prompt, first, second, key)
    assert annotator.choose(prompt, second, first, key) is choice.swapped()


@settings(max_examples=300)
@given(st.text(max_size=200) | texts.map(lambda text: f"Return the larger of two.\n\n{text}"))
def test_any_docstring_makes_a_pair_or_none(docstring: str) -> None:
    pair = docstring_pair(docstring, 60)
    if pair is not None:
        assert all(text.isascii() for text in pair)
