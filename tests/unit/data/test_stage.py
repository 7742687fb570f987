from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amenable.artifacts import RunFolder, StageContext
from amenable.config.collect import CollectConfig
from amenable.config.data import (
    DataConfig,
    DemonstrationSource,
    PreferenceSource,
    PromptSource,
)
from amenable.config.policy import PolicyConfig, SelectionConfig
from amenable.config.recipe import Recipe
from amenable.data import stage
from amenable.data.reading.readers import read_demonstrations, read_preferences, read_prompts
from amenable.data.row_file import write_lines
from amenable.data.schemas import Demonstration, Message, Prompt, Speaker
from amenable.errors import DataError

SOURCES: dict[str, Any] = {
    "demonstrations": DemonstrationSource,
    "preferences": PreferenceSource,
    "prompts": PromptSource,
    "evaluation_prompts": PromptSource,
}
NOBODY = CollectConfig()
SIMULATED = CollectConfig(annotator="simulated", pairs=10)
REAL_DATA = Path(
    os.environ.get("AMENABLE_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")
)


@dataclass
class Run:
    """What one run of the stage left behind."""

    root: Path
    section: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def rows(self, split: str) -> list[dict[str, Any]]:
        path = self.root / "data" / f"{split}.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def texts(self, split: str) -> set[str]:
        return {row["input_text"] for row in self.rows(split)}

    @property
    def report(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((self.root / "data/report.json").read_text()))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    def run_stage(
        seed: int = 0,
        collect: CollectConfig = NOBODY,
        policy: PolicyConfig | None = None,
        **data: Any,
    ) -> Run:
        named = {kind: SOURCES[kind](files=data.pop(kind)) for kind in SOURCES if kind in data}
        own = PolicyConfig() if policy is None else policy
        recipe = Recipe(seed=seed, data=DataConfig(**named, **data), collect=collect, policy=own)
        done = Run(tmp_path / "run")
        context = SimpleNamespace(
            recipe=recipe,
            folder=RunFolder(done.root),
            progress=SimpleNamespace(say=done.said.append),
            open_renderer=None,
        )
        done.section = stage.run(cast("StageContext", context))
        return done

    return run_stage


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[str]]:
    def write_rows(name: str, rows: Sequence[dict[str, Any]]) -> tuple[str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return (str(path),)

    return write_rows


def demonstrations(count: int) -> list[dict[str, Any]]:
    return [{"input_text": f"question {n}", "output_text": f"answer {n}"} for n in range(count)]


def preferences(prompts: int, each: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "input_text": f"question {n}",
            "candidate_0": f"good {n} {k}",
            "candidate_1": f"bad {n} {k}",
            "choice": 0,
        }
        for n in range(prompts)
        for k in range(each)
    ]


SMALL = {
    "evaluation_rows": 10,
    "validation_rows": 5,
    "test_share": 0.17,
    "validation_share": 0.08,
}
"""Of the hashes of 60 questions exactly 10 and 5 fall to these shares."""

TRAINING = ("demonstrations.train", "demonstrations.validation", "preferences.train")


def test_demonstrations_alone_give_prompts_as_well(run: Any, write: Any) -> None:
    done = run(demonstrations=write("d", demonstrations(60)), **SMALL)
    assert done.section == {
        "demonstrations": 50,
        "preferences": 0,
        "prompts": 60,
        "dropped": 0,
        "set_aside": 10,
        "splits": {
            "demonstrations.train": 45,
            "demonstrations.validation": 5,
            "prompts.train": 50,
            "prompts.test": 10,
        },
    }
    assert done.texts("prompts.train").isdisjoint(done.texts("prompts.test"))
    assert done.rows("prompts.test")[0]["output_text"].startswith("answer")
    assert not (done.root / "data/preferences.train.jsonl").exists()
    assert done.said == []


