"""`amenable plan`: what a run would take, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amenable.cli.options import AsJson, Overrides

EXAMPLE = "Example: amenable plan recipe.toml --hardware rtx4090"


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cpu, l4, rtx4090, a100, h100, h200, or several cards as in 8xh100; "
            "left out: this machine.",
        ),
    ] = "",
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure this machine first, half a minute; kept."),
    ] = False,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A run folder whose rows are measured."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast parameters, tokens, FLOPs, memory, time and disk; no weight is read.

    Says which stages would not fit and which settings would. The base may be one that is not on
    this disk: llama-2-7b, llama-2-13b and llama-2-70b are known by name.
    """
    import json

    from amenable.config.load import load_recipe
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    settings = load_recipe(recipe, list(overrides or ()))

    from amenable.plan.forecast import plan as planned
    from amenable.plan.hardware import hardware as machine_of
    from amenable.plan.text import lines

    machine, data = machine_of(hardware), None if out is None else out / "data"
    found = planned(settings, machine, data=data)
    if calibrate:
        from amenable.plan.calibrate import calibrate as measure
        from amenable.plan.work import grouped

        measure(settings, found.shape, grouped(settings, found.rows))
        found = planned(settings, machine, data=data)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    for line in lines(found):
        typer.echo(line)
