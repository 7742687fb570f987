"""Every format: what it is recognised by, what it is read as, and what its faults say."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from amenable.data.formats.fields import checked_text
from amenable.data.formats.format import EVERYTHING
from amenable.data.formats.table import FORMATS, find_format, foreign
from amenable.data.reading.records import DroppingLog, ReadLog, Row
from amenable.data.schemas import Choice, Speaker
from amenable.errors import DataError, RecipeError

from .reading import read, write
from .samples import BYE, CHAT_PAIR, HI, HUMAN, PAIR, SAMPLES, said

WRITE_ONLY = {"gcpc", "gcpc-chat"}
RECORDS = [(name, record) for name, records in SAMPLES.items() for record in records]


# Recognising ----------------------------------------------------------------------------------


def test_every_format_that_is_recognised_has_a_sample() -> None:
    assert set(SAMPLES) == set(FORMATS) - WRITE_ONLY


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_one_format_and_no_other_fits_a_record(name: str, record: dict[str, Any]) -> None:
    assert [form.name for form in FORMATS.values() if form.fits(record)] == [name]


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_columns_that_a_table_adds_without_a_value_change_nothing(
    name: str, record: dict[str, Any]
) -> None:
    keys = ("label", "margin", "score_chosen", "response", "completions", "conversations")
    padded = {**dict.fromkeys(keys), **record}
    assert [form.name for form in FORMATS.values() if form.fits(padded)] == [name]


@pytest.mark.parametrize("name", SAMPLES)
def test_detected_file_reads_as_when_its_format_is_named(name: str, tmp_path: Path) -> None:
    kinds = {FORMATS[name].kind(record) for record in SAMPLES[name]}
    for kind in kinds:
        records = [one for one in SAMPLES[name] if FORMATS[name].kind(one) == kind]
        path = write(tmp_path, records)
        log = ReadLog()
        rows = read(kind, path, log=log)
        assert log.formats == {str(path): name}
        assert rows
        assert rows == read(kind, path, format=name)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_record_gives_a_prompt(name: str, tmp_path: Path) -> None:
    for record in SAMPLES[name]:
        prompts = read("prompts", write(tmp_path, [record]))
        assert prompts
        assert all(prompt.messages[-1].speaker is Speaker.USER for prompt in prompts)


def test_unknown_record_tells_its_keys_and_the_ways_out(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "x", "answer": "y"}])
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: is in no known format of preferences; the row has 'que"
    ):
        read("preferences", path)


def test_known_format_without_this_kind_says_which_it_has(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES["hh"])
    with pytest.raises(DataError, match=r"format 'hh'.*preferences and prompts but no demonstra"):
        read("demonstrations", path)
    with pytest.raises(DataError, match="the format 'hh' has no demonstrations"):
        read("demonstrations", path, format="hh")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"'hhh' is unknown; expected auto or one of alpaca, gc"):
        find_format("hhh")


@pytest.mark.parametrize(
    ("first", "second"), [("trl", "hh"), ("native", "trl"), ("hh", "oasst"), ("alpaca", "sharegpt")]
)
def test_mixed_formats_in_one_file_are_told_apart(first: str, second: str, tmp_path: Path) -> None:
    records = [SAMPLES[first][-1 if first == "alpaca" else 0], SAMPLES[second][0]]
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*this row looks like '{second}'"):
        read("preferences", write(tmp_path, records))


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_foreign_rows_are_those_of_another_format(name: str, record: dict[str, Any]) -> None:
    row = Row(record, "rows.jsonl", 2, "rows", ReadLog())
    for form in FORMATS.values():
        fault = foreign(row, form)
        if form.name == name:
            assert fault is None
        else:
            assert f"recognised as {form.name!r}, this row looks like {name!r}" in str(fault)
    assert foreign(Row({"x": 1}, "rows.jsonl", 2, "rows", ReadLog()), FORMATS["hh"]) is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_holds_only_what_there_is_a_word_for(form: Any) -> None:
    assert form.holds <= EVERYTHING
    assert form.description


# Reading --------------------------------------------------------------------------------------


def first(name: str, tmp_path: Path, kind: str = "preferences", place: int = 0) -> Any:
    records = SAMPLES[name] if FORMATS[name].answers else [SAMPLES[name][place]]
    return read(kind, write(tmp_path, records))[0]


@pytest.mark.parametrize(
    ("name", "place", "chosen", "rejected"),
    [
        ("openai-summarize", 0, " Cat.", " Dog."),
        ("openai-axis", 0, "Cat.", "Dog."),
        ("oasst", 0, "Hello!", "No."),
        ("sharegpt", 0, "Hello!", "No."),
        ("openai-preference", 0, "Hello!", "No."),
        ("ultrafeedback", 0, "Hello!", "No."),
        ("ultrafeedback-binarized", 0, "Hello!", "No."),
        ("helpsteer-preference", 0, "Hello!", "No."),
        ("helpsteer", 0, "Hello!", "No."),
        ("alpaca", 1, "Hello, Ann!", "No."),
        ("hh", 0, "Hello!", "No."),
        ("kto", 0, "Hello!", "No."),
        ("trl-chat", 0, "Hello!", "Go away."),
        ("trl-chat", 2, "Hello!", "Go away."),
        ("trl", 0, "Hello!", "Go away."),
        ("trl", 3, "Hello!", "No."),
    ],
)
def test_preference_of(name: str, place: int, chosen: str, rejected: str, tmp_path: Path) -> None:
    row = first(name, tmp_path, place=place)
    assert (row.chosen, row.rejected) == (chosen, rejected)


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("openai-axis", 4.0),
        ("oasst", None),
        ("ultrafeedback", 6.5),
        ("ultrafeedback-binarized", 6.5),
        ("helpsteer", 4.0),
        ("kto", None),
    ],
)
def test_ratings_give_a_margin_and_ranks_none(
    name: str, margin: float | None, tmp_path: Path
) -> None:
    assert first(name, tmp_path).margin == margin


def test_summaries_are_read_with_the_authors_queries(tmp_path: Path) -> None:
    row = first("openai-summarize", tmp_path)
    assert row.prompt.text == "SUBREDDIT: r/aww\n\nTITLE: Cats\n\nPOST: A cat.\n\nTL;DR:"
    assert (row.annotator, row.strength, row.prompt.group) == ("w1", 2, "t3_1")
    assert row.prompt.meta == {
        "info": {"title": "Cats", "subreddit": "aww"},
        "summaries": [{"policy": "ref", "note": None}, {"policy": "sup4", "note": "?"}],
        "batch": "b",
        "split": "train",
    }
    article = first("openai-axis", tmp_path).prompt
    assert article.text == "Article:\nA cat.\n\nTL;DR:\n"
    assert article.group == "a1"
    assert article.meta["info"] == {"site": "cnn", "title": "Cats"}


@pytest.mark.parametrize(
    ("confidence", "choice", "strength"),
    [(1, 0, 1), (9, 1, 9), (4, 0, 4), (6, 1, 6), (None, 1, None)],
)
def test_confidence_is_the_strength(
    confidence: int | None, choice: int, strength: int | None, tmp_path: Path
) -> None:
    record = {**SAMPLES["openai-summarize"][0], "choice": choice}
    record["extra"] = {"confidence": confidence}
    assert read("preferences", write(tmp_path, [record]))[0].strength == strength


def test_undecided_confidence_stays_in_meta(tmp_path: Path) -> None:
    record = {**SAMPLES["openai-summarize"][0], "extra": {"confidence": 5}}
    log = ReadLog()
    row = read("preferences", write(tmp_path, [record]), log=log)[0]
    assert (row.choice, row.strength) == (Choice.FIRST, None)
    assert row.prompt.meta["extra"] == {"confidence": 5}
    assert sum(log.coerced.values()) == 1


def test_scores_alone_are_no_preferences(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES["openai-axis"][:1])
    with pytest.raises(DataError, match="scores, not preferences"):
        read("preferences", path)


def test_trees_give_every_ranked_pair_with_its_history(tmp_path: Path) -> None:
    tree = copy.deepcopy(SAMPLES["oasst"][0])
    replies = tree["prompt"]["replies"]
    replies += [
        {"text": "Deleted.", "role": "assistant", "rank": 2, "deleted": True},
        {"text": "Refused.", "role": "assistant", "rank": 3, "review_result": False},
        {"text": "Unranked.", "role": "assistant"},
    ]
    replies[0]["replies"] = [
        {
            "message_id": "m1",
            "text": BYE,
            "role": "prompter",
            "replies": [
                {"text": text, "role": "assistant", "rank": rank}
                for rank, text in enumerate(["Goodbye!", "Bye.", "So long."])
            ],
        }
    ]
    log = ReadLog()
    path = write(tmp_path, [tree])
    rows = read("preferences", path, log=log)
    assert [(row.prompt.id, row.chosen, row.rejected) for row in rows] == [
        ("m0/0-1", "Hello!", "No."),
        ("m1/0-1", "Goodbye!", "Bye."),
        ("m1/0-2", "Goodbye!", "So long."),
        ("m1/1-2", "Bye.", "So long."),
    ]
    assert [turn.content for turn in rows[1].prompt.messages] == [HI, "Hello!", BYE]
    assert {row.prompt.group for row in rows} == {"m0"}
    assert sorted(log.dropped.values()) == [1, 1, 1]
    best_worst = read("preferences", path, pairs="best_worst")
    assert [(row.chosen, row.rejected) for row in best_worst][1] == ("Goodbye!", "So long.")
    answers = read("demonstrations", path)
    assert [(row.prompt.id, row.output_text) for row in answers] == [
        ("m0", "Hello!"),
        ("m1", "Goodbye!"),
    ]
    assert [prompt.text for prompt in read("prompts", path)] == [HI, BYE]


def test_dialogue_keeps_several_assistant_turns_at_its_end_in_the_answer(tmp_path: Path) -> None:
    record = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Here:\n\nAssistant:  Done.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    }
    row = read("preferences", write(tmp_path, [record]))[0]
    assert row.chosen == "Here:\n\nAssistant:  Done."
    assert row.prompt.text == "Hi"


def test_instruction_has_its_input_behind_an_empty_line(tmp_path: Path) -> None:
    record = {
        "instruction": HI,
        "input": "To Ann.",
        "output": "Hello!",
        "system": "Be kind.",
        "history": [["Who are you?", "A model."]],
    }
    prompt = read("demonstrations", write(tmp_path, [record]))[0].prompt
    assert [(turn.speaker.value, turn.content) for turn in prompt.messages] == [
        ("system", "Be kind."),
        ("user", "Who are you?"),
        ("assistant", "A model."),
        ("user", f"{HI}\n\nTo Ann."),
    ]


def test_only_the_last_answer_of_a_conversation_is_a_demonstration(tmp_path: Path) -> None:
    turns = [said("user", HI), said("assistant", "Hello!"), said("user", BYE)]
    record = {"messages": [*turns, said("assistant", "Goodbye!")]}
    (row,) = read("demonstrations", write(tmp_path, [record]))
    assert row.output_text == "Goodbye!"
    assert [turn.content for turn in row.prompt.messages] == [HI, "Hello!", BYE]


def test_context_is_the_system_message(tmp_path: Path) -> None:
    row = first("openai-messages", tmp_path, "demonstrations", 1)
    assert [turn.speaker.value for turn in row.prompt.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("value", "strength", "choice"),
    [(-3, 1, 0), (-2, 2, 0), (-1, 4, 0), (0, 5, "tie"), (1, 6, 1), (2, 8, 1), (3, 9, 1)],
)
def test_preference_strength(value: int, strength: int, choice: int | str, tmp_path: Path) -> None:
    record = {**SAMPLES["helpsteer-preference"][0], "preference_strength": value}
    row = read("preferences", write(tmp_path, [record]))[0]
    assert (row.strength, row.choice.value) == (strength, choice)


def test_equal_scores_of_the_binarised_shape_are_a_tie(tmp_path: Path) -> None:
    record = {**SAMPLES["ultrafeedback-binarized"][0], "score_rejected": 8.5}
    row = read("preferences", write(tmp_path, [record]))[0]
    assert (row.choice, row.margin) == (Choice.TIE, None)


def test_answers_without_a_score_are_left_out(tmp_path: Path) -> None:
    record = copy.deepcopy(SAMPLES["ultrafeedback"][0])
    record["completions"] += [{"response": "Hm.", "overall_score": "N/A"}]
    log = ReadLog()
    assert len(read("preferences", write(tmp_path, [record]), log=log)) == 1
    assert log.dropped == {"an answer without a score": 1}


@pytest.mark.parametrize(("label", "kept"), [("true", 1), ("False", 0), ("1", 1), ("0", 0)])
def test_labels_of_a_table_of_texts(label: str, kept: int, tmp_path: Path) -> None:
    other = "false" if kept else "true"
    lines = ["prompt,completion,label", f"{HI},Hello!,{label}", f"{HI},No.,{other}"]
    row = read("preferences", write(tmp_path, lines, "rows.csv"))[0]
    assert row.chosen == ("Hello!" if kept else "No.")


# Faults ---------------------------------------------------------------------------------------

MISSING = object()
JUNK: list[Any] = [MISSING, None, "", "  ", 7, True, [], [7], {}, {"x": 1}]
NEEDED = {
    "native": (0, ["input_text", "candidate_0", "candidate_1", "choice"]),
    "openai-summarize": (
        0,
        ["info", "info.post", "summaries", "summaries.0", "summaries.1.text", "choice"],
    ),
    "openai-axis": (0, ["info.article", "summary.text", "summary.axes", "summary.axes.overall"]),
    "oasst": (0, ["prompt.text", "prompt.role", "prompt.replies.0.text", "prompt.replies.1.role"]),
    "sharegpt": (
        0,
        ["conversations", "conversations.0", "conversations.0.from", "chosen", "rejected.value"],
    ),
    "openai-messages": (0, ["messages", "messages.1", "messages.1.role", "messages.2.content"]),
    "openai-preference": (0, ["input", "input.messages", "preferred_output.0.content"]),
    "ultrafeedback": (0, ["instruction", "completions", "completions.0", "completions.1.response"]),
    "ultrafeedback-binarized": (0, ["chosen", "rejected", "score_chosen", "score_rejected"]),
    "helpsteer-preference": (0, ["prompt", "response_1", "response_2", "preference_strength"]),
    "helpsteer": (0, ["prompt", "response", "helpfulness"]),
    "alpaca": (1, ["instruction", "chosen", "rejected"]),
    "hh": (0, ["chosen", "rejected"]),
    "kto": (0, ["prompt", "completion", "label"]),
    "trl-chat": (0, ["chosen", "rejected", "prompt.0", "chosen.0.content"]),
    "trl": (0, ["chosen", "rejected", "prompt"]),
}
ACCEPTED = {  # junk that is no fault, and why
    ("openai-summarize", "choice", 7),
    ("openai-axis", "summary.axes.overall", 7),  # a score of 7
    ("ultrafeedback-binarized", "score_chosen", 7),
    ("helpsteer", "helpfulness", 7),
    ("ultrafeedback-binarized", "score_rejected", 7),
    ("kto", "label", True),  # what it was
    ("ultrafeedback", "completions.0", MISSING),  # one answer is left, and counted
}


def spoil(record: dict[str, Any], way: str, junk: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    *steps, last = way.split(".")
    holder: Any = record
    for step in steps:
        holder = holder[int(step) if step.isdigit() else step]
    key: Any = int(last) if last.isdigit() else last
    if junk is MISSING:
        del holder[key]
    else:
        holder[key] = junk
    return record


@pytest.mark.parametrize(
    "junk", JUNK, ids=lambda junk: "missing" if junk is MISSING else repr(junk)
)
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, (_, ways) in NEEDED.items() for way in ways]
)
def test_fault_names_file_line_and_field(name: str, way: str, junk: Any, tmp_path: Path) -> None:
    if any((name, way) == one[:2] and junk is one[2] for one in ACCEPTED):
        pytest.skip("a value like any other")
    place, _ = NEEDED[name]
    good = SAMPLES[name][place]
    others = [one for one in SAMPLES[name] if one is not good] if FORMATS[name].answers else []
    kind = FORMATS[name].kind(good)
    path = write(tmp_path, [good, *others, spoil(good, way, junk)])
    with pytest.raises(DataError) as caught:
        read(kind, path, format=name)
    assert caught.value.path == str(path)
    assert caught.value.line == 2 + len(others)
    assert caught.value.field, str(caught.value)
    assert caught.value.field.split(".")[0].split("[")[0] in {*good, "prompt", "chosen"}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("native", {"choice": "0"}, "'choice': found \"0\" .a text.; expected 0 or 1"),
        ("native", {"choice": True}, "'choice': found true .a truth value.; expected 0 or 1"),
        ("native", {"choice": 0.0}, "'choice': found 0.0"),
        ("native", {"candidate_1": "Hello!"}, "'candidate_1': equals candidate_0"),
        ("native", {"candidate_1": ""}, "'candidate_1': is empty"),
        ("hh", {"rejected": SAMPLES["hh"][0]["chosen"]}, "equals chosen"),
        ("hh", {"chosen": f"\n\nHuman: {HI}"}, "ends with the human's turn"),
        ("hh", {"chosen": f"\n\nHuman: {HI}\n\nAssistant: "}, "its answer is empty"),
        ("hh", {"chosen": "\n\nHuman: \n\nAssistant: Hi"}, r"its turn 1 \(Human\) is empty"),
        ("hh", {"chosen": "\n\nAssistant: Hi"}, "has no turn of the human"),
        ("hh", {"chosen": "Note. \n\nHuman: Hi\n\nAssistant: Hi"}, "begins with 'Note. "),
        ("hh", {"chosen": "\n\nHuman: Who?\n\nAssistant: Hi"}, "differs from chosen before"),
        ("trl", {"rejected": "Hello!"}, "equals chosen"),
        ("trl-chat", {"chosen": [said("user", "x")]}, "the last message is the user's"),
        ("trl-chat", {"rejected": [said("user", "x"), *CHAT_PAIR["rejected"]]}, "differ from"),
        ("openai-summarize", {"choice": 2}, "'choice': found 2"),
        ("openai-summarize", {"choice": 1}, "'extra.confidence': 2 contradicts choice 1"),
        ("openai-summarize", {"extra": {"confidence": 10}}, "whole number from 1 to 9"),
        ("openai-summarize", {"extra": 3}, "'extra': found 3"),
        ("openai-summarize", {"summaries": [{"text": "x"}] * 2}, "the two texts are equal"),
        ("openai-summarize", {"summaries": [{"text": "x"}]}, "of 1 elements; expected a list of 2"),
        ("sharegpt", {"rejected": said("gpt", "Hello!", "from", "value")}, "equals chosen"),
        ("sharegpt", {"chosen": HUMAN}, "'chosen.from': is the user; expected 'gpt'"),
        ("sharegpt", {"conversations": [said("tool", "x", "from", "value")]}, 'found "tool"'),
        ("openai-preference", {"preferred_output": CHAT_PAIR["chosen"] * 2}, "found 2 messages"),
        ("ultrafeedback", {"completions": [{"response": "x"}]}, "expected one of overall_score"),
        ("ultrafeedback-binarized", {"score_chosen": 1.0}, "1 is below score_rejected 2"),
        ("helpsteer-preference", {"preference_strength": 4}, "from -3 to 3"),
        ("helpsteer-preference", {"response_2": "Hello!"}, "equals response_1"),
        ("alpaca", {"chosen": "A", "rejected": "A"}, "equals chosen"),
        ("alpaca", {"chosen": "A", "history": [["one"]]}, r"'history\[0\]': found .* two texts"),
        ("openai-preference", {"non_preferred_output": CHAT_PAIR["chosen"]}, "equals preferred_o"),
        ("openai-preference", {"input": {"messages": [said("system", "x")]}}, "is the system's"),
        ("ultrafeedback", {"completions": [{"score": 1}, {"rating": 2}]}, "completions.0..respon"),
        ("trl", {"prompt": [said("assistant", "x")]}, "the last message is the assistant's"),
        ("trl-chat", {"prompt": None}, "chosen has no message of the user before the answer"),
        (
            "trl-chat",
            {key: [said("user", "x"), *CHAT_PAIR[key]] for key in PAIR},
            "'prompt': differs from the messages that chosen begins with",
        ),
        ("trl", {"prompt": None}, "do not begin with a text that they share"),
        ("kto", {"label": "yes"}, "'label': found \"yes\""),
        ("kto", {"completion": [said("user", "x"), *CHAT_PAIR["chosen"]]}, "found 2 messages"),
    ],
)
def test_fault(name: str, record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, [{**SAMPLES[name][0], **record}])
    with pytest.raises(DataError, match=message):
        read("preferences", path, format=name)


def test_faults_of_conversations_that_are_no_demonstrations(tmp_path: Path) -> None:
    asked = SAMPLES["sharegpt"][0]
    with pytest.raises(DataError, match="the last message is the user's; expected the assistant's"):
        read("demonstrations", write(tmp_path, [asked]))
    alone = {"messages": [said("assistant", "Hi")]}
    with pytest.raises(DataError, match="'messages': the message to be answered is missing"):
        read("demonstrations", write(tmp_path, [alone]))
    twice = {**SAMPLES["openai-messages"][0], "context": "Be kind."}
    with pytest.raises(DataError, match="'context': messages begin with a system message"):
        read("demonstrations", write(tmp_path, [twice]))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rank": "best"}, r"prompt.replies\[1\].rank"),
        ({"rank": True}, r"prompt.replies\[1\].rank"),
        ({"role": "bot"}, r"prompt.replies\[1\].role"),
        ({"replies": 3}, r"prompt.replies\[1\].replies"),
    ],
)
def test_faults_of_trees(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    tree = copy.deepcopy(SAMPLES["oasst"][0])
    tree["prompt"]["replies"][1] |= change
    with pytest.raises(DataError, match=f"rows.jsonl:1: field '{field}'"):
        read("preferences", write(tmp_path, [tree]))


def test_replies_of_a_prompter_and_single_ranks_make_no_pair(tmp_path: Path) -> None:
    tree = copy.deepcopy(SAMPLES["oasst"][0])
    tree["prompt"]["replies"][1]["role"] = "prompter"
    log = ReadLog()
    assert not read("preferences", write(tmp_path, [tree]), log=log)
    assert log.dropped == {"the only ranked reply to its message, so that it makes no pair": 1}


def test_one_scored_answer_makes_no_pair(tmp_path: Path) -> None:
    record = copy.deepcopy(SAMPLES["ultrafeedback"][0])
    record["completions"].pop()
    log = ReadLog()
    assert not read("preferences", write(tmp_path, [record, SAMPLES["native"][0]][:1]), log=log)
    assert list(log.dropped) == [
        "a prompt with fewer than two scored answers: scores, not preferences"
    ]


def test_dialogue_may_begin_without_its_empty_line(tmp_path: Path) -> None:
    record = {key: text.lstrip() for key, text in SAMPLES["hh"][0].items()}
    log = ReadLog()
    assert read("preferences", write(tmp_path, [record]), log=log)[0].prompt.text == HI
    assert log.coerced == {"dialogue without the empty line before its first turn": 2}


def test_system_message_of_a_conversation_stands_apart(tmp_path: Path) -> None:
    record = {**SAMPLES["sharegpt"][1], "system": "Be kind."}
    (row,) = read("demonstrations", write(tmp_path, [record]))
    assert row.prompt.messages[0].content == "Be kind."


def test_half_a_surrogate_pair_is_no_text() -> None:
    row = Row({}, "rows.jsonl", 4, "rows", ReadLog())
    with pytest.raises(DataError, match=r"rows.jsonl:4: field 'a.b': has half a surrogate pair"):
        checked_text(row, "a.b", "\ud83d")


def test_lone_surrogates_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    for name, (place, ways) in NEEDED.items():
        good = SAMPLES[name][place]
        for way in ways:
            bad = spoil(good, way, "half \ud83d pair")
            with pytest.raises(DataError, match=r"rows.jsonl:1"):
                read(FORMATS[name].kind(good), write(tmp_path, [bad]), format=name)


def test_faulty_rows_are_dropped_and_counted_where_the_log_says_so(tmp_path: Path) -> None:
    good = SAMPLES["hh"][0]
    ending = {**good, "chosen": f"\n\nHuman: {HI}"}
    log = DroppingLog()
    assert len(read("preferences", write(tmp_path, [good, ending, good]), log=log)) == 2
    assert sum(log.dropped.values()) == 1
    assert PAIR["chosen"] == "Hello!"


# Neighbours of the known shapes -----------------------------------------------------------------


def turns_of(row: Any) -> list[tuple[str, str]]:
    prompt = getattr(row, "prompt", row)
    return [(turn.speaker.value, turn.content) for turn in prompt.messages]


@pytest.mark.parametrize("key", ["question", "input", "query"])
def test_a_question_is_the_prompt_of_a_pair(key: str, tmp_path: Path) -> None:
    pair = {"chosen": "The answer is 4.", "rejected": "The answer is 5."}
    log = ReadLog()
    path = write(tmp_path, [{"system": "Be kind.", key: "2 + 2?", **pair}, {key: "1?", **pair}])
    first, second = read("preferences", path, log=log)
    assert turns_of(first) == [("system", "Be kind."), ("user", "2 + 2?")]
    assert turns_of(second) == [("user", "1?")]
    assert (first.chosen, first.rejected, first.prompt.meta) == (*pair.values(), {})
    assert log.coerced == {f"{key} read as the prompt": 2}
    assert [turns_of(prompt) for prompt in read("prompts", path)] == [
        turns_of(first),
        turns_of(second),
    ]


@pytest.mark.parametrize("key", ["context", "document", "system", "history"])
def test_no_prompt_is_made_up_where_another_text_stands(key: str, tmp_path: Path) -> None:
    record = {key: "Who?", "chosen": "The answer is 4.", "rejected": "The answer is 5."}
    path = write(tmp_path, [record])
    with pytest.raises(DataError, match=r"is in no known format .*name its columns"):
        read("preferences", path)
    assert read("preferences", path, format="trl")[0].prompt.text == "The answer is"


def test_dialogues_with_carriage_returns(tmp_path: Path) -> None:
    record = {key: text.replace("\n", "\r\n") for key, text in SAMPLES["hh"][0].items()}
    log = ReadLog()
    path = write(tmp_path, [record])
    assert read("preferences", path, log=log) == read("preferences", write(tmp_path, SAMPLES["hh"]))
    assert log.formats == {str(path): "hh"}
    assert sum(log.coerced.values()) == 2


@pytest.mark.parametrize(
    ("asked", "before", "expected"),
    [
        (["system", "user"], ["user"], ["system", "user"]),
        (["user"], ["system", "user"], ["system", "user"]),
        (["user", "assistant", "user"], ["user"], ["user", "assistant", "user"]),
        (["system", "user"], [], ["system", "user"]),
        (["user"], ["user"], ["user"]),
    ],
)
def test_the_longer_of_prompt_and_beginning_is_the_prompt(
    asked: list[str], before: list[str], expected: list[str], tmp_path: Path
) -> None:
    record = {
        "prompt": [said(speaker, "x") for speaker in asked],
        **{
            key: [*(said(speaker, "x") for speaker in before), *CHAT_PAIR[key]]
            for key in ("chosen", "rejected")
        },
    }
    (row,) = read("preferences", write(tmp_path, [record]))
    assert [speaker for speaker, _ in turns_of(row)] == expected


def test_prompt_and_beginning_that_differ_are_a_fault(tmp_path: Path) -> None:
    sides = {
        key: [said("system", "B"), said("user", HI), *CHAT_PAIR[key]]
        for key in ("chosen", "rejected")
    }
    path = write(tmp_path, [{"prompt": [said("system", "A"), said("user", HI)], **sides}])
    with pytest.raises(DataError, match="'prompt': differs from the messages that chosen begins"):
        read("preferences", path)


@pytest.mark.parametrize("name", ["trl", "trl-chat", "kto", "sharegpt"])
def test_system_is_the_system_message(name: str, tmp_path: Path) -> None:
    records = SAMPLES["kto"] if name == "kto" else SAMPLES[name][:1]
    path = write(tmp_path, [{"system": "Be kind.", **record} for record in records])
    (row,) = read("preferences", path)
    assert turns_of(row) == [("system", "Be kind."), ("user", HI)]
    assert row.prompt.meta == {}


@pytest.mark.parametrize(
    ("name", "key", "turns", "kind"),
    [
        ("sharegpt", "conversations", [said("system", "A", "from", "value"), HUMAN], "prompts"),
        ("trl-chat", "prompt", [said("system", "A"), said("user", HI)], "preferences"),
        ("native", "messages", [said("system", "A"), said("user", HI)], "prompts"),
    ],
)
def test_two_system_messages_are_a_fault(
    name: str, key: str, turns: Any, kind: str, tmp_path: Path
) -> None:
    system = "context" if name == "native" else "system"
    sides = CHAT_PAIR if kind == "preferences" else {}
    path = write(tmp_path, [{key: turns, system: "B", **sides}])
    with pytest.raises(DataError, match=f"'{system}': messages begin with a system message alre"):
        read(kind, path, format=name)


def test_an_answer_of_weight_0_is_no_demonstration(tmp_path: Path) -> None:
    turns = [said("user", HI), {**said("assistant", "Hello!"), "weight": 0}]
    kept = [*turns, said("user", BYE), {**said("assistant", "Goodbye!"), "weight": 1}]
    spoken = [HUMAN, {**said("gpt", "Hello!", "from", "value"), "weight": 0}]
    log = ReadLog()
    path = write(tmp_path, [{"messages": turns}, {"messages": kept}])
    (row,) = read("demonstrations", path, log=log)
    assert row.output_text == "Goodbye!"
    assert log.dropped == {"an answer of weight 0, which is not to be learnt": 1}
    other = ReadLog()
    assert not read("demonstrations", write(tmp_path, [{"conversations": spoken}]), log=other)
    assert other.dropped == log.dropped


def test_other_keys_of_messages_are_counted_and_calls_are_faults(tmp_path: Path) -> None:
    answer = said("assistant", "Hello!")
    log = ReadLog()
    named = {**said("user", HI), "name": "Ann", "tool_calls": None}
    read("demonstrations", write(tmp_path, [{"messages": [named, answer]}]), log=log)
    assert log.coerced == {"other keys of a message left out, such as a name": 1}
    calling = {**answer, "tool_calls": [{"id": "1"}]}
    path = write(tmp_path, [{"messages": [said("user", HI), calling]}])
    with pytest.raises(DataError, match=r"'messages\[1\].tool_calls': calls of tools are not read"):
        read("demonstrations", path)


def test_a_verdict_is_not_passed_over_by_a_named_format(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES["kto"])
    with pytest.raises(DataError, match=r"'label': is a verdict on the completion; .*'kto'"):
        read("demonstrations", path, format="trl")


@pytest.mark.parametrize(
    ("name", "change", "margin"),
    [
        ("ultrafeedback-binarized", {"score_chosen": -1.0, "score_rejected": -3.5}, 2.5),
        ("ultrafeedback-binarized", {"score_chosen": "7.5", "score_rejected": " 2"}, 5.5),
        ("helpsteer", {"helpfulness": "4"}, 4.0),
    ],
)
def test_scores_of_any_sign_and_as_texts(
    name: str, change: dict[str, Any], margin: float, tmp_path: Path
) -> None:
    first, *others = SAMPLES[name]
    log = ReadLog()
    (row,) = read("preferences", write(tmp_path, [{**first, **change}, *others]), log=log)
    assert row.margin == margin
    assert sum(log.coerced.values()) == sum(isinstance(one, str) for one in change.values())


@pytest.mark.parametrize("text", ["7,5", "nan", "inf", "1_0", "0x1", "seven"])
def test_texts_that_are_no_scores(text: str, tmp_path: Path) -> None:
    record = {**SAMPLES["ultrafeedback-binarized"][0], "score_chosen": text}
    with pytest.raises(DataError, match=r"'score_chosen': found .* expected a number"):
        read("preferences", write(tmp_path, [record]))


def test_whole_numbers_with_a_point_are_labels_and_strengths(tmp_path: Path) -> None:
    log = ReadLog()
    kto = [{**record, "label": float(record["label"])} for record in SAMPLES["kto"]]
    (row,) = read("preferences", write(tmp_path, kto), log=log)
    assert (row.chosen, sum(log.coerced.values())) == ("Hello!", 2)
    pair = {**SAMPLES["helpsteer-preference"][0], "preference_strength": -2.0}
    assert read("preferences", write(tmp_path, [pair]))[0].strength == 2
    half = {**pair, "preference_strength": -1.5}
    with pytest.raises(DataError, match=r"found -1\.5"):
        read("preferences", write(tmp_path, [half]))


@pytest.mark.parametrize("write_cell", [json.dumps, repr])
def test_conversations_in_cells_of_csv_are_read(write_cell: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    record = SAMPLES["trl-chat"][0]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(record)
        table.writerow(map(write_cell, record.values()))
    log = ReadLog()
    (row,) = read("preferences", path, log=log)
    assert (row.chosen, row.rejected, row.prompt.text) == ("Hello!", "Go away.", HI)
    assert log.formats == {str(path): "trl-chat"}
    assert log.coerced == {"text of a list of messages read as the list (CSV)": 3}


def test_cells_that_are_no_conversations_stay_or_are_faults(tmp_path: Path) -> None:
    lines = ["prompt,completion", f"{HI},[1] Hello!", f'{HI},"[{{""role"": 1 ""content"": 2}}]"']
    path = write(tmp_path, lines, "rows.csv")
    with pytest.raises(DataError, match=r"rows.csv:3: field 'completion': begins as a list of mes"):
        read("demonstrations", path)
    assert len(read("demonstrations", path, log=DroppingLog())) == 1
