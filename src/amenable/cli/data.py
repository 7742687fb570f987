"""`amenable data`: look at data files before anything is trained on them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.options import AsJson

if TYPE_CHECKING:
    from amenable.config.data import SourceConfig
    from amenable.config.recipe import Recipe
    from amenable.data.content.statistics import Item, Part
    from amenable.data.reading.read_log import ReadLog

app = typer.Typer(
    help="Check, convert, show and count data files.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_KINDS = ("demonstrations", "preferences", "prompts")

Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="Paths, globs, URLs or hub:OWNER/NAME:SPLIT."),
]
Kind = Annotated[
    str, typer.Option("--as", metavar="KIND", help=f"{', '.join(_KINDS)}, or found from the rows.")
]
FormatName = Annotated[
    str, typer.Option("--format", metavar="NAME", help="See `amenable data formats`.")
]
Reader = Annotated[
    str, typer.Option("--reader", metavar="MODULE:FUNCTION", help="A reader function of yours.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="KEY=COLUMN", help="May be repeated; choice_values=1,2 too."),
]


@app.command("check", epilog="Example: amenable data check pairs.jsonl --fix good.jsonl")
def check(
    files: Files,
    kind: Kind = "auto",
    format_name: FormatName = "auto",
    reader: Reader = "",
    column: Columns = None,
    max_errors: Annotated[int, typer.Option(help="Faults to print; 0 prints all.")] = 100,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write good rows there, rejects with reasons beside."),
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Also look for duplicates, leaks and label bias.")
    ] = False,
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Rows that are evaluated on, for --content."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every row and tell of every fault, with file, line, field and remedy.

    Exit code 2 if there is any fault.
    """
    from amenable.data.reading.check import check_files

    source = _source(files, kind, format_name, reader, column)
    with _sigterm_cleans_up():
        report = check_files(source, _kind(kind), max_errors=max_errors, fix=fix)
    if not as_json:
        typer.echo("\n".join(report.lines()))
    told = report.as_json()
    try:
        if content:
            read = [file.file for file in report.files if file.kind]
            told["content"] = _content(source, kind, read, held_out or ())
    finally:  # whatever becomes of the content, the faults are told
        if as_json:
            _print_json(told)
    if content and not as_json:
        typer.echo("\n".join(_finding_lines(told["content"]["findings"])))
    if not report.ok:
        raise typer.Exit(2)


