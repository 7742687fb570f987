"""Files of one format to a file of another, and what was lost on the way.

Every written row is read back before it counts: one that would come back with another text, another
preference or without something that the format holds is not written, but counted with its reason.
What the format has no place for is counted for each row in which it stood. A table (CSV, Parquet)
is read back as a whole before it has its name: what it made of other keys is counted, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from amenable.config.data import (
    DemonstrationSource,
    PreferenceSource,
    PromptSource,
    SourceConfig,
)
from amenable.data.formats.cells import with_chats
from amenable.data.formats.format import EVERYTHING, Format, Kind, Typed
from amenable.data.formats.native import NATIVE
from amenable.data.formats.table import FORMATS, detect, find_format
from amenable.data.reading import custom
from amenable.data.reading.json_records import Json
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.reading.records import DroppingLog, ReadLog, Row, iter_records
from amenable.data.reading.row_writer import Again, check_ending, write_rows
from amenable.data.reading.sources import Source, find_sources
from amenable.data.schemas import Answer, Choice, Demonstration, Preference, Prompt, messages_key
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
_NO_TABLE = "write .jsonl, which holds all rows"


def convert(
    source: SourceConfig | Sequence[str | Path],
    to: str,
    out: str | Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    log: ReadLog | None = None,
    force: bool = False,
) -> Json:
    """Reads all rows of the source and writes them to `out` in the format `to`.

    Args:
        source: files, or a section of a recipe, whose format, columns and reader are used.
        to: name of a format that can be written.
        out: a file; its ending tells the container (`row_writer.ENDINGS`).
        kind: of the rows; auto takes it from the section's type, else from the first record.
        log: what a fault means (default: the first ends the conversion).
        force: whether a file that stands at `out` is replaced.

    Returns:
        The report, for people and programs: `records` and `rows` that were read, `written` rows
        and the `lines` they became; reasons and counts of what was `dropped` in reading and
        `not_written`, with the place of the first such row; `not_held`: what the format has no
        place for, with the number of written rows that had it; `invented`: comparisons that the
        written records make and nobody made; `coerced`, `filled`, `formats`.

    Raises:
        DataError: a file is faulty, no row can be written, or the table cannot hold the rows.
        UsageError: the format cannot be written with this kind of rows, the ending is unknown, or
            `out` exists.
        StorageError: the file cannot be written; what stood at `out` is intact.
    """
    log, out = log or ReadLog(), Path(out).expanduser()
    config = source if isinstance(source, SourceConfig) else _section(source)
    form = find_format(to)
    check_ending(out)
    _check_apart(config, out)
    if not force and (out.exists() or out.is_symlink()):
        raise UsageError(f"{out} exists and is not overwritten; name another, or give --force")
    found = _kind(config) if kind == "auto" else kind
    if not form.writes(found):
        able = ", ".join(sorted(name for name, one in FORMATS.items() if one.writes(found)))
        raise UsageError(f"the format {to!r} cannot be written with {found}; these can: {able}")
    writing = _Writing(form, found)
    config = _of_kind(config, found)
    try:
        records = writing.all(_READERS[found](config, log))
        lines, filled = write_rows(out, records, form.fill, force=force, verify=writing.verify)
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
        "invented": writing.compared.invented(),
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
    if report["invented"]:
        told.append(
            f"    added   {report['invented']:,} comparisons that nobody made: {report['to']} says "
            "of each answer alone whether it was preferred"
        )
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
        with closing(iter_records(source, DroppingLog())) as records:
            made: Iterator[Row] = records
            if config.reader:
                made = custom.rows(records, config.reader, source.shown)
            row = next(made, None)
        if row is None:
            continue
        if config.reader:
            return NATIVE.kind(row.values)
        row = with_chats(row)
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
        self.compared = _Compared()
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
            if self._is_split and isinstance(item, Preference):
                self.compared.add(item)
            yield from records
        if rows := self.compared.rows():
            self.not_held["which two answers were compared"] = rows

    def verify(self, path: Path, again: Again) -> None:
        """Reads a table back; counts rows whose other keys it changed.

        Raises:
            DataError: a row came back with another text or another preference.
        """
        back = iter_records(Source(str(path), ""), ReadLog())
        for number, (record, row) in enumerate(zip(again(), back, strict=True), 1):
            try:
                items = list(self._read(record)), list(self._of(row))
            except DataError as error:
                raise DataError(
                    f"row {number}: {_CHANGED} ({error.reason}); {_NO_TABLE}"
                ) from error
            said, others = (
                [[*map(look, side)] for side in items] for look in (self._said, _others)
            )
            if said[0] != said[1]:
                raise DataError(f"row {number}: {_CHANGED}; {_NO_TABLE}")
            if "other keys" in self.form.holds and others[0] != others[1]:
                self.not_held["other keys as they stood, which a table changes"] += 1

    @property
    def _is_split(self) -> bool:
        """Whether the two answers of a preference are written apart."""
        return self.kind == "preferences" and self.form.preferences is None

    def _said(self, item: Any) -> object:
        if isinstance(item, Answer):
            return item.prompt.messages, item.text, item.score
        return _held(replace(self.form, holds=self.form.holds - {"other keys"}), item)

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
        return self._of(Row(record, "", 1, "", ReadLog()))

    def _of(self, row: Row) -> Iterator[Any]:
        read: Any = getattr(self.form, self.kind) or self.form.answers
        return iter(read(row))


class _Compared:
    """Which answers of a prompt were compared, for formats that say only which were preferred."""

    def __init__(self) -> None:
        self._rows: Counter[int] = Counter()
        self._pairs: dict[int, set[tuple[int, int]]] = {}

    def add(self, item: Preference) -> None:
        """Takes in a comparison; hashes of its texts are kept."""
        prompt = hash(item.prompt.messages)
        self._rows[prompt] += 1
        pairs = self._pairs.setdefault(prompt, set())
        pairs.add((hash(item.chosen), hash(item.rejected)))

    def invented(self) -> int:
        """How many comparisons nobody made: every preferred answer with every other one."""
        return sum(map(self._invented, self._pairs))

    def rows(self) -> int:
        """How many rows have a prompt with such comparisons."""
        return sum(count for prompt, count in self._rows.items() if self._invented(prompt))

    def _invented(self, prompt: int) -> int:
        made = self._pairs[prompt]
        chosen, rejected = ({pair[side] for pair in made} for side in (0, 1))
        return len(chosen) * len(rejected) - len(chosen & rejected) - len(made)


def _others(item: Typed) -> Json:
    """The other keys; those without a value are in every row of a table."""
    return {key: value for key, value in _prompt_of(item).meta.items() if value is not None}


def _prompt_of(item: Typed) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def _has(what: str, row: Row, item: Typed) -> bool:
    """Whether this row says something of this sort."""
    prompt = _prompt_of(item)
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
    prompt = _prompt_of(item)
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
