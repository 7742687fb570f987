"""`amenable lab`: algorithms against closed forms, and over-optimisation where gold is known."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from amenable.cli.options import AsJson, on_this_machine

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
        str | None,
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

    folder = None if out is None else on_this_machine(out)
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
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "exact.json", frame.to_json(rows))
        write_text(folder / "exact.txt", text + "\n")
        write_text(folder / "exact.svg", picture(rows, KL_BOUND))
    typer.echo(json.dumps(frame.to_json(rows), indent=2) if as_json else text)
    if not verdict(rows):
        raise typer.Exit(1)


@app.command("overoptimize", epilog="Example: amenable lab overoptimize --out runs/over")
def overoptimize(
    seeds: Annotated[int, typer.Option(min=1, help="Worlds, from seed 0 on.")] = 5,
    algorithm: Annotated[
        str, typer.Option(metavar="NAME", help="Any algorithm that samples.")
    ] = "ppo",
    pairs: Annotated[
        int, typer.Option(min=40, max=900, help="Choices that the reward model learns from.")
    ] = 120,
    updates: Annotated[int, typer.Option(min=10, help="Of the policy; a long run.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Write overoptimize.json, overoptimize.txt and overoptimize.svg there.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tune tiny models on a learned reward for too long; show proxy, gold, and which pick is best.

    Exit code 1 when gold does not fall in the end, or the checkpoint that is chosen by gold gives
    away more than a tenth of the gain, on more than a fifth of the seeds.
    """
    from dataclasses import asdict

    from amenable.algorithms import ALGORITHMS
    from amenable.artifacts import Progress, write_json, write_text
    from amenable.errors import UsageError
    from amenable.lab.overoptimization import Settings, run
    from amenable.lab.overoptimization_report import passed, picture, table
    from amenable.pipeline.preflight import silence_libraries

    folder = None if out is None else on_this_machine(out)
    able = [name for name, row in ALGORITHMS.items() if row.learns_from == "prompts"]
    if algorithm not in able:
        raise UsageError(f"--algorithm: {algorithm!r} does not sample; choose from {able}")
    silence_libraries()
    settings = Settings(algorithm=algorithm, pairs=pairs, updates=updates)
    results = []
    with Progress().track(seeds, "lab") as bar:
        for result in run(settings, range(seeds), workers):
            results.append(result)
            bar.advance(1)
    results.sort(key=lambda result: result.seed)
    found = {
        "settings": asdict(settings),
        "seeds": [{**asdict(result), "gold_falls": result.falls} for result in results],
        "passed": passed(results),
    }
    text = table(results)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "overoptimize.json", found)
        write_text(folder / "overoptimize.txt", text + "\n")
        write_text(folder / "overoptimize.svg", picture(results))
    typer.echo(json.dumps(found, indent=2) if as_json else text)
    if not passed(results):
        raise typer.Exit(1)


@app.command("health", epilog="Example: amenable lab health --healthy 20 --out runs/health")
def health(
    healthy: Annotated[int, typer.Option(min=1, help="Healthy runs.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the first world; the others follow.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Write health.json and health.txt there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plant faults into tiny runs and see which health rule speaks, and how often for no reason.

    Exit code 1 when two faults or more are not caught before half of their stage, or more than one
    healthy run in twenty has a false alarm.
    """
    from dataclasses import asdict

    from amenable.artifacts import Progress, write_json, write_text
    from amenable.lab.health import FAULTS, false_alarm_interval, passed, run, table

    folder = None if out is None else on_this_machine(out)
    outcomes = []
    with Progress().track(len(FAULTS) + healthy, "lab") as bar:
        for outcome in run(healthy, seed, workers):
            outcomes.append(outcome)
            bar.advance(1)
    alarms = sum(kind == "healthy" and bool(row.caught_by) for kind, row in outcomes)
    found = {
        "faults": [
            {**asdict(row), "caught": row.caught} for kind, row in outcomes if kind == "fault"
        ],
        "healthy": [asdict(row) for kind, row in outcomes if kind == "healthy"],
        "false_alarms": alarms,
        "false_alarm_rate_ci95": false_alarm_interval(alarms, healthy),
        "passed": passed(outcomes),
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "health.json", found)
        write_text(folder / "health.txt", table(outcomes) + "\n")
    typer.echo(json.dumps(found, indent=2) if as_json else table(outcomes))
    if not passed(outcomes):
        raise typer.Exit(1)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
