"""A judge as the annotator: both orders, doubts left out or weighed, nothing asked twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import StageContext, read_jsonl, write_jsonl
from amenable.config.load import load_recipe
from amenable.data.reading.readers import read_preferences
from amenable.data.schemas import Choice, Message, Prompt, Speaker
from amenable.errors import AmenableError, RecipeError
from amenable.judges import Question, Reply, Verdict
from amenable.judges.types import Keep
from amenable.pipeline.preflight import check_inputs
from amenable.rollout import collect
from amenable.rollout.annotators import open_annotator

from ..judges.chat_service import ChatService  # noqa: TID252 - the tests are no package


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def shown(*pairs: tuple[str, str]) -> list[tuple[Prompt, str, str]]:
    return [
        (
            Prompt(messages=(Message(Speaker.USER, f"Ask {n}."),), id=f"p{n}", group=str(n)),
            *pair,
        )
        for n, pair in enumerate(pairs)
    ]


def judged(make_context: Any, root: Path, service: ChatService, **changes: Any) -> StageContext:
    ctx: StageContext = make_context(
        "collect",
        root=root,
        collect__annotator="judge",
        collect__judge=service.url,
        collect__judge_model="m",
        **changes,
    )
    return ctx


def test_pairs_are_chosen_in_both_orders_and_doubts_left_out(
    make_context: Any, tmp_path: Path
) -> None:
    """The service prefers more a's, and B where they are equal: then the orders contradict."""
    with ChatService() as service:
        annotator = open_annotator(judged(make_context, tmp_path, service))
        path = tmp_path / "pairs.jsonl"
        pairs = shown(("a", "aa"), ("aaa", "aa"), ("ab", "ba"), ("same", "same"))
        assert collect.write_choices(path, annotator, pairs) == 2
        asked = sum(service.asked.values())
        again = open_annotator(judged(make_context, tmp_path, service))
        assert collect.write_choices(path, again, pairs) == 2
        assert collect.write_choices(tmp_path / "none.jsonl", again, shown(("same", "same"))) == 0
        assert sum(service.asked.values()) == asked == 6, "nothing is asked twice"
    rows = read_preferences([path])
    assert [(row.prompt.id, row.choice) for row in rows] == [
        ("p0", Choice.SECOND),
        ("p1", Choice.FIRST),
    ]
    assert {row.annotator for row in rows} == {"m"}
    figures = annotator.figures()
    assert figures["judge_flips"] == pytest.approx(1 / 3)
    assert (figures["judge"], figures["unanswered"], figures["judge_accuracy"]) == ("m", 0, None)
    assert "agreement with people was not measured" in annotator.describe()


@pytest.mark.parametrize(("doubtful", "kept"), [("drop", []), ("weight", [("p0", 0.5)])])
def test_a_tie_in_one_order_is_a_doubt(
    make_context: Any, tmp_path: Path, doubtful: str, kept: list[tuple[str, float]]
) -> None:
    with ChatService() as service:
        service.texts = ["Verdict: tie", "Verdict: A"]
        ctx = judged(make_context, tmp_path, service, collect__doubtful=doubtful)
        annotator = open_annotator(ctx)
        annotator._judge._concurrency = 1
        path = tmp_path / "pairs.jsonl"
        collect.write_choices(path, annotator, shown(("a", "b")))
    rows = list(read_jsonl(path))
    assert [(row["id"], row["weight"]) for row in rows] == kept
    assert all(row["choice"] == 1 for row in rows), "b was first when A won"


class Sure:
    """Tells how sure it is of the first text: a table by the two texts in their order."""

    name = "sure"
    identity = None

    def __init__(self, table: dict[tuple[str, str], float | None]) -> None:
        self._table = table

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        for number, asked in enumerate(questions):
            of_first = self._table[asked.first, asked.second]
            likes_first = asked.first < asked.second if of_first is None else of_first > 0.5
            verdict = Verdict.FIRST if likes_first else Verdict.SECOND
            keep(number, Reply(verdict, confidence=of_first))
        return []


TOLD: dict[tuple[str, str], float | None] = {
    ("a", "b"): 0.9,  # agrees: 0.9 and 0.7 for a
    ("b", "a"): 0.3,
    ("c", "d"): 0.95,  # likes the first place, more so with c in it: 0.95 and 0.4 for c
    ("d", "c"): 0.6,
    ("e", "f"): 0.75,  # likes the first place alike
    ("f", "e"): 0.75,
    ("g", "h"): 0.2,  # tells it in one order only, and means h, then g
    ("h", "g"): None,
}


