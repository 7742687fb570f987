"""Files of one format to a file of another, and what was lost on the way.

Every written row is read back before it counts: one that would come back with another text, another
preference or without something that the format holds is not written, but counted with its reason.
What the format has no place for is counted for each row in which it stood.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from amenable.config.data import (
    DemonstrationSource,
    PreferenceSource,
    PromptSource,
    SourceConfig,
)
from amenable.data.formats.format import EVERYTHING, Format, Kind, Typed
from amenable.data.formats.native import NATIVE
from amenable.data.formats.table import FORMATS, detect, find_format
from amenable.data.reading import custom
from amenable.data.reading.json_records import Json
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.reading.records import DroppingLog, ReadLog, Row, iter_records
from amenable.data.reading.row_writer import check_ending, write_rows
from amenable.data.reading.sources import find_sources
from amenable.data.schemas import Choice, Demonstration, Preference, Prompt, messages_key
from amenable.errors import DataError, UsageError

_SOURCES: dict[Kind, type[SourceConfig]] = {
    "demonstrations": DemonstrationSource,
    "preferences": PreferenceSource,
    "prompts": PromptSource,
}
_READERS: dict[Kind, Any] = {
    "demonstrations": iter_demonstrations,
    "preferences": iter_preferences,
    "prompts": iter_prompts,
}
_CHANGED = "it would be read back as another row"


def convert(
    source: SourceConfig | Sequence[str | Path],
    to: str,
    out: str | Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    log: ReadLog | None = None,
) -> Json:
    """Reads all rows of the source and writes them to `out` in the format `to`.

    Args:
        source: files, or a section of a recipe, whose format, columns and reader are used.
        to: name of a format that can be written.
        out: a file; its ending tells the container (`row_writer.ENDINGS`).
        kind: of the rows; auto takes it from the section's type, else from the first record.
        log: what a fault means (default: the first ends the conversion).

    Returns:
        The report, for people and programs: `records` and `rows` that were read, `written` rows
        and the `lines` they became; reasons and counts of what was `dropped` in reading and
        `not_written`, with the place of the first such row; `not_held`: what the format has no
        place for, with the number of written rows that had it; `coerced`, `filled`, `formats`.

    Raises:
        DataError: a file is faulty, or no row can be written.
        UsageError: the format cannot be written with this kind of rows, or the ending is unknown.
        StorageError: the file cannot be written; what stood at `out` is intact.
    """
    log, out = log or ReadLog(), Path(out).expanduser()
    config = source if isinstance(source, SourceConfig) else _section(source)
    form = find_format(to)
    check_ending(out)
    _check_apart(config, out)
    found = _kind(config) if kind == "auto" else kind
    if not form.writes(found):
        able = ", ".join(sorted(name for name, one in FORMATS.items() if one.writes(found)))
        raise UsageError(f"the format {to!r} cannot be written with {found}; these can: {able}")
    writing = _Writing(form, found)
    config = _of_kind(config, found)
    try:
        lines, filled = write_rows(out, writing.all(_READERS[found](config, log)), form.fill)
    except DataError as error:
        if writing.written or error.path != out:
            raise
        reasons = {**log.dropped, **writing.not_written}
        told = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
        raise DataError(f"no row can be written as {to!r}: {told or 'no rows'}") from error
    return {
        "to": to,
        "kind": found,
        "out": str(out),
        "formats": dict(log.formats),
        "records": log.records,
        "rows": log.rows,
        "written": writing.written,
        "lines": lines,
        "dropped": dict(log.dropped),
        "not_written": dict(writing.not_written),
        "first_not_written": writing.first,
        "not_held": dict(writing.not_held),
        "filled": {key: form.fill[key] for key in filled},
        "coerced": dict(log.coerced),
    }


def lines(report: Json) -> list[str]:
    """What `convert` returned, as text for a terminal."""
    records = f" ({report['lines']:,} lines)" if report["lines"] != report["written"] else ""
    told = [
        f"{report['out']}: {report['written']:,} of {report['rows']:,} {report['kind']} "
        f"written as {report['to']}{records}"
    ]
    told += [f"    read    {name} as {form}" for name, form in report["formats"].items()]
    for title, key in (("dropped", "dropped"), ("coerced", "coerced")):
        told += [f"    {title} {count:,} × {what}" for what, count in report[key].items()]
    for reason, count in report["not_written"].items():
        first = report["first_not_written"][reason]
        told.append(f"    refused {count:,} × {reason} (first: {first})")
    for what, count in sorted(report["not_held"].items()):
        told.append(f"    lost    {what}, of {count:,} rows")
    for key, value in report["filled"].items():
        told.append(f"    filled  {key} = {value} where a row had none: it must be in all rows")
    return told


def _of_kind(config: SourceConfig, kind: Kind) -> SourceConfig:
    """The section as one of this kind, with what its column map has in common."""
    section = _SOURCES[kind]
    if isinstance(config, section):
        return config
    made: Any = section(files=config.files, format=config.format, reader=config.reader)
    mapped: Any = getattr(config, "columns", None)
    if mapped is not None:
        names = {entry.name for entry in fields(made.columns)} & {e.name for e in fields(mapped)}
        shared = {name: getattr(mapped, name) for name in names}
        made = replace(made, columns=replace(made.columns, **shared))
    return cast("SourceConfig", made)


def _section(paths: Sequence[str | Path]) -> SourceConfig:
    return SourceConfig(files=tuple(str(path) for path in paths))


def _check_apart(config: SourceConfig, out: Path) -> None:
    for source in find_sources(config.files):
        if source.local is not None and source.local.resolve() == out.resolve():
            raise UsageError(f"{out} is one of the files to read; write to another")


def _kind(config: SourceConfig) -> Kind:
    """The kind of the section, else of the first record that can be decoded."""
    for kind, section in _SOURCES.items():
        if isinstance(config, section):
            return kind
    for source in find_sources(config.files):
        records = iter_records(source, DroppingLog())
        if config.reader:
            records = custom.rows(records, config.reader)
        row = next(records, None)
        if row is None:
            continue
        if config.reader:
            return NATIVE.kind(row.values)
        form = detect(row) if config.format == "auto" else find_format(config.format)
        return form.kind(row.values)
    raise DataError("no file has a row", path=", ".join(config.files))


class _Writing:
    """Writes one row after the other and counts what was not written or not held."""

    def __init__(self, form: Format, kind: Kind) -> None:
        self.form = form
        self.kind = kind
        self.written = 0
        self.not_written: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.not_held: Counter[str] = Counter()
        self._write = getattr(form, f"write_{kind[:-1]}")

    def all(self, placed: Iterator[tuple[Row, Typed]]) -> Iterator[Json]:
        """The records of all rows that can be written."""
        for row, item in placed:
            records, reason = self._records(item)
            if reason:
                self.not_written[reason] += 1
                self.first.setdefault(reason, f"{row.path}:{row.line}")
                continue
            self.written += 1
            self.not_held.update(
                what for what in EVERYTHING - self.form.holds if _has(what, row, item)
            )
            yield from records

    def _records(self, item: Typed) -> tuple[list[Json], str]:
        """The row's records, or why there are none."""
        reason = self.form.refusal(item)
        if reason:
            return [], reason
        try:
            records = self._write(item)
            back = [thing for record in records for thing in self._read(record)]
        except DataError as error:
            return [], f"{_CHANGED} ({error.reason})" if error.line else error.reason
        return (records, "") if _is_same(self.form, item, back) else ([], _CHANGED)

    def _read(self, record: Json) -> Iterator[Any]:
        read: Any = getattr(self.form, self.kind) or self.form.answers
        return iter(read(Row(record, "", 1, "", ReadLog())))