def test_a_held_out_prompt_is_in_no_training_split_of_any_kind(run: Any, write: Any) -> None:
    done = run(
        demonstrations=write("d", demonstrations(60)),
        preferences=write("p", preferences(60, each=2)),
        prompts=write("q", [{"input_text": f"Question  {n}", "group": f"g{n}"} for n in range(60)]),
        **{**SMALL, "evaluation_rows": 100, "validation_rows": 100},
    )
    test = {text.casefold().replace("  ", " ") for text in done.texts("prompts.test")}
    assert len(test) == 21  # the lower rank of two names decides
    for split in (*TRAINING, "preferences.validation"):
        assert test.isdisjoint(done.texts(split)), split
    assert done.texts("preferences.test") == test
    assert done.section["splits"]["preferences.test"] == 42
    assert done.texts("preferences.train").isdisjoint(done.texts("preferences.validation"))
    assert done.report["set_aside"] == {"demonstrations of held-out prompts": 21}


def test_preferences_have_a_test_of_their_own_and_keep_it_from_the_other_kinds(
    run: Any, write: Any
) -> None:
    done = run(
        demonstrations=write("d", demonstrations(60)),
        preferences=write("p", preferences(60)),
        evaluation_prompts=write("e", [{"input_text": "new 1"}, {"input_text": "question 2"}]),
        **{**SMALL, "evaluation_rows": 100, "validation_rows": 100},
    )
    test = done.texts("preferences.test")
    assert len(test) == 11  # 10 by their share
    assert "question 2" in test
    for split in ("demonstrations.train", "prompts.train", "preferences.train"):
        assert test.isdisjoint(done.texts(split)), split


def test_few_documents_with_many_pairs_stay_whole(run: Any, write: Any) -> None:
    done = run(preferences=write("p", preferences(17, each=19)))
    documents = [done.texts(f"preferences.{name}") for name in ("train", "validation", "test")]
    assert sum(map(len, documents)) == 17
    assert len(set.union(*documents)) == 17
    assert done.section["splits"]["preferences.train"] >= 0.45 * 17 * 19
    assert done.texts("prompts.test") <= done.texts("preferences.test")
    assert done.report["prompts_from"] == "preferences"
    assert done.said[0].startswith("data: prompts.test has 2 rows, not the 400 of data.evaluation_")


def test_splits_do_not_depend_on_the_seed_but_draws_do(run: Any, write: Any) -> None:
    files = {
        "demonstrations": write("d", demonstrations(60)),
        "preferences": write("p", preferences(60)),
        "max_demonstrations": 20,
        "max_preferences": 15,
        "max_prompts": 25,
        **SMALL,
    }
    one = run(seed=1, **files)
    before = {split: one.rows(split) for split in one.section["splits"]}
    again = run(seed=1, **files)
    assert {split: again.rows(split) for split in again.section["splits"]} == before
    other = run(seed=2, **files)
    assert other.section == one.section
    assert one.section["splits"]["demonstrations.train"] == 20
    assert one.section["splits"]["preferences.train"] == 15
    assert one.section["splits"]["prompts.train"] == 25
    changed = {split for split in before if other.rows(split) != before[split]}
    assert changed == {"demonstrations.train", "preferences.train", "prompts.train"}
    assert other.report["set_aside"] == {
        "preferences beyond max_preferences": 30,
        "demonstrations of held-out prompts": 10,
        "demonstrations beyond max_demonstrations": 25,
        "prompts beyond max_prompts": 25,
    }


def test_exact_duplicates_are_dropped_and_counted(run: Any, write: Any) -> None:
    twice = {"input_text": "question 1", "output_text": "answer 1"}
    other = {"input_text": "question 1", "output_text": "another answer"}
    spaced = {"input_text": "question  1", "output_text": "answer 1"}
    done = run(
        demonstrations=write("d", [*demonstrations(30), twice, other, spaced]),
        prompts=write("q", [*demonstrations(30), {"input_text": "QUESTION 2"}, twice]),
        evaluation_prompts=write("e", [{"input_text": text} for text in ("new", "new ", "new")]),
        **SMALL,
    )
    assert done.report["dropped"] == {
        "duplicate evaluation prompts": 1,
        "duplicate demonstrations": 1,
        "duplicate prompts": 1,
    }
    assert done.section["dropped"] == 3
    assert done.section["demonstrations"] == 32
    assert {"question 2", "QUESTION 2"} <= done.texts("prompts.train")


def test_prompts_among_the_evaluation_prompts_are_set_aside(run: Any, write: Any) -> None:
    done = run(
        prompts=write("q", demonstrations(30)),
        evaluation_prompts=write("e", demonstrations(12)),
        evaluation_rows=8,
    )
    assert done.section["splits"] == {"prompts.test": 8, "prompts.train": 18}
    assert done.report["set_aside"] == {
        "held-out prompts beyond evaluation_rows": 4,
        "prompts among the held-out ones": 12,
    }


