"""`amenable report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amenable.cli.options import AsJson

EXAMPLE = "Example: amenable report runs/demo"


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html again from what a run folder holds."""
    from amenable.artifacts import RunFolder
    from amenable.errors import UsageError
    from amenable.evaluate.report import render

    run = RunFolder(folder)
    if not run.recipe_path.exists():
        raise UsageError(f"{folder}: no run folder (recipe.toml is missing); name one, runs/demo")
    render(run)
    typer.echo(f'{{"report": "{run.report_path}"}}' if as_json else str(run.report_path))
