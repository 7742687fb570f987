"""A column map: the file's own names of what a row holds, from the recipe's `columns` section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from amenable.config.data import PreferenceColumns, PromptColumns
from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import listed, shown
from amenable.data.reading.records import Row
from amenable.errors import DataError


def is_mapped(columns: PromptColumns) -> bool:
    """Whether the recipe names any column."""
    return columns != type(columns)()


def native_row(row: Row, columns: PromptColumns) -> Row:
    """The row under native keys; columns that are not named stay as they are.

    A named `input_text` stands in for `messages` and `context` of the file, which are left out.

    Args:
        row: a record as the file has it.
        columns: native key to column; dots lead into objects and lists (`turns.0`).

    Raises:
        DataError: a named column is missing, or the verdict is none of `choice_values`.
    """
    named = {
        entry.name: path
        for entry in fields(columns)
        if entry.name != "choice_values" and (path := getattr(columns, entry.name))
    }
    found = {key: _value(row, path) for key, path in named.items()}
    values: Json = row.values
    for path in named.values():
        values = _without(values, [path] if path in row.values else path.split("."))
    replaced = {*named, *(("messages", "context") if "input_text" in named else ())}
    if not replaced.isdisjoint(values):
        row.log.coerce("native key left out: the column map names another column in its place")
    values = {key: value for key, value in values.items() if key not in replaced} | found
    if isinstance(values.get("input_text"), list):
        values["messages"] = values.pop("input_text")
    verdicts = getattr(columns, "choice_values", ())
    if verdicts:
        values["choice"] = _choice(
            row, values.get("choice"), named.get("choice", "choice"), verdicts
        )
    return replace(row, values=values)


def _value(row: Row, path: str) -> Any:
    value: Any = row.values
    if path in row.values:  # a name with a dot in it
        return row.values[path]
    for depth, step in enumerate(path.split(".")):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            found = f"the row has {listed(row.values)}" if not depth else f"found {shown(value)}"
            raise row.fault(path, f"is missing; {found}; correct the recipe's columns")
    return value


def _without(holder: Any, steps: list[str]) -> Any:
    """The object or list without the value at the end of the steps; what is empty then goes, too.

    In a list null stands in its place, so that the others keep theirs.
    """
    step, *rest = steps
    if isinstance(holder, list):
        place = int(step)
        inner = _without(holder[place], rest) if rest and holder[place] else None
        kept = [*holder[:place], inner or None, *holder[place + 1 :]]
        return kept if any(value is not None for value in kept) else []
    inner = _without(holder[step], rest) if rest and step in holder else None
    others = {key: value for key, value in holder.items() if key != step}
    return {**others, step: inner} if inner else others


def _choice(row: Row, value: object, column: str, verdicts: tuple[str, ...]) -> int | str:
    said = value if isinstance(value, str) else shown(value).split(" (")[0]
    if said not in verdicts and said.removesuffix(".0") in verdicts:  # of pandas
        row.log.coerce("verdict such as 1.0 read as a whole number")
        said = said.removesuffix(".0")
    if said not in verdicts:
        expected = " or ".join(map(repr, verdicts))
        raise row.fault(column, f"found {shown(value)}; expected {expected} (choice_values)")
    place = verdicts.index(said)
    return "tie" if place == 2 else place


def _unknown_verdict(row: Row, columns: PromptColumns) -> DataError | None:
    """The fault of a verdict other than 0, 1 and "tie" where the map does not say what it means.

    A column of 1 and 2 would, with the 2 dropped, give every label the wrong way round.
    """
    if not isinstance(columns, PreferenceColumns) or not columns.choice or columns.choice_values:
        return None
    verdict = row.values.get("choice")
    texts = ("0", "1", "tie") if row.textual else ("tie",)
    if type(verdict) not in (int, str) or verdict in (0, 1, *texts):
        return None  # right, or the fault of this row alone
    return row.fault(
        columns.choice,
        f'found {shown(verdict)}; expected 0, 1 or "tie"; name the verdicts in choice_values, that '
        'for candidate_0 first: choice_values = ["1", "2"]',
    )


def rows(records: Iterator[Row], columns: PromptColumns) -> Iterator[Row]:
    """`native_row` of each; a fault goes to the log and the next row is taken."""
    for record in records:
        try:
            row = native_row(record, columns)
        except DataError as error:
            record.log.fault(error, record.values)
        else:
            if unknown := _unknown_verdict(row, columns):
                record.log.fault(unknown)  # of the map, not of the row: nothing may be dropped
                return
            yield row