def test_collecting_takes_prompts_that_no_demonstration_shows(run: Any, write: Any) -> None:
    done = run(
        demonstrations=write("d", demonstrations(60)),
        collect=SIMULATED,
        max_demonstrations=20,
        **SMALL,
    )
    assert len(done.rows("prompts.collect")) == 15
    assert done.texts("prompts.collect").isdisjoint(done.texts("demonstrations.train"))
    assert done.texts("prompts.collect") <= done.texts("prompts.train")
    assert done.said == []


def test_collecting_says_where_prompts_overlap_or_run_out(run: Any, write: Any) -> None:
    files = write("d", demonstrations(60))
    done = run(demonstrations=files, collect=SIMULATED, max_demonstrations=40, **SMALL)
    assert done.said == [
        "data: 10 of the 15 prompts for collecting preferences are also training demonstrations; "
        "lower data.max_demonstrations or collect.pairs to keep them apart"
    ]
    many = CollectConfig(annotator="simulated", pairs=100)
    done = run(demonstrations=files, collect=many, max_demonstrations=40, **SMALL)
    assert "data: there are 45 prompts for collecting preferences, not the 105 of" in done.said[1]


def test_the_prompts_that_choose_a_checkpoint_are_kept_apart(run: Any, write: Any) -> None:
    """The validation share chooses where somebody does; else it is trained on."""
    files = write("d", demonstrations(60))
    done = run(demonstrations=files, collect=SIMULATED, **SMALL)
    chosen = done.texts("prompts.validation")
    assert chosen
    assert chosen == done.texts("demonstrations.validation")
    for split in ("prompts.train", "prompts.collect", "prompts.test"):
        assert done.texts(split).isdisjoint(chosen), split
    last = PolicyConfig(selection=SelectionConfig(by="last"))
    done = run(demonstrations=files, collect=SIMULATED, policy=last, **SMALL)
    assert not (done.root / "data" / "prompts.validation.jsonl").exists()
    assert chosen <= done.texts("prompts.train")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"collect": CollectConfig()}, False),
        ({"data": DataConfig(preferences=PreferenceSource(files=("p.jsonl",)))}, False),
        ({"policy": PolicyConfig(reward="folder")}, False),
    ],
)
def test_collects_when_a_reward_is_to_be_trained_without_preferences(
    change: dict[str, Any], expected: bool
) -> None:
    assert stage.collects(Recipe(**{"collect": SIMULATED, **change})) is expected


def test_stale_splits_of_an_earlier_recipe_are_removed(run: Any, write: Any) -> None:
    run(preferences=write("p", preferences(60)), **SMALL)
    done = run(demonstrations=write("d", demonstrations(60)), **SMALL)
    names = {path.name for path in (done.root / "data").iterdir()}
    assert names == {f"{split}.jsonl" for split in done.section["splits"]} | {"report.json"}


def test_every_written_row_is_read_back(run: Any, write: Any) -> None:
    talk = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "long talk"}],
        "output_text": "yes",
    }
    done = run(
        demonstrations=write("d", [*demonstrations(40), talk]),
        preferences=write("p", [{**row, "strength": 2} for row in preferences(40)]),
        **SMALL,
    )
    data, splits = done.root / "data", done.section["splits"]
    for split, count in splits.items():
        kind = split.split(".")[0]
        read: Any = {
            "demonstrations": read_demonstrations,
            "preferences": read_preferences,
            "prompts": read_prompts,
        }[kind]
        assert len(read([data / f"{split}.jsonl"])) == count
    assert "strength" not in done.rows("prompts.train")[0]
    assert "strength" in done.rows("preferences.train")[0]