def _has(what: str, row: Row, item: Typed) -> bool:
    """Whether this row says something of this sort."""
    prompt = item if isinstance(item, Prompt) else item.prompt
    if what == "id":
        return prompt.id != f"{row.label}:{row.line}"
    if what == "group":
        return prompt.group != messages_key(prompt.messages)
    if what == "other keys":
        return bool(prompt.meta)
    if not isinstance(item, Preference):
        return False  # the rest is about two candidates, or such rows are not written
    values = {
        "order of the candidates": item.choice is Choice.SECOND,
        "which two answers were compared": True,
        "weight": item.weight != 1.0,
        "margin": item.margin is not None,
        "annotator": item.annotator is not None,
        "strength": item.strength is not None,
    }
    return values.get(what, False)


def _is_same(form: Format, item: Typed, back: list[Any]) -> bool:
    """Whether what was read back says the same, as far as the format holds it."""
    if isinstance(item, Preference) and form.preferences is None:
        said = [(answer.prompt.messages, answer.text, answer.score) for answer in back]
        asked = item.prompt.messages
        return said == [(asked, item.chosen, 1.0), (asked, item.rejected, 0.0)]
    return len(back) == 1 and _held(form, back[0]) == _held(form, item)


def _held(form: Format, item: Typed) -> tuple[object, ...]:
    """What the row says, without what the format does not hold."""
    prompt = item if isinstance(item, Prompt) else item.prompt
    of_prompt = {"id": prompt.id, "group": prompt.group, "other keys": dict(prompt.meta)}
    held: list[object] = [value for what, value in of_prompt.items() if what in form.holds]
    if isinstance(item, Demonstration):
        held.append(item.output_text)
    if isinstance(item, Preference):
        held += _held_of_pair(form, item)
    return prompt.messages, *held


def _held_of_pair(form: Format, item: Preference) -> list[object]:
    keys = ("weight", "margin", "annotator", "strength")
    held: list[object] = [getattr(item, key) for key in keys if key in form.holds]
    if "order of the candidates" in form.holds:
        return [*held, item.candidate_0, item.candidate_1, item.choice]
    return [*held, item.chosen, item.rejected, item.choice is Choice.TIE]
