"""`amenable report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from amenable.cli.options import AsJson

EXAMPLE = "Example: amenable report runs/demo"


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="A run folder, or several; with --check also a log of another trainer.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the page of several runs goes.  [default: runs]"
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

    if len(folders) > 1 and not check:
        several(folders, out or Path("runs"), as_json)
        return
    if len(folders) > 1 or out is not None:
        raise UsageError("--check takes one folder" if check else "--out: goes with several runs")
    folder = folders[0]
    if check:
        _check(folder, tags, as_json)
        return
    if tags is not None:
        raise UsageError("--tags: goes with --check")
    from amenable.artifacts import RunFolder
    from amenable.evaluate.report import render

    run = RunFolder(folder)
    if not run.recipe_path.exists():
        raise UsageError(f"{folder}: no run folder (recipe.toml is missing); name one, runs/demo")
    render(run)
    typer.echo(f'{{"report": "{run.report_path}"}}' if as_json else str(run.report_path))


def several(folders: Sequence[Path], out: Path, as_json: bool) -> None:
    """Write `report.html` and `runs.json` of several runs into a folder.

    Raises:
        UsageError: a folder is no run folder, or is named twice.
    """
    from amenable.artifacts import write_json, write_text
    from amenable.errors import UsageError
    from amenable.evaluate.many_runs import gather, page

    for folder in folders:
        if not (folder / "recipe.toml").is_file():
            raise UsageError(f"{folder}: no run folder (recipe.toml is missing)")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("a run is named twice")
    found = gather(folders)
    write_json(out / "runs.json", found)
    write_text(out / "report.html", page(folders, found))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for row in found["spread"]:
        typer.echo(
            f"{row['b']} against {row['a']}: wins {row['mean']:.3f} over {len(row['seeds'])} seeds "
            f"(standard deviation {row['standard_deviation']:.3f}, {row['lowest']:.3f} to "
            f"{row['highest']:.3f}), judged by {row['judge']}"
        )
    typer.echo(f"report: {out / 'report.html'}")


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
