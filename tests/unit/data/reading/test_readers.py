from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from amenable.config.data import PreferenceColumns, PreferenceSource, SourceConfig
from amenable.data.formats.format import Kind
from amenable.data.formats.native import (
    demonstration_to_row,
    preference_to_row,
    prompt_to_row,
)
from amenable.data.reading.read_log import DroppingLog, ReadLog
from amenable.data.reading.readers import (
    iter_items,
    iter_preferences,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from amenable.data.schemas import Choice, Message, Prompt, Speaker, prompt_key
from amenable.errors import DataError, RecipeError

Write = Callable[..., Path]
Reader = Callable[[Sequence[str | Path]], list[Any]]

PAIR = {"input_text": "Sum it up.", "candidate_0": "Short.", "candidate_1": "Long.", "choice": 1}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_rows


def refusal(read: Reader, *paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(paths)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_reads_a_demonstration_with_its_unknown_keys(write: Write) -> None:
    path = write({"input_text": "In", "output_text": "Out", "meta": {"a": [1]}, "source": "s"})
    (row,) = read_demonstrations([path])
    assert row.output_text == "Out"
    assert row.prompt.text == "In"
    assert row.prompt.id == "rows:1"
    assert row.prompt.meta == {"meta": {"a": [1]}, "source": "s"}
    assert demonstration_to_row(row) == {
        "id": "rows:1",
        "group": row.prompt.group,
        "input_text": "In",
        "output_text": "Out",
        "meta": {"a": [1]},
        "source": "s",
    }


def test_reads_every_choice(write: Write) -> None:
    path = write(*({**PAIR, "choice": choice} for choice in (0, 1, "tie")))
    assert [row.choice for row in read_preferences([path])] == [
        Choice.FIRST,
        Choice.SECOND,
        Choice.TIE,
    ]


def test_reads_the_optional_keys_of_a_preference(write: Write) -> None:
    extra = {"id": 7, "group": "g", "weight": 2, "margin": 0.5, "annotator": "ann", "strength": 9}
    (row,) = read_preferences([write({**PAIR, **extra})])
    assert (row.prompt.id, row.prompt.group) == ("7", "g")
    assert (row.weight, row.margin, row.annotator) == (2.0, 0.5, "ann")
    assert row.strength == 9
    assert row.prompt.meta == {}
    assert preference_to_row(row) == {**PAIR, **extra, "id": "7"}


def test_null_counts_as_absent(write: Write) -> None:
    nothing = dict.fromkeys(("id", "group", "weight", "margin", "annotator", "strength", "context"))
    (row,) = read_preferences([write({**PAIR, **nothing})])
    assert (row.prompt.id, row.weight, row.margin, row.annotator) == ("rows:1", 1.0, None, None)


@pytest.mark.parametrize(
    ("strength", "choice", "turned"), [(1, 0, 9), (4, 0, 6), (5, "tie", 5), (6, 1, 4), (9, 1, 1)]
)
def test_strength_agrees_with_choice_and_follows_a_swap(
    write: Write, strength: int, choice: object, turned: int
) -> None:
    (row,) = read_preferences([write({**PAIR, "choice": choice, "strength": strength})])
    assert preference_to_row(row)["strength"] == strength
    assert preference_to_row(row.swap())["strength"] == turned
    assert preference_to_row(row.swap().swap())["strength"] == strength


def test_demonstrations_serve_as_prompts(write: Write) -> None:
    path = write({"input_text": "In", "output_text": "Out"})
    (prompt,) = read_prompts([path])
    assert prompt.meta == {"output_text": "Out"}
    assert prompt_to_row(prompt)["output_text"] == "Out"


def test_reads_gzip_skips_empty_lines_and_a_byte_order_mark(write: Write) -> None:
    path = write('\ufeff{"input_text": "a"}', "", "  ", {"input_text": "b"}, name="p.jsonl.gz")
    assert [(row.text, row.id) for row in read_prompts([path])] == [("a", "p:1"), ("b", "p:4")]


def test_reads_messages_in_either_dialect(write: Write) -> None:
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]
    openai = [{"role": role, "content": content, "name": None} for role, content in turns]
    gcpc = [{"author": role, "content": content} for role, content in turns]
    with_system = [{"role": "system", "content": "Be kind."}, *openai]
    path = write(
        {"messages": openai},
        {"messages": gcpc, "context": "Be kind."},
        {"messages": with_system, "input_text": None},
    )
    plain, context, system = read_prompts([path])
    assert [message.content for message in plain.messages] == ["Hi", "Yes?", "Bye"]
    assert context.messages == system.messages
    assert context.messages[0] == Message(Speaker.SYSTEM, "Be kind.")
    assert plain.group == context.group  # a system message makes no new prompt
    assert plain.text == "Bye"
    assert prompt_to_row(plain)["messages"][0] == {"role": "user", "content": "Hi"}


def test_default_group_ignores_case_and_space_only() -> None:
    def key(text: str, speaker: Speaker = Speaker.USER) -> str:
        return prompt_key(Prompt(messages=(Message(speaker, text),), id="", group=""))

    assert key("Add  two\nnumbers") == key(" add two numbers ")
    assert key("Add two numbers") != key("Add three numbers")
    assert key("Hi") != key("Hi", Speaker.ASSISTANT)


def test_default_ids_of_files_with_one_stem_differ(write: Write) -> None:
    first = write({"input_text": "a"}, name="one/rows.jsonl")
    second = write({"input_text": "b"}, name="two/rows.jsonl.gz")
    assert [row.id for row in read_prompts([first, second])] == ["rows:1", "rows#2:1"]


def test_candidates_may_stand_in_the_last_message(write: Write) -> None:
    turn = {"author": "user", "content": "Hi", "candidate_0": "a", "candidate_1": "b", "choice": 1}
    log = ReadLog()
    ((_, row),) = iter_preferences([write({"messages": [turn]})], log)
    assert (row.candidate_0, row.candidate_1, row.choice) == ("a", "b", Choice.SECOND)
    assert log.coerced == {"candidates and choice read from the last message": 1}
    both = refusal(read_preferences, write({"messages": [turn], "choice": 1}))
    assert "field 'choice': stands at the top level and in the last message; keep one" in both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": True}, "field 'choice': found true (a truth value); expected 0 or 1"),
        ({"choice": "0"}, "field 'choice': found \"0\" (a text); expected 0 or 1 (a number"),
        ({"choice": 2}, "field 'choice': found 2 (a number); expected 0 or 1"),
        ({"choice": 1.0}, "field 'choice': found 1.0 (a number)"),
        ({"choice": None}, "field 'choice': found null (nothing)"),
        ({"choice": [1]}, "field 'choice': found [1] (a list)"),
        ({"input_text": " \n"}, "field 'input_text': is empty; write its text or remove the row"),
        ({"input_text": 3}, "field 'input_text': found 3 (a number); expected a text in quotes"),
        ({"candidate_1": {"a": 1}}, "field 'candidate_1': found {\"a\":1} (an object)"),
        ({"candidate_0": ""}, "field 'candidate_0': is empty; write its text or remove the row"),
        ({"candidate_0": "Long."}, "field 'candidate_1': equals candidate_0, so that a choice"),
        ({"weight": 0}, "field 'weight': found 0 (a number); expected a number above 0"),
        ({"weight": True}, "field 'weight': found true (a truth value); expected a number above"),
        ({"margin": -1}, "field 'margin': found -1 (a number); expected a number of 0 or more"),
        ({"margin": "1"}, "field 'margin': found \"1\" (a text); expected a number of 0 or more"),
        ({"weight": 10**400}, "field 'weight': found 1000000"),
        ({"annotator": ["a"]}, "field 'annotator': found [\"a\"] (a list); expected a text or a"),
        ({"id": True}, "field 'id': found true (a truth value); expected a text or a whole number"),
        ({"group": ""}, "field 'group': found \"\" (a text); expected a text or a whole number"),
        ({"strength": 3}, "field 'strength': 3 contradicts choice 1 (a number): 1 to 4 prefer"),
        ({"strength": 10}, "field 'strength': found 10 (a number); expected a whole number from 1"),
        ({"strength": 7.5}, "field 'strength': found 7.5 (a number); expected a whole number"),
        ({"strength": True}, "field 'strength': found true (a truth value); expected a whole"),
        ({"context": "c"}, "field 'context': is read with messages only; put it into input_text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the row has input_text as well; keep"),
    ],
)
def test_a_faulty_value_is_named_with_file_line_and_remedy(
    write: Write, change: dict[str, object], message: str
) -> None:
    path = write(PAIR, {**PAIR, **change})
    text = refusal(read_preferences, path)
    assert text.startswith(f"{path}:2: ")
    assert message in text


