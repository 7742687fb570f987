"""Files of any known shape to typed rows: streaming, strict, one row in memory at a time.

The way of a row: `sources` finds files, `records` decodes them, a format of `formats` (or the
recipe's column map, or a reader function of the user's) makes typed rows of `schemas`. Every fault
goes to the ReadLog, which decides whether reading ends there. Whether an id is used twice is not
looked at here: that needs all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from amenable.config.checks import broken_source
from amenable.config.data import (
    DemonstrationSource,
    PreferenceSource,
    PromptColumns,
    PromptSource,
    SourceConfig,
)
from amenable.data.formats.cells import with_chats
from amenable.data.formats.format import Format, Kind, Typed
from amenable.data.formats.native import (
    DEMONSTRATION_KEYS,
    NATIVE,
    PREFERENCE_KEYS,
    PROMPT_KEYS,
)
from amenable.data.formats.table import detect, find_format, foreign, wrong_format
from amenable.data.reading import columns, custom
from amenable.data.reading.rankings import gather, pairs_of
from amenable.data.reading.records import ReadLog, Row, iter_records
from amenable.data.reading.sources import Source, find_sources
from amenable.data.schemas import Demonstration, Preference, Prompt, Ranking
from amenable.errors import DataError, RecipeError

T = TypeVar("T")
Paths = Sequence[str | Path]
Placed = tuple[Row, T]
"""A typed row and the record that it was made of."""

_NATIVE_KEYS: dict[Kind, frozenset[str]] = {
    "demonstrations": DEMONSTRATION_KEYS,
    "preferences": PREFERENCE_KEYS,
    "prompts": PROMPT_KEYS,
}
"""What a native row of each kind needs for itself, so that no other key may be called so."""


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file that has at least one record, and how its records become typed rows."""

    source: Source
    kind: Kind
    form: Format
    how: str
    """The format's name, or "column map", or "reader" and its name."""

    rows: Iterator[Row]
    """Its records as `form` expects them; can be run through once."""

    detected: bool = False
    """Whether the format was found from the first record, so that others may differ from it."""


def iter_demonstrations(
    source: DemonstrationSource | Paths, log: ReadLog
) -> Iterator[Placed[Demonstration]]:
    """Prompts with an answer, in the order of files and rows.

    Raises:
        DataError: a file cannot be read or holds no demonstrations, or (with a log that fails) a
            row is faulty; names file, line, field and remedy.
        RecipeError: `format` or `reader` names nothing that exists.
    """
    return cast("Iterator[Placed[Demonstration]]", iter_items(source, "demonstrations", log))


def iter_preferences(
    source: PreferenceSource | Paths, log: ReadLog
) -> Iterator[Placed[Preference]]:
    """Two candidates and a choice each, in the order of files and rows.

    Raises:
        DataError: as `iter_demonstrations`.
        RecipeError: likewise.
    """
    return cast("Iterator[Placed[Preference]]", iter_items(source, "preferences", log))


def iter_prompts(source: PromptSource | Paths, log: ReadLog) -> Iterator[Placed[Prompt]]:
    """Prompts, in the order of files and rows; those of answers and pairs where a file has these.

    Of native rows every other key, an `output_text` among them, stays in `meta`.

    Raises:
        DataError: as `iter_demonstrations`.
        RecipeError: likewise.
    """
    return cast("Iterator[Placed[Prompt]]", iter_items(source, "prompts", log))


def iter_items(
    source: SourceConfig | Paths, kind: Kind | Literal["auto"], log: ReadLog
) -> Iterator[Placed[Typed]]:
    """Typed rows of the files; `auto` finds each file's kind from its first record.

    Raises:
        DataError: as `iter_demonstrations`.
        RecipeError: likewise.
    """
    config = source if isinstance(source, SourceConfig) else SourceConfig(files=_names(source))
    for file in find_sources(config.files):
        with closing(iter_records(file, log)) as records:  # whatever ends the reading
            first = next(records, None)
            if first is None:
                continue  # the log was told that the file has no rows
            opened = opened_by(first, config, kind, file, records, log)
            for placed in typed_rows(opened, config, log):
                log.rows += 1
                yield placed


def read_demonstrations(paths: DemonstrationSource | Paths) -> list[Demonstration]:
    """All demonstrations of the files at once, each id used once.

    Raises:
        DataError: as `iter_demonstrations`; an id is used twice.
    """
    return _unique(iter_demonstrations(paths, ReadLog()), lambda row: row.prompt.id)


def read_preferences(paths: PreferenceSource | Paths) -> list[Preference]:
    """All preferences of the files at once, each id used once.

    Raises:
        DataError: as `iter_preferences`; an id is used twice.
    """
    return _unique(iter_preferences(paths, ReadLog()), lambda row: row.prompt.id)


def read_prompts(paths: PromptSource | Paths) -> list[Prompt]:
    """All prompts of the files at once, each id used once.

    Raises:
        DataError: as `iter_prompts`; an id is used twice.
    """
    return _unique(iter_prompts(paths, ReadLog()), lambda prompt: prompt.id)


def id_used_twice(name: str, row: Row, first: str) -> DataError:
    """The fault of an id that another row has; `first` is that row's file and line."""
    return row.fault("id", f"{name!r} is used twice (first at {first}); give each row its own")


