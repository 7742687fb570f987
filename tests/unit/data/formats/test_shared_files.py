"""Real files, as their publishers wrote them, and the clean files that were made of them.

They lie beside the repository and are never copied into it; without them the tests are skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from amenable.config.data import DemonstrationColumns, PreferenceColumns, PromptColumns
from amenable.data.reading.records import ReadLog
from amenable.data.schemas import Demonstration, Message, Preference, Speaker

from .reading import read

ROOT = Path(__file__).parents[4]
SHARED = ROOT.parent / "shared" / "data"
READERS = ROOT / "examples" / "readers"

pytestmark = pytest.mark.skipif(
    not (SHARED / "README.md").exists(), reason=f"the shared files are not in {SHARED}"
)

LLMBAR = PreferenceColumns(
    input_text="input",
    candidate_0="output_1",
    candidate_1="output_2",
    choice="label",
    choice_values=("1", "2"),
)


class File(NamedTuple):
    """A file: what the README says of it, and how and as what it is read."""

    path: str
    readme: int
    kind: str
    rows: int
    how: str = "auto"
    why: str = ""
    records: int | None = None
    dropped: dict[str, int] = {}  # noqa: RUF012 - a literal table
    columns: Any = None

    def read(self) -> tuple[list[Any], ReadLog]:
        keys: dict[str, Any] = {}
        if self.columns is not None:
            keys = {"columns": self.columns}
        elif self.how.startswith("reader "):
            keys = {"reader": f"{READERS}/{self.how.removeprefix('reader ')}"}
        log = ReadLog()
        return read(self.kind, SHARED / self.path, log=log, **keys), log


HH = "native/hh-rlhf/harmless-base.test.jsonl.gz"
OASST = "native/oasst/en_100_tree.jsonl.gz"
SHAREGPT = "native/sharegpt_dpo/dpo_en_demo.first120.json.gz"
FEEDBACK = "native/summarize_from_feedback"
SEVERAL = "a record gives several rows"
FILES = [
    File(HH, 1063, "preferences", 1063, "hh"),
    File(HH, 1063, "prompts", 1063, "hh"),
    File(
        OASST,
        47,
        "preferences",
        337,
        "oasst",
        f"{SEVERAL}: every two ranked replies to one message",
        dropped={"a reply without a rank": 22},
    ),
    File(
        OASST,
        47,
        "demonstrations",
        99,
        "oasst",
        f"{SEVERAL}: the best-ranked reply to each message that has ranked ones",
        dropped={"a reply without a rank": 22},
    ),
    File(OASST, 47, "prompts", 204, "oasst", f"{SEVERAL}: every message of a prompter"),
    File(SHAREGPT, 120, "preferences", 120, "sharegpt"),
    File(SHAREGPT, 120, "prompts", 120, "sharegpt"),
    File(f"{FEEDBACK}/comparison.example.jsonl", 1, "preferences", 1, "openai-summarize"),
    File(f"{FEEDBACK}/axis_eval.example.jsonl", 1, "prompts", 1, "openai-axis"),
    *(
        File(f"native/llmbar/{name}.json", rows, "preferences", rows, "column map", columns=LLMBAR)
        for name, rows in {
            "natural": 35,
            "adversarial-manual": 21,
            "adversarial-neighbor": 64,
            "adversarial-gptinst": 39,
            "adversarial-gptout": 24,
        }.items()
    ),
    File(
        "native/mt_bench/question.jsonl",
        41,
        "prompts",
        41,
        "column map",
        columns=PromptColumns(input_text="turns.0", id="question_id"),
    ),
    File(
        "native/pandalm/testset-v1.json.gz",
        473,
        "preferences",
        396,
        "reader pandalm.py:pairs",
        "31 pairs with an empty response and 46 without a majority are left out",
        dropped={"a response is empty or no text": 31, "no majority for either response": 46},
    ),
    *(
        File(
            f"native/summedits/summedits_{name}.json.gz",
            records,
            "preferences",
            rows,
            "reader summedits.py:pairs",
            "two records make a row: one for each inconsistent summary",
        )
        for name, records, rows in (("scitldr", 466, 321), ("sales_email", 613, 434))
    ),
    *(
        File(
            f"native/scitldr/SciTLDR-A.{name}.jsonl.gz",
            rows,
            "demonstrations",
            rows,
            "reader scitldr.py:demonstrations",
        )
        for name, rows in (("train", 1984), ("dev", 618))
    ),
    File(
        "native/self_instruct/seed_tasks.jsonl",
        82,
        "demonstrations",
        82,
        "reader self_instruct.py:demonstrations",
    ),
    *(
        File(f"pref/{name}", rows, "preferences", rows, "native")
        for name, rows in {
            "hh_harmless.jsonl.gz": 1063,
            "summedits_scitldr.jsonl.gz": 321,
            "summedits_sales_email.jsonl.gz": 434,
            "pandalm.jsonl": 396,
            "llmbar.jsonl": 183,
            "oasst.jsonl.gz": 337,
        }.items()
    ),
    *(
        File(f"sft/{name}", rows, "demonstrations", rows, "native")
        for name, rows in {
            "scitldr_train.jsonl.gz": 1984,
            "scitldr_dev.jsonl.gz": 618,
            "oasst_best.jsonl": 99,
            "rustsec_titles.jsonl": 448,
            "tldr_pages.jsonl.gz": 2414,
            "self_instruct_human.jsonl": 214,
            "aesop_morals.jsonl": 147,
            "docstrings.jsonl.gz": 2780,
        }.items()
    ),
    File("prompts/mt_bench.jsonl", 41, "prompts", 41, "native"),
    File(
        "labelled/sentence_polarity.jsonl.gz",
        4768,
        "prompts",
        4768,
        "column map",
        columns=PromptColumns(input_text="text"),
    ),
]


def test_every_shared_file_is_in_the_table() -> None:
    folders = ("native", "pref", "sft", "prompts", "labelled")
    there = {
        str(path.relative_to(SHARED))
        for folder in folders
        for path in (SHARED / folder).rglob("*")
        if path.is_file()
    }
    assert there == {file.path for file in FILES} | {f"{FEEDBACK}/axis_eval.example.jsonl"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.path}-{file.kind}")
def test_rows_and_drops_of(file: File) -> None:
    rows, log = file.read()
    assert log.records == file.readme
    assert len(rows) == log.rows == file.rows
    assert log.dropped == file.dropped
    assert (file.rows == file.readme) is (not file.why)
    (how,) = log.formats.values()
    assert how.replace(f"{READERS}/", "") == file.how


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.path}-{file.kind}")
def test_readme_counts(file: File) -> None:
    table = (SHARED / "README.md").read_text(encoding="utf-8")
    assert f"| `{file.path}` | {file.readme} |" in table


# Clean twins ----------------------------------------------------------------------------------


def flat(messages: Iterable[Message], names: dict[Speaker, str] | None) -> str:
    turns = list(messages)
    if names is None or (len(turns) == 1 and names[Speaker.USER] != "Human: "):
        return turns[-1].content.strip()
    text = "\n\n".join(names[turn.speaker] + turn.content for turn in turns)
    return text if names[Speaker.USER] == "User: " else f"{text}\n\nAssistant:"


HUMAN = {Speaker.USER: "Human: ", Speaker.ASSISTANT: "Assistant: "}
USER = {Speaker.USER: "User: ", Speaker.ASSISTANT: "Assistant: "}


def said(row: Any, names: dict[Speaker, str] | None) -> tuple[str, ...]:
    """Input, preferred and other text, or input and output, outer white space apart."""
    text = flat(row.prompt.messages, names).strip()
    if isinstance(row, Demonstration):
        return text, row.output_text.strip()
    assert isinstance(row, Preference)
    return text, row.chosen.strip(), row.rejected.strip()


def rows_of(*parts: str, kind: str) -> list[Any]:
    return [
        row
        for file in FILES
        if file.kind == kind and any(file.path.startswith(part) for part in parts)
        for row in file.read()[0]
    ]


@pytest.mark.parametrize(
    ("clean", "native", "kind", "names"),
    [
        ("pref/hh_harmless.jsonl.gz", HH, "preferences", HUMAN),
        ("pref/oasst.jsonl.gz", OASST, "preferences", USER),
        ("pref/llmbar.jsonl", "native/llmbar/", "preferences", None),
        ("pref/pandalm.jsonl", "native/pandalm/", "preferences", None),
        (
            "pref/summedits_scitldr.jsonl.gz",
            "native/summedits/summedits_scitldr",
            "preferences",
            None,
        ),
        (
            "pref/summedits_sales_email.jsonl.gz",
            "native/summedits/summedits_sales",
            "preferences",
            None,
        ),
        ("sft/oasst_best.jsonl", OASST, "demonstrations", USER),
        ("sft/scitldr_train.jsonl.gz", "native/scitldr/SciTLDR-A.train", "demonstrations", None),
        ("sft/scitldr_dev.jsonl.gz", "native/scitldr/SciTLDR-A.dev", "demonstrations", None),
    ],
)
def test_clean_file_equals_our_reading_of_its_source(
    clean: str, native: str, kind: str, names: dict[Speaker, str] | None
) -> None:
    ours = Counter(said(row, names) for row in rows_of(native, kind=kind))
    theirs = Counter(said(row, None) for row in rows_of(clean, kind=kind))
    assert ours == theirs


def test_seed_tasks_are_the_clean_rows_of_that_source() -> None:
    """The clean file has 132 rows of another file, which is not among the native ones."""
    ours = {said(row, None) for row in rows_of("native/self_instruct", kind="demonstrations")}
    clean = rows_of("sft/self_instruct", kind="demonstrations")
    theirs = {said(row, None) for row in clean if row.prompt.id.startswith("seed_task")}
    assert ours == theirs
    assert sum(row.prompt.id.startswith("user_oriented") for row in clean) == 132


def test_prompts_equal_the_first_turns() -> None:
    ours = [prompt.text for prompt in rows_of("native/mt_bench", kind="prompts")]
    assert ours == [prompt.text for prompt in rows_of("prompts/mt_bench", kind="prompts")]


def test_labels_name_columns_that_stay_in_meta() -> None:
    assert DemonstrationColumns() == DemonstrationColumns(input_text="")
    rows = rows_of("labelled/", kind="prompts")
    assert Counter(row.meta["label"] for row in rows).keys() == {0, 1}
