"""The `amenable` command. Each command imports what it runs when it runs: help imports no torch."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

import amenable
from amenable.cli import (
    audit,
    benchmark,
    compare,
    data,
    generate,
    kfp,
    lab,
    models,
    plan,
    report,
    run,
)
from amenable.errors import AmenableError
from amenable.masking import without_secrets

app = typer.Typer(
    name="amenable",
    help="From human choices to a better language model, with proof, on the machine at hand.",
    epilog="Start with: amenable demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog=run.DEMO_EXAMPLE)(run.demo)
app.command("run", epilog=run.RUN_EXAMPLE)(run.run)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.command("audit", epilog=audit.EXAMPLE)(audit.audit)
app.command("benchmark", epilog=benchmark.EXAMPLE)(benchmark.benchmark)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(lab.app, name="lab")
app.add_typer(kfp.app, name="kfp")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"amenable {amenable.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works everywhere.")
    ] = False,
) -> None:
    """From human choices to a better language model, with proof, on the machine at hand."""


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 bad usage or input, 130, 143 stopped."""
    debug = _take_debug_flag(sys.argv)
    try:
        app(prog_name="amenable", obj=debug)
    except AmenableError as error:
        _tell(str(error), debug)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _tell(_defect_message(error), debug)
        sys.exit(1)


def _tell(message: str, debug: bool) -> None:
    """Prints what went wrong, with the traceback if wanted: no secrets, whoever wrote it."""
    if debug:
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
    print(f"amenable: {without_secrets(message)}", file=sys.stderr)


def _take_debug_flag(argv: list[str]) -> bool:
    """Removes --debug from the command line, wherever it stands before a lone `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    found = "--debug" in argv[1:end]
    argv[1:end] = [word for word in argv[1:end] if word != "--debug"]
    return found


def _defect_message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return (
        f"unexpected {type(error).__name__}: {lines[0]}."
        " This is a defect: please report it with what the same command prints under --debug."
    )