@pytest.mark.parametrize("key", ["input_text", "candidate_0", "candidate_1", "choice"])
def test_a_missing_key_is_named(write: Write, key: str) -> None:
    row = {name: value for name, value in PAIR.items() if name != key}
    text = refusal(read_preferences, write(row))
    assert f":1: field '{key}': is missing" in text


def test_a_missing_key_comes_with_the_keys_that_are_there(write: Write) -> None:
    text = refusal(read_demonstrations, write({"input_text": "a", "output": "b"}))
    assert "field 'output_text': is missing; the row has 'input_text', 'output'; add" in text
    nothing = refusal(read_prompts, write({}))
    assert ":1: is in no known format of prompts; the row has no keys; name its columns" in nothing


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "field 'messages': found \"hi\" (a text); expected a list"),
        ([], "field 'messages': found [] (a list); expected a list"),
        (["hi"], "field 'messages[0]': found \"hi\" (a text); expected an object with role"),
        ([{"content": "x"}], "field 'messages[0].role': is missing; the message has 'content'"),
        ([{"role": "bot", "content": "x"}], "found \"bot\" (a text); expected 'system', 'user'"),
        ([{"author": 1, "content": "x"}], "field 'messages[0].author': found 1 (a number)"),
        ([{"role": "user"}], "field 'messages[0].content': found null (nothing); expected a text"),
        ([{"role": "user", "content": " "}], "field 'messages[0].content': found \" \" (a text)"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "the last message is the assistant's; end with the user's and put the answer into",
        ),
    ],
)
def test_faulty_messages_are_named(write: Write, messages: object, message: str) -> None:
    text = refusal(read_prompts, write({"messages": messages, "output_text": "z"}))
    assert ":1: field 'messages" in text
    assert message in text


