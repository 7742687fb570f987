"""`amenable lab`: algorithms against closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from amenable.cli.options import AsJson

app = typer.Typer(
    help="Measure the algorithms where the truth is known.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def lab() -> None:
    """Measure the algorithms where the truth is known."""


@app.command("exact", epilog="Example: amenable lab exact --only ppo,rloo --seeds 1")
def exact(
    only: Annotated[
        str, typer.Option(metavar="NAMES", help="Algorithms, with commas between.  [default: all]")
    ] = "",
    problems: Annotated[
        str, typer.Option(metavar="NAMES", help="Problems, with commas between.  [default: all]")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Write exact.json, exact.txt and exact.svg there."
        ),
    ] = None,
    planted: Annotated[
        bool, typer.Option("--planted", help="Break the code on purpose; see which check notices.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every algorithm on problems small enough to enumerate, and see where it lands.

    Exit code 1 when a row misses its bound, or a control that must fail does not.
    """
    from amenable.artifacts import Progress, write_json, write_text
    from amenable.lab import exact as frame
    from amenable.lab.report import picture, table, verdict
    from amenable.lab.rows import Options, Row
    from amenable.lab.settings import KL_BOUND
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    rows = list[Row]()
    if planted:
        from amenable.lab.planted import run_planted

        rows = run_planted()
    else:
        options = Options(_names(only), _names(problems), seeds, workers)
        with Progress().track(len(frame.jobs(options)), "lab") as bar:
            for found in frame.run(options):
                rows += found
                bar.advance(1)
        rows = frame.in_order(rows)
    text = table(rows)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "exact.json", frame.to_json(rows))
        write_text(out / "exact.txt", text + "\n")
        write_text(out / "exact.svg", picture(rows, KL_BOUND))
    typer.echo(json.dumps(frame.to_json(rows), indent=2) if as_json else text)
    if not verdict(rows):
        raise typer.Exit(1)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
