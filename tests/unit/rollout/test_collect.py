from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import StageContext, read_jsonl
from amenable.config.collect import CollectConfig
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.reading.readers import read_preferences
from amenable.data.schemas import Choice, Message, Prompt, Speaker
from amenable.errors import StageError
from amenable.rollout import collect
from amenable.rollout.annotators import Simulation

MakeContext = Callable[..., StageContext]
SPLITS = ("train", "validation", "test")


def prompt(number: int) -> Prompt:
    return Prompt(
        messages=(Message(Speaker.USER, "Which fruit is red?"),),
        id=f"p{number}",
        group="g",
        meta={"output_text": "an apple"},
    )


def test_choices_follow_the_annotator_and_equal_or_empty_pairs_are_left_out(
    tmp_path: Path,
) -> None:
    """Without noise the answer nearer to "an apple" wins; words that share nothing tie."""
    annotator = Simulation(
        SimulatedAnnotator(CollectConfig(noise=0.0, grounding_weight=0.0), seed=0)
    )
    pairs = [
        (prompt(0), "an apple", "a stone"),
        (prompt(1), "a stone", "apple"),
        (prompt(2), "same", "same"),
        (prompt(3), "", "apple"),
        (prompt(4), "stone", "brick"),
    ]
    path = tmp_path / "pairs.jsonl"
    assert collect.write_choices(path, annotator, pairs) == 3
    rows = read_preferences([path])
    assert [(row.prompt.id, row.choice) for row in rows] == [
        ("p0", Choice.FIRST),
        ("p1", Choice.SECOND),
        ("p4", Choice.TIE),
    ]
    assert rows[0].annotator == "simulated"
    assert rows[0].prompt.meta["output_text"] == "an apple"


def test_prompts_may_come_from_a_file_of_preferences(tmp_path: Path) -> None:
    judged = {"candidate_0": "old", "choice": 1, "strength": 9, "output_text": "an apple"}
    asked = replace(prompt(0), meta=judged)
    annotator = Simulation(SimulatedAnnotator(CollectConfig(noise=0.0), seed=0))
    path = tmp_path / "pairs.jsonl"
    collect.write_choices(path, annotator, [(asked, "an apple", "a stone")])
    (row,) = read_preferences([path])
    assert (row.candidate_0, row.choice, row.strength) == ("an apple", Choice.FIRST, None)
    assert row.prompt.meta == {"output_text": "an apple"}


def context(
    make_context: MakeContext, ten_rows: list[dict[str, str]], root: Path, **changes: Any
) -> StageContext:
    from amenable.artifacts import write_jsonl

    ctx = make_context("collect", root=root, collect__annotator="simulated", **changes)
    for name, part in (("collect", ten_rows[:8]), ("test", ten_rows[8:])):
        rows = [{"id": f"{name}{i}", "group": str(i), **row} for i, row in enumerate(part)]
        write_jsonl(ctx.folder.data / f"prompts.{name}.jsonl", rows)
    return ctx


def test_every_prompt_becomes_a_pair_of_its_split(
    make_context: MakeContext, ten_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    ctx = context(make_context, ten_rows, tmp_path / "a")
    section = collect.run(ctx)
    rows = {s: list(read_jsonl(ctx.folder.data / f"preferences.{s}.jsonl")) for s in SPLITS}
    assert section["pairs"] == {split: len(part) for split, part in rows.items()}
    assert section["simulated"] is True
    ids = {split: [row["id"] for row in part] for split, part in rows.items()}
    assert ids["validation"] == ["collect0", "collect1"]
    assert set(ids["train"]) <= {f"collect{i}" for i in range(2, 8)}
    assert set(ids["test"]) <= {"test0", "test1"}
    assert all(row["candidate_0"] != row["candidate_1"] for part in rows.values() for row in part)

    again = context(make_context, ten_rows, tmp_path / "b")
    collect.run(again)
    other = context(make_context, ten_rows, tmp_path / "c", seed=1)
    collect.run(other)
    name = "preferences.train.jsonl"
    first = (ctx.folder.data / name).read_bytes()
    assert (again.folder.data / name).read_bytes() == first
    assert (other.folder.data / name).read_bytes() != first


def test_every_beginning_holds_a_share_of_each_split() -> None:
    """Two, four and two prompts: after half of them, half of each split."""
    splits = [[prompt(i) for i in range(n, n + size)] for n, size in ((0, 2), (10, 4), (20, 2))]
    order = [int(found.id.removeprefix("p")) for found in collect._interleaved(splits)]
    assert sorted(order) == [0, 1, 10, 11, 12, 13, 20, 21]
    assert sorted(order[:4]) == [0, 10, 11, 20]


def test_time_that_is_up_leaves_prompts_out(
    make_context: MakeContext,
    ten_rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a budget the clock is looked at after every two prompts; the second look ends it."""
    ctx = context(make_context, ten_rows, tmp_path / "a", stop_after=2)
    monkeypatch.setattr(collect, "_PROMPTS_BETWEEN_LOOKS", 2)
    monkeypatch.setattr(ctx.deadline, "remaining_s", lambda: 1.0)
    prompts = [prompt(i) for i in range(7)]
    assert list(collect.sample_pairs(ctx, prompts)) == ["p0", "p1", "p2", "p3"]


def test_samples_that_never_differ_stop_the_run(
    make_context: MakeContext, ten_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    ctx = context(make_context, ten_rows, tmp_path / "a", collect__temperature=0.0)
    with pytest.raises(StageError, match=r"nothing to choose from; raise collect\.temperature"):
        collect.run(ctx)