def test_two_system_messages_are_refused(write: Write) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = refusal(read_prompts, write({"messages": turns, "context": "c"}))
    assert "field 'context': messages begin with a system message already; keep one" in text


def test_an_id_used_twice_names_both_lines(write: Write) -> None:
    first = write({"id": "x", "input_text": "a"}, name="one.jsonl")
    second = write({"input_text": "b"}, {"id": "x", "input_text": "c"}, name="two.jsonl")
    assert refusal(read_prompts, first, second) == (
        f"{second}:2: field 'id': 'x' is used twice (first at {first}:1); give each row its own"
    )


def test_a_file_given_twice_is_refused(write: Write) -> None:
    path = write({"input_text": "a"})
    again = path.parent / ".." / path.parent.name / path.name
    assert "the file is given twice; name it once" in refusal(read_prompts, path, again)


def test_meta_may_not_shadow_a_key_of_the_row(write: Write) -> None:
    message = (Message(Speaker.USER, "a"),)
    prompt = Prompt(messages=message, id="p", group="g", meta={"group": "other"})
    with pytest.raises(DataError, match="row 'p': meta may not hold 'group', a key of the row"):
        prompt_to_row(prompt)


def test_a_section_that_is_read_in_two_ways_is_refused(write: Write) -> None:
    path = str(write(PAIR))
    for source in (
        PreferenceSource(files=(path,), format="native", reader="a.py:f"),
        PreferenceSource(files=(path,), columns=PreferenceColumns(choice_values=("2", "2"))),
    ):
        with pytest.raises(RecipeError, match=r"remove one|two or three different texts"):
            list(iter_preferences(source, ReadLog()))


@pytest.mark.parametrize(
    ("row", "kind", "renamed"),
    [
        (
            {"prompt": "Q", "chosen": "A", "rejected": "B", "context": "c", "choice": 1},
            "preferences",
            {"other_context": "c", "other_choice": 1},
        ),
        ({"prompt": "Q", "completion": "A", "weight": 2}, "demonstrations", {"weight": 2}),
        ({"prompt": "Q", "output_text": "A", "messages": []}, "prompts", {"other_messages": []}),
    ],
)
def test_other_keys_that_a_native_row_of_the_kind_has_are_renamed(
    write: Write, row: dict[str, Any], kind: Kind, renamed: dict[str, Any]
) -> None:
    log = ReadLog()
    source = SourceConfig(files=(str(write(row)),), format="trl")
    ((_, item),) = iter_items(source, kind, log)
    prompt = item if isinstance(item, Prompt) else item.prompt
    kept = {"output_text": "A"} if kind == "prompts" else {}
    assert prompt.meta == {**kept, **renamed}
    assert sum(log.coerced.values()) == sum(name.startswith("other") for name in renamed)


def test_rows_of_an_array_on_one_line_have_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{**PAIR, "input_text": f"Question {n}"} for n in range(3)]
    path.write_text(json.dumps(rows))
    ids = [row.prompt.id for row in read_preferences([path])]
    assert ids == ["rows:1", "rows/2:1", "rows/3:1"]


@pytest.mark.parametrize("log", [ReadLog(), DroppingLog()])
def test_a_mapped_verdict_of_1_and_2_needs_its_meaning(write: Write, log: ReadLog) -> None:
    """With the 2 dropped, every label that is left would be the wrong way round."""
    rows = [{**PAIR, "choice": None, "label": label} for label in (1, 1, 2)]
    columns = PreferenceColumns(choice="label")
    source = PreferenceSource(files=(str(write(*rows)),), columns=columns)
    with pytest.raises(DataError, match=r":3: field 'label': found 2 .* choice_values = "):
        list(iter_preferences(source, log))