def test_the_report_tells_counts_lengths_and_sources(run: Any, write: Any) -> None:
    files = write(
        "p",
        [
            *preferences(30),
            {**preferences(1)[0], "id": "again"},
            {"input_text": "same", "candidate_0": "a", "candidate_1": "b", "choice": "tie"},
        ],
    )
    report = run(preferences=files, evaluation_rows=10, validation_rows=5).report
    assert report["read"] == {
        "demonstrations": 0,
        "preferences": 32,
        "prompts": 32,
        "evaluation_prompts": 0,
    }
    assert report["choices"] == {"0": 31, "tie": 1}
    assert (report["duplicate_preferences"], report["equal_candidates"]) == (1, 0)
    assert report["reading"] == {
        "preferences": {
            "records": 32,
            "rows": 32,
            "dropped": {},
            "coerced": {},
            "examples": [],
            "formats": {files[0]: "native"},
        }
    }
    assert report["source"]["files"]["preferences"] == list(files)
    words = report["splits"]["preferences.train"]["words"]
    assert words["candidate_0"]["p50"] == 3  # "good 1 0"
    assert words["prompt"]["max"] == 2


def test_percentiles_are_those_of_the_statistics(run: Any, write: Any) -> None:
    rows = [{"input_text": f"q {n}", "output_text": "w " * n} for n in range(1, 102)]
    done = run(demonstrations=write("d", rows))
    lengths = sorted(len(row["output_text"].split()) for row in done.rows("demonstrations.train"))
    found = done.report["splits"]["demonstrations.train"]["words"]["output_text"]
    assert found == {
        "min": lengths[0],
        **{f"p{p}": lengths[math.ceil(p * len(lengths) / 100) - 1] for p in (10, 50, 90, 99)},
        "max": lengths[-1],
    }
    statistics = done.report["statistics"]["demonstrations.train"]["words"]["output"]
    assert found.items() <= statistics.items()


@pytest.mark.parametrize("kind", ["prompts", "evaluation_prompts"])
def test_files_that_give_no_row_are_refused_and_not_replaced(
    run: Any, write: Any, kind: str
) -> None:
    faulty = write("faulty", [{"input_text": 7}] * 3)
    files = {kind: faulty, "demonstrations": write("d", demonstrations(60))}
    with pytest.raises(DataError, match=rf"no row of data.{kind} is left \(.*times: .*; mend the"):
        run(**files, on_error="drop")


def test_faulty_rows_end_the_run_or_are_left_out_and_counted(run: Any, write: Any) -> None:
    rows = preferences(60)
    faulty = [{**row, "choice": 7} for row in rows[:3]]
    same = [{**row, "id": "same"} for row in rows[:2]]
    files = write("p", [*rows, *faulty, *same])
    with pytest.raises(DataError, match=r"p.jsonl:61: field 'choice': found 7"):
        run(preferences=files, **SMALL)
    done = run(preferences=files, on_error="drop", **SMALL)
    assert done.section["dropped"] == 4
    assert done.report["read"]["preferences"] == 61
    met = done.report["reading"]["preferences"]
    assert (met["records"], met["rows"], sum(met["dropped"].values())) == (65, 61, 4)
    assert done.report["dropped"] == {
        f"preferences: {reason}": count for reason, count in met["dropped"].items()
    }
    assert sorted(met["dropped"].values()) == [1, 3]
    said = "data: 3 records left out of preferences: field 'choice': found a number"
    assert said in done.said


def test_an_id_used_twice_is_refused(run: Any, write: Any) -> None:
    rows = [{**row, "id": "same"} for row in demonstrations(2)]
    with pytest.raises(
        DataError, match=r"d.jsonl:2: field 'id': 'same' is used twice \(first at .*d.jsonl:1"
    ):
        run(demonstrations=write("d", rows))


def test_nothing_is_left_of_the_spool(run: Any, write: Any, tmp_path: Path) -> None:
    data = tmp_path / "run" / "data"
    (data / stage.SPOOL).mkdir(parents=True)
    (data / stage.SPOOL / "left").write_text("by a kill")
    with pytest.raises(DataError, match="is missing"):
        run(preferences=write("p", [*preferences(9), {"input_text": "no candidates"}]))
    assert list(data.iterdir()) == []
    done = run(preferences=write("p", preferences(60)), **SMALL)
    names = {path.name for path in data.iterdir()}
    assert names == {f"{split}.jsonl" for split in done.section["splits"]} | {"report.json"}


