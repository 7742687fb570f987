"""`amenable kfp`: a recipe as a Kubeflow pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amenable.cli.options import AsJson, Out, Overrides

COMPILE_EXAMPLE = "Example: amenable kfp compile recipe.toml pipeline.yaml --set kfp.gpus=1"
RUN_EXAMPLE = "Example: amenable kfp run recipe.toml --out runs/first"

app = typer.Typer(
    help="A recipe as a Kubeflow pipeline; needs the extra `kfp`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")]


@app.command("compile", epilog=COMPILE_EXAMPLE)
def compile_recipe(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(metavar="OUT.yaml", help="The compiled pipeline.")],
    overrides: Overrides = None,
) -> None:
    """Write a recipe as a pipeline: one component a stage, around `amenable run --only`.

    The recipe's text and the run folder are parameters of the pipeline; image, volume, GPUs, memory
    and retries come from its section [kfp].
    """
    from amenable.pipeline import kfp
    from amenable.pipeline.kfp_tasks import stages_of

    text, loaded = kfp.load(recipe, list(overrides or ()))
    kfp.compile_to(text, loaded, out)
    typer.echo(f"{out}: {', '.join(stages_of(loaded))}")


@app.command("run", epilog=RUN_EXAMPLE)
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe's pipeline on this machine, without Docker; what is done is cached.

    The run folder is as `amenable run` leaves it, and either command goes on where the other
    stopped.
    """
    import json

    from amenable.artifacts import Progress, RunFolder, read_json
    from amenable.cli.run import result_lines
    from amenable.errors import UsageError
    from amenable.pipeline import kfp
    from amenable.pipeline.kfp_local import run_pipeline
    from amenable.pipeline.mirror import place

    text, loaded = kfp.load(recipe, list(overrides or ()))
    folder = place(out or f"runs/{loaded.name}")
    if isinstance(folder, str):
        raise UsageError("--out: the tasks exchange paths; name a folder, or use amenable run")
    values = {"recipe": text, "run_folder": str(folder)}
    pipeline = kfp.recipe_pipeline(loaded)
    run_pipeline(pipeline, values, folder / "kfp", Progress().say, caching=loaded.kfp.caching)
    summary = read_json(RunFolder(folder).summary_path)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    for line in result_lines(summary, folder):
        typer.echo(line)