@pytest.mark.parametrize(
    ("doubtful", "kept"),
    [
        ("drop", [("p0", 0, 1.0, [0.9, 0.7])]),
        ("weight", [("p0", 0, 1.0, [0.9, 0.7])]),
        (
            "confidence",
            [
                ("p0", 0, 0.6, [0.9, 0.7]),  # p = (0.9 + 0.7) / 2
                ("p1", 0, 0.35, [0.95, 0.4]),  # p = (0.95 + 0.4) / 2
                ("p3", 0, 0.2, [0.2, None]),  # p = (0.2 + 1) / 2, a verdict being certain
            ],
        ),
    ],
)
def test_confidence_of_both_orders_stays_in_the_row_and_may_weigh_it(
    make_context: Any, tmp_path: Path, doubtful: str, kept: list[Any]
) -> None:
    ctx = make_context(
        "collect",
        root=tmp_path,
        collect__annotator="judge",
        collect__judge="http://127.0.0.1:9/v1",
        collect__judge_model="replaced",
        collect__doubtful=doubtful,
    )
    annotator = open_annotator(ctx)
    annotator._judge = Sure(TOLD)
    path = tmp_path / "pairs.jsonl"
    collect.write_choices(path, annotator, shown(("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")))
    rows = [(row.prompt, row.choice.value, row.weight) for row in read_preferences([path])]
    assert [(prompt.id, choice) for prompt, choice, _ in rows] == [row[:2] for row in kept]
    assert [weight for *_, weight in rows] == pytest.approx([row[2] for row in kept])
    for (prompt, *_), (*_, told) in zip(rows, kept, strict=True):
        assert prompt.meta["judge_confidence"] == pytest.approx(told)


def test_a_judge_that_tells_no_confidence_is_weighed_by_its_verdicts(
    make_context: Any, tmp_path: Path
) -> None:
    """Prompts that come from an earlier collection do not keep what was said then."""
    pairs = [
        (replace(prompt, meta={"judge_confidence": [1.0, 1.0]}), first, second)
        for prompt, first, second in shown(("a", "b"), ("a", "aa"), ("ab", "ba"))
    ]
    written = {}
    for doubtful in ("weight", "confidence"):
        with ChatService() as service:
            service.texts = ["Verdict: tie", "Verdict: A"]
            root = tmp_path / doubtful
            ctx = judged(make_context, root, service, collect__doubtful=doubtful)
            annotator = open_annotator(ctx)
            annotator._judge._concurrency = 1
            assert collect.write_choices(root / "pairs.jsonl", annotator, pairs) == 2
        written[doubtful] = list(read_jsonl(root / "pairs.jsonl"))
    assert written["confidence"] == written["weight"]
    assert not any("judge_confidence" in row for row in written["weight"])


def test_its_agreement_with_people_is_told(make_context: Any, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    audit.mkdir()
    found = {"judge": "m", "rows": 80, "accuracy": 0.75, "accuracy_ci95": [0.65, 0.83]}
    (audit / "audit.json").write_text(json.dumps(found))
    with ChatService() as service:
        ctx = judged(make_context, tmp_path, service, collect__judge_audit=str(audit))
        annotator = open_annotator(ctx)
    assert "On 80 audited rows it chose as people did in 0.750 [0.650, 0.830]." in (
        annotator.describe()
    )
    assert annotator.figures()["judge_accuracy"] == 0.75


def test_the_stage_collects_by_a_judge_and_a_second_model(
    make_context: Any, ten_rows: list[dict[str, str]], tiny: Path, tmp_path: Path
) -> None:
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def length(completions, **other): return [len(c) for c in completions]")
    ctx = make_context(
        "collect",
        root=tmp_path / "run",
        collect__annotator="judge",
        collect__judge=f"{scorer}:length",
        collect__other=str(tiny),
    )
    for name, part in (("collect", ten_rows[:8]), ("test", ten_rows[8:])):
        rows = [{"id": f"{name}{i}", "group": str(i), **row} for i, row in enumerate(part)]
        write_jsonl(ctx.folder.data / f"prompts.{name}.jsonl", rows)
    section = collect.run(ctx)
    assert section["simulated"] is False
    assert section["annotator"].startswith("AI feedback: length chose")
    rows = list(read_jsonl(ctx.folder.data / "preferences.train.jsonl"))
    assert rows
    assert all(
        (len(row["candidate_1"]) > len(row["candidate_0"])) == (row["choice"] == 1) for row in rows
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['collect.annotator="judge"'], "collect.judge: is empty; name who chooses"),
        (
            ['collect.annotator="judge"', 'collect.judge="http://127.0.0.1:9/v1"'],
            "collect.judge_model: is empty",
        ),
        (['collect.annotator="simulated"', 'collect.judge="tiny"'], "collect.judge: would not be"),
    ],
)
def test_a_recipe_that_names_half_a_judge_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, ['data.task="docstrings"', *settings])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ['collect.judge="http://h/v1"', 'collect.judge_token_env="NO_SUCH_TOKEN"'],
            "NO_SUCH_TOKEN",
        ),
        (
            ['collect.judge="http://h/v1"', 'collect.judge_template="nothing"'],
            "no judge's template",
        ),
        (['collect.judge="./nowhere/model"'], "correct collect.judge"),
        (['collect.judge="nowhere.py:score"'], "collect.judge"),
        (
            ['collect.judge="tiny"', 'collect.judge_audit="nowhere"'],
            "nowhere/audit.json: no such file; make it with `amenable audit FILE --judge JUDGE "
            "--out nowhere`",
        ),
    ],
)
def test_what_a_judge_lacks_is_told_before_anything_is_loaded(
    settings: list[str], message: str
) -> None:
    words = ['data.task="docstrings"', 'collect.annotator="judge"', 'collect.judge_model="m"']
    with pytest.raises(AmenableError, match=message):
        check_inputs(load_recipe(None, [*words, *settings]))
