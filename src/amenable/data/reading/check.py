"""Every fault of data files, not only the first: `amenable data check`.

The rows go the way of training (`readers`), with a log that collects faults instead of ending. Two
things differ. Plain native rows are recognised by a predicate, which is faster than making typed
rows of them. And ids that are used twice are looked for in all files of a kind: hashes of the ids
are sorted at the end, and only if some are equal are the files read again, for the names of those
that are shown or left out of a fixed file; the others are counted by their hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from amenable.config.data import (
    DemonstrationSource,
    PreferenceSource,
    PromptSource,
    SourceConfig,
)
from amenable.data.formats.format import Kind, Typed
from amenable.data.formats.native import NATIVE
from amenable.data.reading.check_report import CheckReport, FileReport, FoundFaults
from amenable.data.reading.fixed_rows import FixedRows
from amenable.data.reading.plain_rows import PLAIN
from amenable.data.reading.read_log import reason_of
from amenable.data.reading.readers import OpenedFile, id_used_twice, opened_by, typed_rows
from amenable.data.reading.records import ReadLog, Row, iter_records
from amenable.data.reading.row_ids import RowIds
from amenable.data.reading.second_reading import Silence, records_at
from amenable.data.reading.sources import Source, find_usable
from amenable.data.schemas import Prompt
from amenable.errors import DataError, UsageError

MOST_TRIED = 3
"""Records of a file that are looked at to find its format."""

_KIND_OF_SOURCE: dict[type[SourceConfig], Kind] = {
    DemonstrationSource: "demonstrations",
    PreferenceSource: "preferences",
    PromptSource: "prompts",
}


def check_files(
    source: SourceConfig | Sequence[str | Path],
    kind: Kind | Literal["auto"] = "auto",
    *,
    max_errors: int = 100,
    fix: Path | None = None,
) -> CheckReport:
    """Reads all rows of the files and tells of every fault; holds one row in memory at a time.

    Of each row 8 bytes are kept, and twice that while they are sorted; where ids are used twice, up
    to eight times that meanwhile (see `RowIds`). A format whose records are single answers is held
    in memory whole, as in training.

    Args:
        source: files, and how they are read.
        kind: what the rows should be; `auto` takes the kind of the source (`PreferenceSource`, …),
            else finds it from each file's first record.
        max_errors: faults to keep, those that stand first; all are counted. 0 keeps all.
        fix: where to write the good rows, in the native format; of rows with one id the first.
            What is left out goes beside it, into `<stem>.rejects.jsonl`.

    Returns:
        What was found; `ok` is False if there is any fault.

    Raises:
        RecipeError: `format` or `reader` names nothing that exists.
        UsageError: `fix` exists or is an input, or the files are of several kinds and `fix` is
            given.
        StorageError: `fix` cannot be written; nothing is left of it.
    """
    if isinstance(source, SourceConfig):
        config = source
        kind = _KIND_OF_SOURCE.get(type(source), kind) if kind == "auto" else kind
    else:
        config = SourceConfig(files=tuple(map(str, source)))
    check = _Check(config, kind, max_errors)
    sources = check.sources()
    with ExitStack() as stack:
        if fix is not None:
            inputs = [path for file in sources if (path := file.local)]
            check.fixed = stack.enter_context(FixedRows(fix, inputs))
        for number, file in enumerate(sources):
            check.read(number, file)
        return check.finish()


def good_rows(
    source: Source, config: SourceConfig, kind: Kind | Literal["auto"] = "auto"
) -> Iterator[tuple[Row, Typed]]:
    """The rows of one file in which a check finds no fault, ids that are used twice aside.

    For a file whose faults have been told: they end nothing, and no one is told of them again.
    """
    log = Silence()
    with suppress(DataError):
        opened = _Check(config, kind, 0).open(source, log)
        if opened is not None:
            yield from typed_rows(opened, config, log)


class _FileLog(ReadLog):
    """Counts of one file; its faults go on to the check, and reading goes on."""

    def __init__(self, number: int, found: FoundFaults, fixed: FixedRows | None) -> None:
        super().__init__()
        self.faults = 0
        self.kind: Kind | None = None
        self.how = ""
        self._number, self._found, self._fixed = number, found, fixed

    def fault(self, error: DataError, raw: object = None) -> None:
        self.faults += 1
        self._found.add(error, self._number)
        if self._fixed is not None:
            self._fixed.reject(error, raw)


class _Check:
    """One check under way: the files that were read and what was found in them."""

    def __init__(self, config: SourceConfig, kind: Kind | Literal["auto"], max_errors: int) -> None:
        self._config, self._kind = config, kind
        self._found = FoundFaults(max_errors)
        self._sources: list[Source] = []
        self._logs: list[_FileLog] = []
        self._ids: dict[Kind, RowIds] = {}
        self.fixed: FixedRows | None = None

    def sources(self) -> list[Source]:
        """The files; a name that leads to none is a fault, and the others are read."""
        self._sources = find_usable(self._config.files, lambda error: self._found.add(error, -1))
        return self._sources

    def read(self, number: int, source: Source) -> None:
        """Reads one file to its end."""
        log = _FileLog(number, self._found, self.fixed)
        self._logs.append(log)
        try:
            opened = self.open(source, log)
            if opened is None:
                return  # the log was told why there are no rows
            log.kind, log.how = opened.kind, opened.how
            ids = self._ids.setdefault(opened.kind, RowIds())
            if self.fixed is not None and len(self._ids) > 1:
                kinds = " and ".join(self._ids)
                raise UsageError(f"--fix: the files hold {kinds}; fix one kind at a time")
            ids.begin_file(number)
            if opened.form is NATIVE and not (self._config.reader or self.fixed):
                self._pass_plain(opened, log, ids)
            else:
                self._pass(opened, log, ids)
        except DataError as error:  # of the file as a whole
            log.fault(error)

    def finish(self) -> CheckReport:
        """Looks for ids that are used twice, then sums up."""
        dropped: list[int] = []
        for ids in self._ids.values():
            dropped += self._repeated(ids)
        fixed = None if self.fixed is None else self.fixed.finish(frozenset(dropped))
        files = [
            FileReport(
                file=source.shown,
                kind=log.kind,
                format=log.formats.get(source.shown),
                records=log.records,
                rows=log.rows,
                faults=log.faults,
                dropped=dict(log.dropped.most_common()),
                coerced=dict(log.coerced.most_common()),
            )
            for source, log in zip(self._sources, self._logs, strict=True)
        ]
        return CheckReport(
            files=files,
            faults=self._found.kept(),
            fault_count=self._found.count,
            reasons=dict(self._found.reasons.most_common()),
            fixed=fixed,
        )

    def open(self, source: Source, log: ReadLog) -> OpenedFile | None:
        """The file; None, and a fault, if it has no record that can be read.

        Records before the first in a known format are faults of their own.
        """
        records = iter_records(source, log)
        for first in islice(records, MOST_TRIED):
            try:
                return opened_by(first, self._config, self._kind, source, records, log)
            except DataError as error:
                log.fault(error, None if error.line is None else first.values)
                if error.line is None or self._config.reader:
                    return None  # no other record would change it
        if next(records, None) is not None:
            told = f"none of the first {MOST_TRIED} records is in a known format"
            log.fault(DataError(f"{told}; the others were not read", path=source.shown))
        return None

    def _pass(self, file: OpenedFile, log: ReadLog, ids: RowIds) -> None:
        for row, item in typed_rows(file, self._config, log):
            if self.fixed is not None:
                try:
                    self.fixed.write(row, item)
                except DataError as error:
                    log.fault(error, row.values)
                    continue
            ids.add(_id_of(item), row.line)
            log.rows += 1

    def _pass_plain(self, file: OpenedFile, log: ReadLog, ids: RowIds) -> None:
        """As `_pass`, of native rows, with the short way for plain ones."""
        is_plain, add = PLAIN[file.kind], ids.add
        plain = 0
        for row in file.rows:
            values, line = row.values, row.line
            if is_plain(values):
                add(values.get("id") or f"{row.label}:{line}", line)
                plain += 1
            else:
                self._pass(replace(file, rows=iter((row,))), log, ids)
        log.rows += plain

    def _repeated(self, ids: RowIds) -> list[int]:
        """Reports the rows whose id an earlier row has; the numbers of those that were looked up.

        More than the check shows are looked up only where their names are needed, by `--fix`.
        """
        later, first = ids.repeated()
        most = self._found.most if self.fixed is None and self._found.most else len(later)
        wanted = sorted({*later[:most].tolist(), *first[:most].tolist()})
        if any(self._sources[ids.place(number)[0]].is_pipe for number in wanted):
            self._repeated_in_pipe(ids.by_file(later))
            return list(later.tolist())
        places: dict[str, str] = {}
        repeated = []
        error: DataError | None = None
        for number, row, name in self._again(ids, wanted):
            if name not in places:
                places[name] = f"{row.path}:{row.line}"
                continue
            repeated.append(number)
            log = self._logs[ids.place(number)[0]]
            log.rows -= 1
            error = id_used_twice(name, row, places[name])
            log.fault(error, row.values)
        if error is not None:
            self._count_repeated(ids.by_file(later[most:]), reason_of(error))
        return repeated

    def _repeated_in_pipe(self, rows: dict[int, int]) -> None:
        """One fault for each file, without names: they are not to be had a second time."""
        for file, count in rows.items():
            error = DataError(
                "some are used twice; which cannot be told where a pipe is read, as it is gone: "
                "write it to a file and check that",
                path=self._sources[file].shown,
                field="id",
            )
            self._logs[file].rows -= 1
            self._logs[file].fault(error)
            self._count_repeated({file: count - 1}, reason_of(error))

    def _count_repeated(self, rows: dict[int, int], reason: str) -> None:
        """Counts faulty rows, by the number of their file, that are not told one by one."""
        for file, count in rows.items():
            self._logs[file].rows -= count
            self._logs[file].faults += count
            self._found.count_more(reason, count)

    def _again(self, ids: RowIds, wanted: list[int]) -> Iterator[tuple[int, Row, str]]:
        """(number, record, id) of the rows of these numbers, from a second reading."""
        for file, group in groupby(wanted, key=lambda number: ids.place(number)[0]):
            yield from self._again_in(self._sources[file], ids, list(group))

    def _again_in(
        self, source: Source, ids: RowIds, wanted: list[int]
    ) -> Iterator[tuple[int, Row, str]]:
        log = self._logs[ids.place(wanted[0])[0]]
        lines = [ids.place(number)[1] for number in wanted]
        if log.how == NATIVE.name:
            assert log.kind is not None
            rows = records_at(source, frozenset(lines))
            opened: OpenedFile | None = OpenedFile(source, log.kind, NATIVE, log.how, rows)
        else:  # a row can be made of many records, by a reader function of any
            opened = self.open(source, Silence())
        if opened is None:
            raise _changed(source)
        made = typed_rows(opened, self._config, Silence())
        left = iter(zip(wanted, lines, strict=True))
        number, line = next(left)
        for row, item in made:
            name = _id_of(item)
            if row.line == line and ids.is_hash_of(number, name):
                yield number, row, name
                number, line = next(left, (-1, -1))
                if number < 0:
                    return
        raise _changed(source)


def _id_of(item: Typed) -> str:
    return item.id if isinstance(item, Prompt) else item.prompt.id


def _changed(source: Source) -> DataError:
    return DataError("changed while it was read; check it again", path=source.shown)
