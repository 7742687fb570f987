"""`amenable run` and `amenable demo`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.options import AsJson, MaxMinutes, On, Out, Overrides, Seed
from amenable.masking import shown_name
from amenable.ranks.launch import leads

if TYPE_CHECKING:
    from amenable.config.recipe import Recipe

RUN_EXAMPLE = "Example: amenable run recipe.toml --set policy.updates=50 --out runs/first"
DEMO_EXAMPLE = "Example: amenable demo --out runs/demo --seed 1 --max-minutes 15"


def demo(
    out: Out = "runs/demo",
    seed: Seed = None,
    overrides: Overrides = None,
    max_minutes: MaxMinutes = None,
    as_json: AsJson = False,
) -> None:
    """Take a built-in model and task through every stage: minutes on a laptop, no account."""
    from amenable.examples_folder import example

    _run(
        example("demo.toml"),
        overrides,
        out=out,
        seed=seed,
        max_minutes=max_minutes,
        as_json=as_json,
    )


def run(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A TOML file.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    seed: Seed = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="One run each, in OUT/seed-N, and a page of all of them."
        ),
    ] = "",
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage alone.")] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")
    ] = None,
    max_minutes: MaxMinutes = None,
    as_json: AsJson = False,
    processes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Share the work of N processes of this machine.")
    ] = 1,
    on: On = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every recipe key and stop.")] = False,
) -> None:
    """Run a recipe; run again to go on from where it stopped.

    The stages are data, sft, collect, reward, policy, evaluate and report. What is done and
    unchanged is skipped. The run folder is runs/NAME unless --out says otherwise; data paths in
    the recipe are meant from the current directory.
    """
    if keys:
        _list_keys(as_json)
        return
    if recipe is None:
        raise typer.BadParameter("which recipe? Try: amenable run examples/tiny.toml")
    if processes > 1:
        _run_in(processes, on, lambda: _recipe(recipe, overrides, seed), debug=bool(context.obj))
    if seeds:
        numbers = _numbers(seeds, seed)
        _run_seeds(recipe, overrides, out, numbers, (only, until), max_minutes, as_json, on)
        return
    _run(
        recipe,
        overrides,
        out=out,
        seed=seed,
        only=only,
        until=until,
        max_minutes=max_minutes,
        as_json=as_json,
        on=on,
    )


def _run_in(processes: int, on: str | None, look: Callable[[], Recipe], *, debug: bool) -> None:
    """The same command line in several processes; ends with their exit code.

    What is wrong with the recipe is told here, once.
    """
    import sys

    from amenable.errors import UsageError
    from amenable.pipeline.preflight import check_inputs
    from amenable.ranks.launch import run_processes, seat

    if on:
        raise UsageError("--processes and --on exclude each other; on Ray, ray.workers counts")
    if seat() is not None:
        raise UsageError("--processes: this is one of several processes already; leave it out")
    check_inputs(look())
    words: list[str] = []
    for word in sys.argv[1:]:
        if words and words[-1] == "--processes":
            words.pop()
        elif not word.startswith("--processes="):
            words.append(word)
    words += ["--debug"] * debug
    raise typer.Exit(run_processes(processes, ["-m", "amenable", *words]))


def _run(
    path: Path,
    overrides: Sequence[str] | None,
    *,
    out: str | None,
    seed: int | None,
    only: str | None = None,
    until: str | None = None,
    max_minutes: float | None = None,
    as_json: bool = False,
    on: str | None = None,
) -> None:
    from amenable.pipeline.mirror import place

    recipe = _recipe(path, overrides, seed)
    folder = place(out or f"runs/{recipe.name}")
    summary = _runner(on)(recipe, folder, only=only, until=until, max_minutes=max_minutes)
    if not leads():
        return
    if as_json:
        _print_json(summary)
        return
    for line in result_lines(summary, folder):
        typer.echo(line)


def _recipe(path: Path, overrides: Sequence[str] | None, seed: int | None) -> Recipe:
    from amenable.config.load import load_recipe

    settings = list(overrides or ())
    settings += [] if seed is None else [f"seed={seed}"]
    return load_recipe(path, settings)


def _runner(on: str | None) -> Callable[..., dict[str, Any]]:
    """What runs a recipe: this process, or a cluster."""
    if on is None:
        from amenable.pipeline import local

        return local.run
    from amenable.pipeline import ray

    return partial(ray.run, on=on)


def _numbers(seeds: str, seed: int | None) -> list[int]:
    """Raises UsageError: no list of different numbers, or beside --seed."""
    from amenable.errors import UsageError

    words = [word.strip() for word in seeds.split(",")]
    if seed is not None:
        raise UsageError("--seed and --seeds: give one of them")
    if not all(word.isdigit() for word in words) or len(set(words)) < len(words):
        raise UsageError(f"--seeds: found {seeds!r}; expected different numbers, as 0,1,2")
    return [int(word) for word in words]


def _run_seeds(
    path: Path,
    overrides: Sequence[str] | None,
    out: str | None,
    seeds: Sequence[int],
    stages: tuple[str | None, str | None],
    max_minutes: float | None,
    as_json: bool,
    on: str | None,
) -> None:
    """One run after the other; what is done is skipped when the command is given again."""
    from amenable.cli.report import several
    from amenable.config.load import load_recipe
    from amenable.pipeline.mirror import place

    only, until = stages
    folders: list[Path | str] = []
    for seed in seeds:
        recipe = load_recipe(path, [*(overrides or ()), f"seed={seed}"])
        root = out or f"runs/{recipe.name}"
        folders.append(place(f"{root.rstrip('/')}/seed-{seed}"))
        summary = _runner(on)(recipe, folders[-1], only=only, until=until, max_minutes=max_minutes)
        if leads() and not as_json:
            typer.echo(f"seed {seed}")
            for line in result_lines(summary, folders[-1]):
                typer.echo(f"  {line}")
    if leads() and len(folders) > 1:
        several(folders, place(root), as_json)


def result_lines(summary: dict[str, Any], folder: Path | str) -> list[str]:
    """The result of a run in a few lines: the comparisons, the reward model, where to read on."""
    lines = []
    reward = summary.get("reward")
    if reward and reward.get("accuracy") is not None:
        pairs = f"on {reward['pairs_eval']} held-out pairs"
        accuracy = _share(reward["accuracy"], reward["accuracy_ci95"])
        lines.append(f"reward model: accuracy {accuracy} {pairs}")
    for row in summary.get("evaluate") or ():
        wins = _share(row["win_rate"], row["win_rate_ci95"])
        judged = f"on {row['prompts']} prompts, judged by {row['judge']}"
        lines.append(f"{row['b']} against {row['a']}: wins {wins} {judged}")
    if isinstance(folder, str):
        lines.append(f"report: {shown_name(folder.rstrip('/'))}/report.html")
    elif (folder / "report.html").exists():
        lines.append(f"report: {folder / 'report.html'}")
    return lines


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "unknown"
    if not interval:
        return f"{value:.3f}"
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _list_keys(as_json: bool) -> None:
    from dataclasses import asdict

    from amenable.config.load import recipe_keys

    if as_json:
        _print_json([asdict(key) for key in recipe_keys()])
        return
    for key in recipe_keys():
        typer.echo(f"{key.key} = {key.default!r}  ({key.type_text})\n    {key.help}")


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