def test_a_kill_while_splits_are_written_leaves_the_old_ones_whole(
    run: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"demonstrations": write("d", demonstrations(60)), **SMALL}
    done = run(**files)
    before = {path.name: path.read_bytes() for path in (done.root / "data").iterdir()}
    written: list[Path] = []

    def write_few(path: Path, lines: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_lines(path, lines)

    monkeypatch.setattr(stage, "write_lines", write_few)
    with pytest.raises(KeyboardInterrupt):
        run(seed=5, max_prompts=7, max_demonstrations=3, **files)
    assert {path.name: path.read_bytes() for path in (done.root / "data").iterdir()} == before


def test_what_was_found_is_written_before_the_rows_are_refused(
    run: Any, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = {"level": "error", "text": "Bad.", "means": "No.", "try": "Mend.", "sets": ["all"]}
    found = {"tokens": {"findings": [finding]}}
    monkeypatch.setattr(stage, "quality", lambda *rest: found)
    with pytest.raises(DataError, match=r"Bad\. No\. Mend\."):
        run(demonstrations=write("d", demonstrations(60)), **SMALL)
    report = json.loads((tmp_path / "run/data/report.json").read_text())
    assert report["tokens"] == found["tokens"]
    assert report["read"]["demonstrations"] == 60


@pytest.mark.parametrize("grows", ["demonstrations", "preferences", "prompts"])
def test_rows_of_new_prompts_move_no_old_row(run: Any, write: Any, grows: str) -> None:
    def grown(kind: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fresh = [{**row, "input_text": f"new {row['input_text']}"} for row in rows]
        return [*rows, *fresh] if kind == grows else rows

    def texts(change: Callable[[str, list[dict[str, Any]]], Any]) -> dict[str, set[str]]:
        pairs = change("preferences", preferences(300, 2))
        grouped = [{**row, "group": f"document {n // 4}"} for n, row in enumerate(pairs)]
        done = run(
            demonstrations=write("d", change("demonstrations", demonstrations(400))),
            preferences=write("p", grouped),
            prompts=write("q", change("prompts", demonstrations(500))),
            evaluation_rows=10**6,
            validation_rows=10**6,
        )
        return {split: done.texts(split) for split in done.section["splits"]}

    before = texts(lambda kind, rows: rows)
    after = texts(grown)
    assert any(text.startswith("new") for text in after[f"{grows}.train"])
    for split, rows in before.items():
        assert rows <= after[split], split


def test_more_preferences_keep_what_was_held_out(run: Any, write: Any) -> None:
    """More rows of old prompts, and new prompts: what trained before is not tested on now."""
    files = {"evaluation_prompts": write("e", demonstrations(20)), **SMALL}
    before = run(preferences=write("p", preferences(200, 1)), **files)
    trained, tested = before.texts("preferences.train"), before.texts("preferences.test")
    after = run(preferences=write("p", preferences(500, 2)), **files)
    assert trained.isdisjoint(after.texts("preferences.test"))
    assert tested.isdisjoint(after.texts("preferences.train"))


def one_harvest(max_words: int) -> list[Demonstration]:
    return [
        Demonstration(
            prompt=Prompt(
                messages=(Message(Speaker.USER, f"explanation {module} {number}"),),
                id=f"p:m{module}:f{number}",
                group=f"p:m{module}",
                meta={"package": "p"},
            ),
            output_text=f"Summary {module} {number}.",
        )
        for module in range(40)
        for number in range(module % 5 + 1)
    ]


def test_the_built_in_task_is_split_by_module(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "harvest", one_harvest)
    monkeypatch.setattr(stage, "harvest_fingerprint", lambda: {"p": "1.0"})
    done = run(
        task="docstrings",
        collect=CollectConfig(annotator="simulated", pairs=30),
        max_demonstrations=40,
        test_share=0.2,
        evaluation_rows=20,
        validation_share=0.15,
        validation_rows=10,
    )
    modules = {
        split: {row["group"] for row in done.rows(split)} for split in done.section["splits"]
    }
    assert done.section["splits"]["prompts.test"] == 20
    assert done.section["splits"]["demonstrations.train"] == 40
    assert done.section["splits"]["prompts.collect"] == 40
    assert modules["prompts.test"].isdisjoint(modules["prompts.train"])
    assert modules["prompts.test"].isdisjoint(modules["demonstrations.train"])
    assert modules["demonstrations.validation"].isdisjoint(modules["demonstrations.train"])
    row = done.rows("prompts.test")[0]
    assert row["output_text"].startswith("Summary ")
    assert row["package"] == "p"
    assert done.report["source"]["packages"] == {"p": "1.0"}


def test_no_data_at_all_is_refused(run: Any) -> None:
    with pytest.raises(DataError, match=r"the recipe names no data; name files in data.prompts"):
        run()


def test_prompts_of_one_group_cannot_be_held_out(run: Any, write: Any) -> None:
    files = write("q", [{"input_text": f"q {n}", "group": "g"} for n in range(9)])
    with pytest.raises(DataError, match=r"all prompts are one group.*name data.evaluation_prompts"):
        run(prompts=files)


def test_prompts_that_are_all_held_out_are_refused(run: Any, write: Any) -> None:
    rows = demonstrations(9)
    with pytest.raises(DataError, match=r"every prompt is held out for evaluation.*add prompts"):
        run(prompts=write("q", rows), evaluation_prompts=write("e", rows))


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("demonstrations", demonstrations(1)),
        ("preferences", preferences(2)),
        ("preferences", preferences(1)),
    ],
)
def test_too_few_rows_for_every_split_are_refused(
    run: Any, write: Any, kind: str, rows: list[dict[str, Any]]
) -> None:
    prompts = write("e", [{"input_text": "other"}])
    message = f"no {kind} are left for the .* split: too few different prompts.*other prompts$"
    with pytest.raises(DataError, match=message):
        run(**{kind: write("r", rows)}, evaluation_prompts=prompts)


def test_demonstrations_that_are_all_held_out_are_refused(run: Any, write: Any) -> None:
    with pytest.raises(DataError, match="no demonstrations are left for the train split") as caught:
        run(
            demonstrations=write("d", demonstrations(3)),
            prompts=write("q", demonstrations(9)),
            evaluation_prompts=write("e", demonstrations(3)),
        )
    assert "give rows of at least 2 other prompts" in str(caught.value)


def test_a_simulated_annotator_needs_references_at_once(run: Any, write: Any) -> None:
    rows = [{"input_text": f"q {n}"} for n in range(30)]
    with pytest.raises(DataError, match="has no author's line for the simulated annotator"):
        run(prompts=write("q", rows), collect=SIMULATED, evaluation_rows=5)


@pytest.mark.parametrize("kind", ["prompts", "evaluation_prompts"])
def test_a_prompt_that_nothing_can_choose_a_checkpoint_by_is_named(
    run: Any, write: Any, tmp_path: Path, kind: str
) -> None:
    """With a ready reward nothing is collected, and the annotator only chooses the checkpoint."""
    rows = [{"id": f"name {n}", **row} for n, row in enumerate(demonstrations(60))]
    asked: dict[str, Any] = {"prompts": rows[:40], "evaluation_prompts": rows[40:]}
    del asked[kind][6]["output_text"]
    named = {each: write(each, asked[each]) for each in asked}
    policy = PolicyConfig(reward="m:f", selection=SelectionConfig(by="annotator"))
    message = (
        rf"{kind}\.jsonl:7: field 'output_text': prompt 'name \d+' has no author's line .* "
        "give prompt rows an output_text"
    )
    with pytest.raises(DataError, match=message):
        run(**named, collect=SIMULATED, policy=policy)
    assert not list((tmp_path / "run" / "data").glob("*.jsonl"))
    done = run(**named, collect=SIMULATED, policy=policy, on_error="drop")
    assert done.report["reading"][kind]["rows"] == len(asked[kind]) - 1
    assert any(f"1 records left out of {kind}: field 'output_text'" in line for line in done.said)


@pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="needs the development data (AMENABLE_TEST_DATA)"
)
def test_real_summaries_and_real_prompts(run: Any) -> None:
    done = run(
        preferences=(str(REAL_DATA / "pref/summedits_scitldr.jsonl.gz"),),
        prompts=(str(REAL_DATA / "sft/scitldr_train.jsonl.gz"),),
        test_share=0.25,
        validation_share=0.1,
        validation_rows=200,
    )
    assert done.section["preferences"] == 321
    assert done.section["splits"]["prompts.test"] == 400
    parts = [done.texts(f"preferences.{name}") for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 17
