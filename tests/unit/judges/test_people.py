"""The sheet: blind, sides drawn, never overwritten, read back whatever a spreadsheet did to it."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import DataError, StageError
from amenable.judges.asking import Pair, ask_both_orders
from amenable.judges.people import SheetJudge
from amenable.judges.store import ReplyStore
from amenable.judges.types import Verdict


def pairs(count: int, better: str = "good") -> list[Pair]:
    return [
        Pair(
            Prompt(messages=(Message(Speaker.USER, f"Ask {n}."),), id=str(n), group=str(n)),
            f"bad {n}",
            f"{better} {n}",
        )
        for n in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path):
    store = ReplyStore(tmp_path / "replies.sqlite")
    yield store
    store.close()


def ask(sheet: Path, store: ReplyStore, asked: list[Pair]):
    return ask_both_orders(SheetJudge(sheet), asked, store)


def read(sheet: Path) -> list[dict[str, str]]:
    with sheet.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fill(sheet: Path, rows: list[dict[str, str]], delimiter: str = ",", bom: str = "") -> None:
    with sheet.open("w", newline="", encoding="utf-8") as file:
        file.write(bom)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(("delimiter", "bom"), [(",", ""), (";", "\ufeff")])
def test_both_orders_are_answered_by_one_row(
    tmp_path: Path, store: ReplyStore, delimiter: str, bom: str
) -> None:
    sheet = tmp_path / "sheet.csv"
    with pytest.raises(StageError, match="40 pairs"):
        ask(sheet, store, pairs(40))
    rows = read(sheet)
    assert len(rows) == 40
    assert 8 < sum(row["A"].startswith("good") for row in rows) < 32, "sides are drawn"
    random.Random(0).shuffle(rows)
    for row in rows:
        row["better"] = " a" if row["A"].startswith("good") else "B "
    rows[3]["better"], rows[3]["why"] = "Both-bad", "neither"
    fill(sheet, rows, delimiter, bom)
    found = ask(sheet, store, pairs(40))
    assert (len(found.looks), found.unanswered) == (80, [])
    for look in found.looks:
        if look.reply.verdict is Verdict.BOTH_BAD:
            assert look.reply.text == "neither"
            continue
        assert look.reply.verdict is (Verdict.FIRST if look.swapped else Verdict.SECOND)


def test_what_is_not_filled_in_is_told_and_what_is_new_is_added(
    tmp_path: Path, store: ReplyStore
) -> None:
    sheet = tmp_path / "sheet.csv"
    with pytest.raises(StageError):
        ask(sheet, store, pairs(3))
    rows = read(sheet)
    rows[0]["better"] = "A"
    fill(sheet, rows)
    found = ask(sheet, store, pairs(5))
    assert (len(found.looks), len(found.unanswered)) == (2, 8)
    again = read(sheet)
    assert again[:3] == rows, "what people wrote stays"
    assert len(again) == 5


def test_a_verdict_that_is_none_is_refused(tmp_path: Path, store: ReplyStore) -> None:
    sheet = tmp_path / "sheet.csv"
    with pytest.raises(StageError):
        ask(sheet, store, pairs(3))
    rows = read(sheet)
    rows[1]["better"] = "C"
    fill(sheet, rows)
    with pytest.raises(DataError, match=r"csv:3: field 'better': found 'C'; expected A"):
        ask(sheet, store, pairs(3))


def test_a_sheet_without_its_columns_is_refused(tmp_path: Path, store: ReplyStore) -> None:
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="columns row and better are needed"):
        ask(sheet, store, pairs(3))


def test_no_cell_is_a_formula(tmp_path: Path, store: ReplyStore) -> None:
    sheet = tmp_path / "sheet.csv"
    with pytest.raises(StageError):
        ask(sheet, store, pairs(4, better="=HYPERLINK(1)"))
    shown = {row[side] for row in read(sheet) for side in "AB"}
    assert not any(cell.startswith("=") for cell in shown)
    assert any(cell.startswith("'=HYPERLINK") for cell in shown)


def test_one_sheet_holds_several_comparisons(tmp_path: Path, store: ReplyStore) -> None:
    sheet = tmp_path / "sheet.csv"
    one, other = pairs(3), pairs(3, better="best")
    with pytest.raises(StageError, match="6 pairs"):
        ask(sheet, store, [*one, *other])
    before = sheet.read_bytes()
    assert len(read(sheet)) == 6
    for asked in (one, other):
        with pytest.raises(StageError, match="3 pairs"):
            ask(sheet, store, asked)
    assert sheet.read_bytes() == before
