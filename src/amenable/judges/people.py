"""People as a judge: a blind sheet to fill in, read back by the same command.

Every pair stands in it once, under no name, its sides drawn by a hash. The other order of a pair
is answered by the same row, so that a person's liking for a side cancels over the pairs, not within
each, and cannot be told from these verdicts.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amenable.artifacts import write_text
from amenable.errors import DataError, StageError
from amenable.judges.types import Keep, Question, Reply, Verdict

COLUMNS = ("row", "prompt", "A", "B", "better", "why")
ANSWERS = {
    "a": Verdict.FIRST,
    "b": Verdict.SECOND,
    "tie": Verdict.TIE,
    "both bad": Verdict.BOTH_BAD,
}
"""What may stand under `better`, in any case."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A cell that begins so is a formula to spreadsheets; an apostrophe before it makes it text."""


class SheetJudge:
    """Whoever fills in the sheet.

    Args:
        path: of the sheet, CSV in UTF-8; written where it is not there, never overwritten but to
            add pairs that it lacks.
    """

    identity: Mapping[str, Any] | None = None

    def __init__(self, path: Path) -> None:
        self.name = "people"
        self._path = path

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        """Answer from the sheet, which gets the pairs that it lacks; see `Judge`.

        Raises:
            StageError: the sheet has just been written, or nothing in it is filled in.
            DataError: a verdict is none, or a row of another comparison.
        """
        pairs = _pairs(questions)
        filled = self._filled(pairs)
        if missing := [name for name in pairs if name not in filled]:
            self._add(pairs, missing)
        verdicts = {name: row for name, row in filled.items() if row is not None}
        if not verdicts:
            raise StageError(
                f"{self._path} waits for people: {len(pairs)} pairs, under `better` A, B, tie or "
                "both bad; then run the same command again"
            )
        unanswered = []
        for number, question in enumerate(questions):
            name, turned = _row_name(question)
            if name not in verdicts:
                unanswered.append(f"{self._path}: row {name} is not filled in")
                continue
            verdict, why = verdicts[name]
            keep(number, Reply(_turned(verdict) if turned else verdict, why))
        return unanswered

    def _filled(self, pairs: Mapping[str, Question]) -> dict[str, tuple[Verdict, str] | None]:
        """Verdict and reason by row; None: still empty. Rows of other pairs are left alone."""
        found: dict[str, tuple[Verdict, str] | None] = {}
        for line, row in _read(self._path):
            name, said = row["row"].strip(), row["better"].strip()
            verdict = ANSWERS.get(" ".join(said.lower().replace("-", " ").split()))
            if said and verdict is None:
                raise DataError(
                    f"found {said!r}; expected A, B, tie or both bad",
                    path=str(self._path),
                    line=line,
                    field="better",
                )
            if name in pairs:
                found[name] = None if verdict is None else (verdict, row.get("why") or "")
        return found

    def _add(self, pairs: Mapping[str, Question], names: Iterable[str]) -> None:
        """Write rows behind those that are there, which stay as they are."""
        text = io.StringIO()
        writer = csv.writer(text)
        if not self._path.is_file():
            writer.writerow(COLUMNS)
        for name in sorted(names):
            asked = pairs[name]
            prompt = "\n\n".join(message.content for message in asked.prompt.messages)
            cells = (prompt, asked.first, asked.second)
            writer.writerow([name, *(_as_text(cell) for cell in cells), "", ""])
        before = self._path.read_text(encoding="utf-8-sig") if self._path.is_file() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        write_text(self._path, before + text.getvalue())


def _pairs(questions: Sequence[Question]) -> dict[str, Question]:
    """By row, as the sheet shows them."""
    found = {}
    for question in questions:
        name, turned = _row_name(question)
        shown = Question(question.prompt, question.second, question.first)
        found[name] = shown if turned else question
    return found


def _row_name(question: Question) -> tuple[str, bool]:
    """Of the pair whatever its order, and whether the sheet shows the second answer first."""
    texts = sorted((question.first, question.second))
    prompt = "\0".join(message.content for message in question.prompt.messages)
    digest = hashlib.sha256("\0".join([prompt, *texts]).encode()).digest()
    first_in_sheet = texts[digest[-1] % 2]
    return digest[:6].hex(), first_in_sheet != question.first


def _turned(verdict: Verdict) -> Verdict:
    sides = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}
    return sides.get(verdict, verdict)


def _as_text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _read(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The sheet's rows with the lines where they end; spreadsheets may have put `;` for `,`."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8-sig")
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in head else ",")
    wanted = {"row", "better"}
    if not wanted <= set(reader.fieldnames or ()):
        raise DataError(
            f"the columns row and better are needed; found {reader.fieldnames}", path=str(path)
        )
    return [
        (reader.line_num, {key: value or "" for key, value in row.items() if key is not None})
        for row in reader
    ]