@app.command("convert", epilog="Example: amenable data convert hh.jsonl.gz out.jsonl --to trl-chat")
def convert(
    file: Annotated[str, typer.Argument(metavar="IN", help="A path, glob, URL or hub data set.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="See `amenable data formats`.")],
    kind: Kind = "auto",
    format_name: FormatName = "auto",
    reader: Reader = "",
    column: Columns = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the rows in the shape of another tool, and tell what that shape cannot hold."""
    from amenable.data.reading.convert import convert as convert_rows
    from amenable.data.reading.convert import lines

    source = _source([file], kind, format_name, reader, column)
    with _sigterm_cleans_up():
        report = convert_rows(source, to, out, kind=_kind(kind), force=force)
    if as_json:
        _print_json(report)
    else:
        typer.echo("\n".join(lines(report)))


@app.command("show", epilog="Example: amenable data show pairs.jsonl --model smollm2-135m")
def show(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Data files, or one recipe (.toml).")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokenizer.  [default: the recipe's]"),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of each kind to show.")] = 3,
    kind: Kind = "auto",
    format_name: FormatName = "auto",
    reader: Reader = "",
    column: Columns = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as training sees them: their tokens, and which of them carry the loss.

    Below them stands what the tokenizer does to the rows: lengths, cuts, ends and beginnings.
    """
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    recipe, sources = _recipe_and_sources(files, kind, format_name, reader, column)
    _show(_with_model(recipe, model), sources, rows, html, as_json)


@app.command("stats", epilog="Example: amenable data stats pairs.jsonl --json")
def stats(
    files: Files,
    kind: Kind = "auto",
    format_name: FormatName = "auto",
    reader: Reader = "",
    column: Columns = None,
    as_json: AsJson = False,
) -> None:
    """Count rows, lengths, choices, annotators and their agreement, file by file."""
    from amenable.data.content.statistics import data_statistics, lines

    source = _source(files, kind, format_name, reader, column)
    found = data_statistics(_parts(source, kind))
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(lines(found)))


@app.command("formats", epilog="Example: amenable data formats")
def formats(as_json: AsJson = False) -> None:
    """List the formats that are read and written."""
    from amenable.data.formats.format import KINDS
    from amenable.data.formats.table import FORMATS

    rows = [
        {
            "name": entry.name,
            "description": entry.description,
            "reads": [kind for kind in KINDS if entry.reads(kind)],
            "writes": [kind for kind in KINDS if entry.writes(kind)],
        }
        for entry in FORMATS.values()
    ]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']}: {row['description']}")
        typer.echo(f"    reads {_listed(row['reads'])}; writes {_listed(row['writes'])}")


@contextmanager
def _sigterm_cleans_up() -> Iterator[None]:
    """Lets a SIGTERM end the command as an error does: what is half-written is removed.

    Python runs a handler between two of its instructions. A signal that comes just before the
    process begins to wait for a pipe would be seen when the pipe next gives something, perhaps
    never. So a thread, which the signal wakes, sends it again until the handler has run.
    """
    main = threading.get_ident()
    signals, wakes = os.pipe()
    os.set_blocking(wakes, False)

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough, and cleaning up takes time
        sys.exit(128 + signal.SIGTERM)

    def insist() -> None:
        while number := os.read(signals, 1):
            while number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is end:
                signal.pthread_kill(main, signal.SIGTERM)
                time.sleep(0.1)
        os.close(signals)

    before = signal.signal(signal.SIGTERM, end)
    woken_before = signal.set_wakeup_fd(wakes)
    threading.Thread(target=insist, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        signal.signal(signal.SIGTERM, before)
        os.close(wakes)  # which ends the thread


def _listed(names: object) -> str:
    assert isinstance(names, list)
    return ", ".join(names) or "nothing"


def _kind(kind: str) -> Any:
    from amenable.errors import UsageError

    if kind != "auto" and kind not in _KINDS:
        raise UsageError(f"--as {kind!r}: expected one of {', '.join(_KINDS)}")
    return kind


def _source(
    files: Sequence[str], kind: str, format_name: str, reader: str, column: Sequence[str] | None
) -> SourceConfig:
    """The command line's files and options as a section of a recipe."""
    from amenable.config import data
    from amenable.config.load import build_section
    from amenable.data.formats.table import find_format

    if format_name != "auto":
        find_format(format_name)  # raises before anything is read
    columns = _columns(column or (), kind)
    values: dict[str, Any] = {"files": list(files), "format": format_name, "reader": reader}
    if columns:
        values["columns"] = columns
        kind = _kind_of_columns(columns) if kind == "auto" else kind
    sections = {
        "demonstrations": data.DemonstrationSource,
        "preferences": data.PreferenceSource,
        "prompts": data.PromptSource,
    }
    return build_section(sections.get(_kind(kind), data.SourceConfig), values, "command line")


def _columns(pairs: Sequence[str], kind: str) -> dict[str, Any]:
    """KEY=COLUMN pairs; of `choice_values`, which is a list, commas stand between the values."""
    from amenable.errors import UsageError

    known = _column_keys(kind)
    columns: dict[str, Any] = {}
    for pair in pairs:
        key, equals, name = pair.partition("=")
        if not equals or not key or not name:
            raise UsageError(f"--column {pair!r}: no KEY=COLUMN; write --column choice=label")
        if key not in known:
            raise UsageError(f"--column {pair!r}: expected one of {', '.join(known)} before the =")
        columns[key] = name.split(",") if key == "choice_values" else name
    return columns


def _column_keys(kind: str) -> list[str]:
    """What a column can be named for, of rows of this kind; of any kind if it is not known."""
    from dataclasses import fields

    from amenable.config import data

    maps: dict[str, list[type[data.PromptColumns]]] = {
        "demonstrations": [data.DemonstrationColumns],
        "preferences": [data.PreferenceColumns],
        "prompts": [data.PromptColumns],
    }
    every = [data.DemonstrationColumns, data.PreferenceColumns]
    return list(dict.fromkeys(f.name for cls in maps.get(kind, every) for f in fields(cls)))


def _kind_of_columns(columns: dict[str, Any]) -> str:
    if {"candidate_0", "candidate_1", "choice"} & set(columns):
        return "preferences"
    return "demonstrations" if "output_text" in columns else "prompts"


def _parts(source: SourceConfig, kind: str, log: type[ReadLog] | None = None) -> dict[str, Part]:
    """A set of rows for each file; a faulty row ends the reading, unless `log` goes on."""
    from dataclasses import replace

    from amenable.data.reading.sources import find_sources

    return {
        file.shown: _part(replace(source, files=(file.name,)), kind, log)
        for file in find_sources(source.files)
    }


def _part(source: SourceConfig, kind: str, log: type[ReadLog] | None = None) -> Part:
    def rows() -> Iterator[tuple[str, Item]]:
        from amenable.data.reading.read_log import ReadLog
        from amenable.data.reading.readers import iter_items

        for row, item in iter_items(source, _kind(kind), (log or ReadLog)()):
            yield f"{row.path}:{row.line}", item

    return rows


def _content(source: SourceConfig, kind: str, read: Sequence[str], held_out: Sequence[str]) -> Any:
    """What the good rows say of the files that the check could read, which are named as shown."""
    from dataclasses import replace

    from amenable.data.content.report import content_report
    from amenable.data.reading.check import good_rows
    from amenable.data.reading.read_log import DroppingLog
    from amenable.data.reading.sources import Source, find_usable
    from amenable.errors import UsageError

    def part(file: Source) -> Part:
        if file.is_pipe:
            told = "is a pipe, gone when it has been read once; write it to a file and check that"
            raise UsageError(f"--content: {file.shown} {told}")
        return lambda: (
            (f"{row.path}:{row.line}", item) for row, item in good_rows(file, source, _kind(kind))
        )

    parts = {file.shown: part(file) for file in find_usable(source.files) if file.shown in read}
    if both := parts.keys() & {file.shown for file in find_usable(held_out)}:
        raise UsageError(
            f"--held-out: {min(both)} is also among the files to train on; take it out"
        )
    held = _parts(replace(source, files=tuple(held_out)), kind, DroppingLog) if held_out else {}
    return content_report(parts | held, held_out=held.keys())


def _finding_lines(findings: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Findings as the terminal shows them."""
    for found in findings:
        yield f"{found['level']}: {found['text']}"
        yield f"    {found['means']} {found['try']}"
        for example in found["examples"]:
            place = example.get("place", "") if isinstance(example, dict) else example
            text = example.get("text", "") if isinstance(example, dict) else ""
            yield f"    {place}  {text}".rstrip()


def _recipe_and_sources(
    files: Sequence[str], kind: str, format_name: str, reader: str, column: Sequence[str] | None
) -> tuple[Recipe, list[tuple[SourceConfig, str]]]:
    """The rendering, and which rows to show: a recipe's, or the files' with the defaults."""
    from amenable.config.load import load_recipe
    from amenable.config.recipe import Recipe

    if len(files) == 1 and files[0].endswith(".toml"):
        recipe = load_recipe(files[0])
        named = [(getattr(recipe.data, name), name) for name in _KINDS]
        return recipe, [(source, name) for source, name in named if source]
    return Recipe(), [(_source(files, kind, format_name, reader, column), kind)]


def _with_model(recipe: Recipe, model: str | None) -> Recipe:
    from dataclasses import replace

    return recipe if model is None else replace(recipe, model=replace(recipe.model, base=model))


def _show(
    recipe: Recipe,
    sources: Sequence[tuple[SourceConfig, str]],
    rows: int,
    html: Path | None,
    as_json: bool,
) -> None:
    from amenable.data.render import Renderer
    from amenable.data.schemas import Demonstration, Preference, Prompt
    from amenable.data.tokens.report import token_report
    from amenable.data.tokens.show import first_of_each_kind, rows_as_json, show_html, show_rows
    from amenable.models.load import eos_ids, load_tokenizer
    from amenable.models.pull import resolve_base

    base = resolve_base(recipe.model.base)
    tokenizer = load_tokenizer(base)
    renderer = Renderer.from_recipe(recipe, tokenizer, eos_ids(base, tokenizer))
    shown = first_of_each_kind(_items(sources), rows)
    report = token_report(
        renderer,
        prompts=_items(sources, Prompt),
        demonstrations=_items(sources, Demonstration),
        preferences=_items(sources, Preference),
    )
    if as_json:
        _print_json({"rows": rows_as_json(renderer, shown), "tokens": report})
    elif html is not None:
        from amenable.artifacts import write_text

        write_text(html, show_html(renderer, shown))
        typer.echo(f"wrote {html}")
    else:
        from rich.console import Console

        show_rows(renderer, shown, Console())
    if not as_json:
        typer.echo("\n".join(_finding_lines(report["findings"])))


def _items(
    sources: Sequence[tuple[SourceConfig, str]], kind: type[Item] | None = None
) -> Iterator[Any]:
    """All rows, or those of one kind; reads the files anew."""
    for source, name in sources:
        for _, item in _part(source, name)():
            if kind is None or type(item) is kind:
                yield item


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
