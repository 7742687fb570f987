"""`amenable models`: the built-in base models."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from amenable.cli.options import AsJson

app = typer.Typer(
    help="List and fetch the built-in base models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("list", epilog="Example: amenable models list")
def list_models(as_json: AsJson = False) -> None:
    """List the built-in base models and whether they are in the cache."""
    from amenable.models import pull

    rows = pull.list_models()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = row["path"] if row["pulled"] else "not pulled"
        typer.echo(f"{row['name']}  {row['parameters']:,} weights, {row['licence']}  {state}")
        typer.echo(f"    {row['description']}")


@app.command("pull", epilog="Example: amenable models pull smollm2-135m")
def pull_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in name.")],
    force: Annotated[
        bool, typer.Option("--force", help="Fetch again even if it is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a built-in base model, convert it once and keep it in the cache (AMENABLE_HOME)."""
    from amenable.models import pull
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    path = str(pull.pull(name, force))
    typer.echo(json.dumps({"name": name, "path": path}) if as_json else path)
