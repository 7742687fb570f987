"""What holds of reading, splitting and choosing, whatever the rows."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from amenable.config.collect import CollectConfig
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.docstrings import docstring_pair
from amenable.data.formats.native import demonstration_to_row, preference_to_row, prompt_to_row
from amenable.data.reading.readers import read_demonstrations, read_preferences, read_prompts
from amenable.data.schemas import Demonstration, Message, Preference, Prompt, Speaker, prompt_key
from amenable.data.splits import (
    draw,
    draw_order,
    held_out,
    hold_out,
    linked_groups,
    rank,
    rank_bits,
    split_by_group,
)
from amenable.errors import DataError

from .data_strategies import (
    demonstrations,
    grouped,
    names,
    near_rows,
    preferences,
    prompts,
    texts,
)

Rows = list[tuple[str, int]]
SHARES = {"test": 0.3, "validation": 0.2}


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


READERS = st.sampled_from([read_demonstrations, read_preferences, read_prompts])


@settings(max_examples=500)
@given(READERS, st.binary(max_size=80), st.sampled_from(["r.jsonl", "r.jsonl.gz"]))
def test_any_bytes_end_in_rows_or_a_clear_error(read: Any, data: bytes, name: str) -> None:
    parsed, error = outcome(read, data, name)
    assert parsed or "r.jsonl" in str(error)


@settings(max_examples=500)
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


@given(grouped, grouped)
def test_a_new_row_never_moves_an_old_one(rows: Rows, new: Rows) -> None:
    before = split_by_group(rows, lambda row: row[0], SHARES)
    after = split_by_group([*rows, *new], lambda row: row[0], SHARES)
    for name, split in before.items():
        assert after[name][: len(split)] == split


@given(grouped, st.integers(0, 40), st.sampled_from([0.25, 1 / 3, 0.5]), st.randoms())
def test_hold_out_keeps_groups_whole_whatever_the_order(
    rows: Rows, count: int, most: float, random: Any
) -> None:
    rest, held = hold_out(rows, count, lambda row: row[0], most)
    assert sorted(rest + held) == sorted(rows)
    assert {row[0] for row in rest}.isdisjoint(row[0] for row in held)
    assert len(held) <= len(rows) / 2
    if len({row[0] for row in held}) > 1:
        assert len(held) <= most * len(rows)
    shuffled = random.sample(rows, len(rows))
    assert sorted(hold_out(shuffled, count, lambda row: row[0], most)[1]) == sorted(held)


@given(grouped, st.integers(0, 40), st.sampled_from([0.25, 1 / 3, 0.5]))
def test_columns_are_held_out_as_rows_are(rows: Rows, count: int, most: float) -> None:
    _, held = hold_out(rows, count, lambda row: row[0], most)
    codes = np.array([rank_bits(group) for group, _ in rows], dtype=np.uint64)
    assert [rows[place] for place in np.flatnonzero(held_out(codes, count, most))] == held


@given(st.lists(names, unique=True), st.integers(0, 20), st.randoms())
def test_numbers_are_drawn_as_rows_are(rows: list[str], count: int, random: Any) -> None:
    places = np.array(random.sample(range(len(rows)), len(rows)), dtype=np.int64)
    drawn = draw_order((rows[place] for place in places), places, count, "salt")
    assert [rows[place] for place in drawn] == draw(rows, count, str, "salt")


@given(st.sets(names, min_size=20, max_size=40), st.sets(names, max_size=10))
def test_growth_moves_no_row_from_training_to_held_out(old: set[str], new: set[str]) -> None:
    rest, _ = hold_out(sorted(old), 5, str, 0.5)
    _, held_after = hold_out(sorted(old | new), 5, str, 0.5)
    assert set(rest).isdisjoint(held_after)


@given(st.sets(names), st.integers(1, 20), st.integers(1, 20))
def test_a_larger_draw_begins_with_the_smaller(rows: set[str], one: int, more: int) -> None:
    assert draw(rows, one + more, str, 0)[:one] == draw(rows, one, str, 0)


@given(st.lists(st.tuples(names, names)))
def test_groups_that_share_a_prompt_are_on_one_side(pairs: list[tuple[str, str]]) -> None:
    joint = linked_groups(pairs)
    sides: dict[str, set[str]] = {}
    for group, key in pairs:
        sides.setdefault(key, set()).add(joint[group])
    assert all(len(groups) == 1 for groups in sides.values())
    assert set(joint) == {group for group, _ in pairs}
    assert all(joint[name] == name for name in joint.values())


@given(names, names)
def test_ranks_lie_in_the_unit_interval(name: str, salt: str) -> None:
    assert 0 <= rank(name, salt) < 1


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
