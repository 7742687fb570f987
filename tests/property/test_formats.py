"""Whatever is written in a format comes back from it; whatever is read, only DataErrors are raised.

Texts, preferences and everything that a format says it holds must be equal; which rows a format
refuses is stated here by hand.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amenable.config.data import DemonstrationSource, PreferenceSource, PromptSource
from amenable.data.formats.format import KINDS, Format
from amenable.data.formats.table import FORMATS, detect
from amenable.data.reading.check import check_files
from amenable.data.reading.convert import _Writing
from amenable.data.reading.rankings import gather, pairs_of
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.reading.records import DroppingLog, ReadLog, Row
from amenable.data.row_table import read_table
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.errors import DataError

from ..unit.data.formats.samples import SAMPLES  # noqa: TID252 - the tests are no package
from .data_strategies import RESERVED, json_values, metas, names, prompts, texts

WRITABLE = [(form, kind) for form in FORMATS.values() for kind in KINDS if form.writes(kind)]
RESERVED_BY_ANY = {
    *("prompt", "chosen", "rejected", "completion", "label", "info", "summary", "summaries"),
    *("worker", "extra", "conversations", "instruction", "output", "input", "completions"),
    *("response", "response_1", "score_chosen", "preferred_output", "non_preferred_output"),
}

marked = st.sampled_from(["\n\nHuman: x", "a\n\nAssistant:", "Human: y", " b", "c\n", "\n\n d"])
conversations = prompts().map(
    lambda prompt: Prompt(
        messages=prompt.messages,
        id=prompt.id,
        group=prompt.group,
        meta={key: value for key, value in prompt.meta.items() if key not in RESERVED_BY_ANY},
    )
)
pair_texts = st.tuples(texts | marked, texts | marked).filter(lambda pair: pair[0] != pair[1])


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    first, second = draw(pair_texts)
    choice = draw(st.sampled_from(Choice))
    strengths = {Choice.FIRST: (1, 4), Choice.TIE: (5, 5), Choice.SECOND: (6, 9)}[choice]
    return Preference(
        prompt=draw(conversations),
        candidate_0=first,
        candidate_1=second,
        choice=choice,
        weight=draw(st.just(1.0) | st.floats(1e-6, 1e6)),
        margin=draw(st.none() | st.floats(0, 100)),
        annotator=draw(st.none() | names),
        strength=draw(st.none() | st.integers(*strengths)),
    )


ROWS: dict[str, st.SearchStrategy[Any]] = {
    "preferences": preferences(),
    "demonstrations": st.builds(Demonstration, prompt=conversations, output_text=texts | marked),
    "prompts": conversations,
}


def placed(values: dict[str, Any], line: int = 1, log: ReadLog | None = None) -> Row:
    return Row(values, "rows.jsonl", line, "rows", log or ReadLog())


def read_back(form: Format, kind: str, records: list[dict[str, Any]]) -> list[Any]:
    """Typed rows of what JSON makes of the records."""
    log = ReadLog()
    rows = [placed(json.loads(json.dumps(one)), n, log) for n, one in enumerate(records, 1)]
    read: Any = getattr(form, kind)
    if read is not None:
        return [item for row in rows for item in read(row)]
    assert form.answers is not None
    answers = [(row, answer) for row in rows for answer in form.answers(row)]
    made = gather(answers, log, rated=form.rated)
    return [pair for _, ranking in made for pair in pairs_of(ranking, "all", log)]


HELD: dict[str, Callable[[Any], object]] = {
    "id": lambda row: prompt_of(row).id,
    "group": lambda row: prompt_of(row).group,
    "other keys": lambda row: prompt_of(row).meta,
    "weight": lambda row: getattr(row, "weight", None),
    "margin": lambda row: getattr(row, "margin", None),
    "annotator": lambda row: getattr(row, "annotator", None),
    "strength": lambda row: getattr(row, "strength", None),
    "order of the candidates": lambda row: getattr(row, "candidate_0", None),
}


def prompt_of(row: Any) -> Prompt:
    return row if isinstance(row, Prompt) else row.prompt


def turns(row: Any) -> list[Speaker]:
    return [turn.speaker for turn in prompt_of(row).messages]


def may_be_refused(form: Format, row: Any) -> bool:
    """What the formats are documented not to say, by name of the format and shape of the row."""
    said = turns(row)
    plain = form.name in ("trl", "gcpc", "openai-summarize")
    if isinstance(row, Preference) and row.choice is Choice.TIE and form.name != "native":
        return True
    if plain and len(said) > 1:
        return True
    inner = said[1:] if said[0] is Speaker.SYSTEM else said
    if form.name == "gcpc-chat":
        return Speaker.SYSTEM in inner or inner[0] is not Speaker.USER
    if form.name == "alpaca":
        return inner != [Speaker.USER, Speaker.ASSISTANT] * (len(inner) // 2) + [Speaker.USER]
    if form.name == "hh":
        contents = [turn.content for turn in row.prompt.messages]
        marks = ("\n\nHuman:", "\n\nAssistant:")
        held = [*contents, row.candidate_0, row.candidate_1]
        return Speaker.SYSTEM in said or any(mark in text for text in held for mark in marks)
    return False


@pytest.mark.parametrize(
    ("form", "kind"), WRITABLE, ids=[f"{form.name}-{kind}" for form, kind in WRITABLE]
)
@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_row_comes_back(form: Format, kind: str, data: st.DataObject) -> None:
    row = data.draw(ROWS[kind])
    writing = _Writing(form, kind)  # type: ignore[arg-type]
    records = list(writing.all(iter([(placed({}), row)])))
    if not records:
        assert may_be_refused(form, row), writing.not_written
        return
    (back,) = read_back(form, kind, records)
    assert prompt_of(back).messages == prompt_of(row).messages
    if isinstance(row, Demonstration):
        assert back.output_text == row.output_text
    if isinstance(row, Preference):
        assert (back.chosen, back.rejected) == (row.chosen, row.rejected)
        assert (back.choice is Choice.TIE) == (row.choice is Choice.TIE)
    for what in form.holds & HELD.keys():
        assert HELD[what](back) == HELD[what](row), what


@pytest.mark.parametrize(
    ("form", "kind"), WRITABLE, ids=[f"{form.name}-{kind}" for form, kind in WRITABLE]
)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_written_record_is_recognised_as_its_format(
    form: Format, kind: str, data: st.DataObject
) -> None:
    row = data.draw(ROWS[kind])
    records = list(_Writing(form, kind).all(iter([(placed({}), row)])))  # type: ignore[arg-type]
    expected = {
        "gcpc": "native",
        "gcpc-chat": "openai-messages" if kind == "demonstrations" else "native",
    }.get(form.name, form.name)
    for record in records:
        assert detect(placed(record), kind).name == expected  # type: ignore[arg-type]
        assert FORMATS[expected].kind(record) == kind


# Whole files ----------------------------------------------------------------------------------

SOURCES: dict[str, Any] = {
    "preferences": (PreferenceSource, iter_preferences),
    "demonstrations": (DemonstrationSource, iter_demonstrations),
    "prompts": (PromptSource, iter_prompts),
}


def said(row: Any) -> tuple[object, ...]:
    """A row without ids, which tell the line, and without order of candidates and weight."""
    messages = prompt_of(row).messages
    if isinstance(row, Preference):
        return messages, row.chosen, row.rejected, row.choice is Choice.TIE, row.margin
    return messages, getattr(row, "output_text", None)


@pytest.mark.parametrize(
    ("form", "kind"), WRITABLE, ids=[f"{form.name}-{kind}" for form, kind in WRITABLE]
)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_order_of_the_lines_changes_no_row(form: Format, kind: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(ROWS[kind], min_size=1, max_size=5))
    records = list(
        _Writing(form, kind).all((placed({}), row) for row in rows)  # type: ignore[arg-type]
    )
    if not records:
        return
    seed = data.draw(st.integers(0, 99))
    shuffled = random.Random(seed).sample(records, len(records))
    found = []
    for lines in (records, shuffled):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            source, reader = SOURCES[kind]
            made = reader(source(files=(str(path),), format=form.name), DroppingLog())
            found.append(Counter(said(row) for _, row in made))
    assert found[0] == found[1]
    assert found[0]


# Other keys -----------------------------------------------------------------------------------

OTHERS = st.dictionaries(
    st.sampled_from(sorted(RESERVED | {f"other_{name}" for name in RESERVED})),
    json_values | st.sampled_from([0, 1, "tie", "a", 0.5]),
    max_size=4,
)


@pytest.mark.parametrize("name", SAMPLES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_a_check_passes_the_data_stage_can_take(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    kind = data.draw(st.sampled_from([kind for kind in KINDS if form.reads(kind)]))
    source, reader = SOURCES[kind]
    records = [{**data.draw(OTHERS), **record} for record in SAMPLES[name]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        named = source(files=(str(path),), format=name)
        report = check_files(named, kind)
        log = DroppingLog()
        refused = ""
        try:
            table = read_table(Path(folder) / "spool", reader(named, log), log)
        except DataError as error:
            refused = error.reason
        if refused:  # the whole file, which the check tells of as well
            assert refused in [fault.reason for fault in report.faults]
            return
        assert len(table) == report.rows
        if report.ok:
            assert not log.examples
            out = Path(folder) / "fixed.jsonl"
            check_files(named, kind, fix=out)
            native = list(reader(source(files=(str(out),), format="native"), ReadLog()))
            assert len(native) == len(table)


# Anything at all ------------------------------------------------------------------------------

turn_like = st.dictionaries(
    st.sampled_from(["role", "author", "from", "content", "value", "candidate_0"]),
    st.sampled_from(["user", "assistant", "system", "human", "gpt", "Hi", "\ud83d"]) | json_values,
    max_size=3,
)
answer_like = st.dictionaries(
    st.sampled_from(["response", "text", "score", "overall_score", "rank", "role", "replies"]),
    json_values | st.lists(turn_like, max_size=2),
    max_size=4,
)
keys = st.sampled_from(
    sorted(
        RESERVED_BY_ANY
        | {"input_text", "messages", "context", "candidate_0", "candidate_1", "choice"}
        | {"output_text", "id", "group", "weight", "margin", "strength", "history", "system"}
        | {"helpfulness", "response_2", "preference_strength", "score_rejected"}
        | {"message_tree_id"}
    )
)
values = (
    json_values
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "Human: a", "\ud83d", 0, 1, "tie", 5])
    | st.lists(turn_like, max_size=3)
    | st.lists(answer_like, max_size=2)
    | answer_like
    | turn_like
    | st.dictionaries(
        st.sampled_from(["messages", "post", "article", "axes", "overall", "id", "text", "title"]),
        json_values | st.lists(turn_like, max_size=2),
        max_size=4,
    )
)
records_like = st.dictionaries(keys, values, max_size=6)


@given(records_like)
@settings(max_examples=400, deadline=None)
def test_nothing_but_data_errors_is_raised(record: dict[str, Any]) -> None:
    for form in FORMATS.values():
        form.fits(record)
        form.kind(record)
        for kind in KINDS:
            if not form.reads(kind):
                continue
            read: Any = getattr(form, kind) or form.rankings or form.answers or form.preferences
            row = placed(record, 1, DroppingLog())
            faults = []
            try:
                assert all(turns(item)[-1] is Speaker.USER for item in read(row))
            except DataError as error:
                faults.append((error.path, error.line))
            assert faults in ([], [("rows.jsonl", 1)])


@given(records_like, st.sampled_from(KINDS))
@settings(max_examples=400, deadline=None)
def test_detection_takes_a_format_of_the_kind_or_says_what_it_found(
    record: dict[str, Any], kind: Any
) -> None:
    fits = [form for form in FORMATS.values() if form.fits(record) and form.reads(kind)]
    if fits:
        assert detect(placed(record), kind) is fits[0]
        return
    with pytest.raises(DataError, match=r"rows.jsonl:1: (looks like the format|is in no known)"):
        detect(placed(record), kind)


@given(metas, st.lists(st.sampled_from(Speaker), max_size=4))
def test_refusals_are_told_in_words(meta: dict[str, Any], speakers: list[Speaker]) -> None:
    messages = (*(Message(one, "x") for one in speakers), Message(Speaker.USER, "Q"))
    prompt = Prompt(messages=messages, id="a", group="b", meta=meta)
    row = Preference(prompt=prompt, candidate_0="A", candidate_1="B", choice=Choice.TIE)
    for form in FORMATS.values():
        assert bool(form.refusal(row)) is ("ties" not in form.holds)