def opened_by(
    first: Row,
    config: SourceConfig,
    kind: Kind | Literal["auto"],
    source: Source,
    others: Iterator[Row],
    log: ReadLog,
) -> OpenedFile:
    """What a file's first record, and the recipe, say of it; `others` are the records behind.

    Raises:
        DataError: the record is in no format of this kind.
        RecipeError: `format` or `reader` names nothing that exists, or the section contradicts
            itself.
    """
    if broken := broken_source(config):
        raise RecipeError(broken)
    records = chain([first], others)
    mapped = getattr(config, "columns", PromptColumns())
    if config.reader:
        form, how, rows = (
            NATIVE,
            f"reader {config.reader}",
            custom.rows(records, config.reader, source.shown),
        )
    elif columns.is_mapped(mapped):
        form, how, rows = NATIVE, "column map", columns.rows(records, mapped)
    else:
        first = with_chats(replace(first, log=ReadLog()))  # counted when its turn comes
        form = _format(config.format, None if kind == "auto" else kind, source, first)
        how, rows = form.name, records
        kind = form.kind(first.values) if kind == "auto" else kind
    if kind == "auto":  # only a mapped record tells
        made = next(rows, None)
        kind = "prompts" if made is None else form.kind(made.values)
        rows = rows if made is None else chain([made], rows)
    log.formats[source.shown] = how
    return OpenedFile(
        source, kind, form, how, rows, detected=rows is records and not _named(config)
    )


def typed_rows(file: OpenedFile, config: SourceConfig, log: ReadLog) -> Iterator[Placed[Typed]]:
    """What training reads from an opened file; a fault goes to the log.

    A key that a native row of this kind needs for itself is kept in meta under another name.
    """
    reserved = _NATIVE_KEYS[file.kind]
    for row, item in _typed(file, config, log):
        prompt = item if isinstance(item, Prompt) else item.prompt
        if reserved.isdisjoint(prompt.meta):
            yield row, item
            continue
        renamed = replace(prompt, meta=_renamed(prompt.meta, reserved, log))
        yield row, renamed if isinstance(item, Prompt) else replace(item, prompt=renamed)


def _renamed(meta: Mapping[str, Any], reserved: frozenset[str], log: ReadLog) -> dict[str, Any]:
    kept = {}
    for key, value in meta.items():
        name = key
        while name in reserved or (name != key and name in meta):
            name = f"other_{name}"
        if name != key:
            log.coerce(f"other key {key} kept as other_{key}: a native row has its own")
        kept[name] = value
    return kept


def _typed(file: OpenedFile, config: SourceConfig, log: ReadLog) -> Iterator[Placed[Typed]]:
    form = file.form
    if file.kind == "demonstrations":
        assert form.demonstrations is not None
        return _each(file, form.demonstrations, log)
    if file.kind == "prompts":
        return _each(file, _prompts_of(form), log)
    if form.preferences is not None:
        return _each(file, form.preferences, log)
    return _paired(_rankings(file, log), config, log)


def _named(config: SourceConfig) -> bool:
    """Whether the recipe says the format."""
    return config.format != "auto"


def _format(name: str, kind: Kind | None, source: Source, first: Row) -> Format:
    if name == "auto":
        return detect(first, kind)
    form = find_format(name)
    if kind is not None and not form.reads(kind):
        raise DataError(f"the format {name!r} has no {kind}; name another", path=source.shown)
    return form


def _names(paths: Paths) -> tuple[str, ...]:
    return tuple(str(path) for path in paths)


def _unique(placed: Iterable[Placed[T]], id_of: Callable[[T], str]) -> list[T]:
    rows: list[T] = []
    places: dict[str, str] = {}
    for row, item in placed:
        name = id_of(item)
        if name in places:
            raise id_used_twice(name, row, places[name])
        places[name] = f"{row.path}:{row.line}"
        rows.append(item)
    return rows


def _each(
    file: OpenedFile, read: Callable[[Row], Iterable[T]], log: ReadLog
) -> Iterator[Placed[T]]:
    """What the reader makes of each record; a fault goes to the log."""
    for record in file.rows:
        try:
            row = with_chats(record)
        except DataError as error:
            log.fault(error, record.values)
            continue
        other = foreign(row, file.form) if file.detected else None
        if other is not None:
            log.fault(other, row.values)
            continue
        try:
            made = list(read(row))
        except DataError as error:
            log.fault(wrong_format(error, row, file.form, file.kind), row.values)
            continue
        for item in made:
            yield row, item


def _rankings(file: OpenedFile, log: ReadLog) -> Iterator[Placed[Ranking]]:
    form = file.form
    if form.rankings is not None:
        return _each(file, form.rankings, log)
    assert form.answers is not None
    return gather(_each(file, form.answers, log), log, rated=form.rated)


def _paired(
    rankings: Iterable[Placed[Ranking]], config: SourceConfig, log: ReadLog
) -> Iterator[Placed[Preference]]:
    how = config.pairs if isinstance(config, PreferenceSource) else "all"
    for row, ranking in rankings:
        for pair in pairs_of(ranking, how, log):
            yield row, pair


def _prompts_of(form: Format) -> Callable[[Row], Iterable[Prompt]]:
    """How a format's records give prompts: as such, else those of its other rows."""
    if form.prompts is not None:
        return form.prompts
    read: Any = form.demonstrations or form.preferences or form.rankings or form.answers
    return lambda row: (item.prompt for item in read(row))
