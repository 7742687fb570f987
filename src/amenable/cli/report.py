"""`amenable report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from amenable.cli.options import AsJson
from amenable.masking import shown_name
from amenable.progress import Progress

SEVERAL_FILES = ("runs.json", "report.html")
"""What is written of several runs, in a folder that may hold the runs themselves."""

EXAMPLE = "Example: amenable report runs/demo"


def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="A run folder or its URL, or several; with --check also a log of another trainer.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR|URL", help="Where the page of several runs goes.  [default: runs]"
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Ask the health rules instead; exit code 1 if one speaks."),
    ] = False,
    tags: Annotated[
        Path | None,
        typer.Option("--tags", metavar="FILE", help="Map of another trainer's tags, TOML."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html again from what a run folder holds, or check the health of its figures.

    Several run folders make one page: their results and curves beside each other, and how far
    seeds alone move them.
    """
    from amenable.errors import UsageError
    from amenable.pipeline.mirror import REPORT_FILES, local_copy, mirrored, place

    if len(folders) > 1 and not check:
        several([place(folder) for folder in folders], place(out or "runs"), as_json)
        return
    if len(folders) > 1 or out is not None:
        raise UsageError("--check takes one folder" if check else "--out: goes with several runs")
    where = place(folders[0])
    if check:
        _check(local_copy(where, REPORT_FILES), tags, as_json)
        return
    if tags is not None:
        raise UsageError("--tags: goes with --check")
    if isinstance(where, str):
        local_copy(where, REPORT_FILES)  # before anything is written: is there a run?
        with mirrored(where, Progress().say, REPORT_FILES) as mirror:
            _render(mirror.root)
        page = f"{shown_name(where.rstrip('/'))}/report.html"
    else:
        page = _render(where)
    typer.echo(json.dumps({"report": page}) if as_json else page)


def _render(folder: Path) -> str:
    """Draws the page of a run folder; where it is."""
    from amenable.artifacts import RunFolder
    from amenable.errors import UsageError
    from amenable.evaluate.report import render

    run = RunFolder(folder)
    if not run.recipe_path.exists():
        raise UsageError(f"{folder}: no run folder (recipe.toml is missing); name one, runs/demo")
    render(run)
    return str(run.report_path)


def several(places: Sequence[Path | str], out: Path | str, as_json: bool) -> None:
    """Write `report.html` and `runs.json` of several runs into a folder.

    Raises:
        UsageError: a folder is no run folder, or is named twice.
    """
    from amenable.pipeline.mirror import REPORT_FILES, local_copy, mirrored

    folders = [local_copy(where, REPORT_FILES) for where in places]
    if isinstance(out, str):
        with mirrored(out, Progress().say, SEVERAL_FILES) as mirror:
            found = _write_several(places, folders, mirror.root)
    else:
        found = _write_several(places, folders, out)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for row in found["spread"]:
        typer.echo(
            f"{row['b']} against {row['a']}: wins {row['mean']:.3f} over {len(row['seeds'])} seeds "
            f"(standard deviation {row['standard_deviation']:.3f}, {row['lowest']:.3f} to "
            f"{row['highest']:.3f}), judged by {row['judge']}"
        )
    typer.echo(f"report: {shown_name(str(out).rstrip('/'))}/report.html")


def _write_several(
    places: Sequence[Path | str], folders: Sequence[Path], out: Path
) -> dict[str, Any]:
    """What was written as `runs.json`."""
    from amenable.artifacts import write_json, write_text
    from amenable.errors import UsageError
    from amenable.evaluate.many_runs import gather, page

    for folder in folders:
        if not (folder / "recipe.toml").is_file():
            raise UsageError(f"{folder}: no run folder (recipe.toml is missing)")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("a run is named twice")
    found = gather(folders)
    for row, where in zip(found["runs"], places, strict=True):
        row["folder"] = shown_name(str(where))
    write_json(out / "runs.json", found)
    write_text(out / "report.html", page(folders, found))
    return found


def _check(path: Path, tags: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from amenable.health.logs import open_logs
    from amenable.health.rules import RULES
    from amenable.health.watch import check_rows

    logs = open_logs(path, tags)
    found = [finding for log in logs for finding in check_rows(log.stage, log.rows)]
    asked: dict[str, int] = {}
    for log in logs:
        figures = {key.removeprefix(f"{log.stage}/") for row in log.rows for key in row}
        asked[log.stage] = sum(
            log.stage in rule.stages
            and all(any(name in figures for name in need.split("|")) for need in rule.needs)
            for rule in RULES
        )
    if as_json:
        typer.echo(
            json.dumps({"rules_asked": asked, "health": [asdict(row) for row in found]}, indent=2)
        )
    else:
        for log in logs:
            typer.echo(
                f"{log.source}: {len(log.rows)} rows of {log.stage}, {asked[log.stage]} rules asked"
            )
        for row in found:
            typer.echo(f"{row.stage}, step {row.step}: {row.level} {row.rule}: {row.message}")
        if not found:
            typer.echo("no rule speaks")
    if found:
        raise typer.Exit(1)
