"""`amenable compare`: systems Side-by-Side, by any judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.options import AsJson
from amenable.data.reading.remote import is_url
from amenable.masking import shown_name

if TYPE_CHECKING:
    from amenable.evaluate.systems import System

EXAMPLE = (
    "Example: amenable compare smollm2-135m runs/demo --prompts prompts.jsonl "
    "--judge http://127.0.0.1:8000/v1 --judge-model my-model"
)


def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE TUNED [MORE]...",
            help="Run folders, models or files of completions; NAME=SOURCE names one.",
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", metavar="FILE", help="Rows with input_text; may be repeated."),
    ] = None,
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="A service's URL, a model (also a reward model's folder), a file.py:function "
            "that scores, or `people`; may be repeated.",
        ),
    ] = None,
    judge_model: Annotated[
        str, typer.Option(metavar="NAME", help="The service's name of the model.")
    ] = "",
    template: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="How a judge that reads is asked.")
    ] = "summary-1",
    token_env: Annotated[
        str, typer.Option(metavar="VARIABLE", help="Holds the service's token.")
    ] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Calls to a service in flight.")] = 8,
    price: Annotated[
        tuple[float, float],
        typer.Option(metavar="IN OUT", help="Of a million tokens to and from a service."),
    ] = (0.0, 0.0),
    out: Annotated[
        str, typer.Option("--out", metavar="DIR|URL", help="Where results and replies are kept.")
    ] = "runs/compare",
    audited: Annotated[
        list[Path] | None,
        typer.Option(
            "--audited", metavar="DIR", help="An audit of the judge: corrects its win rates."
        ),
    ] = None,
    diversity: Annotated[
        int, typer.Option(min=0, help="Prompts that models also answer at temperature 1.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seeds sampling and resampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare systems Side-by-Side: every pair of answers in both orders, prompts as the unit.

    Replies are kept in OUT as they arrive: the same command again goes on where it stopped, and
    asks nothing twice.
    """
    import json

    from amenable.artifacts import Progress
    from amenable.errors import UsageError
    from amenable.evaluate import compare as comparison
    from amenable.evaluate import comparison_page
    from amenable.evaluate.judge_audit import read_audits
    from amenable.evaluate.systems import named_systems
    from amenable.judges.opening import open_judges
    from amenable.judges.scores import ScoreJudge
    from amenable.judges.template import load_template
    from amenable.pipeline.mirror import output_folder
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    named = local_systems(named_systems(systems))
    if not judges:
        raise UsageError("nobody judges; name one with --judge, for example a service's URL")
    chosen = load_template(template)
    settings = {"token_env": token_env, "concurrency": concurrency}
    asked, ready = comparison.read_inputs(named, prompts or [])
    with output_folder(out, Progress().say, "folder") as (folder, _):
        opened = open_judges(judges, judge_model, chosen, settings, folder)
        for judge in opened:
            if isinstance(judge, ScoreJudge) and judge.remark:
                Progress().say(judge.remark)
        options = comparison.Options(seed, price, read_audits(audited or [], opened))
        answers = comparison.answer(named, asked, ready, diversity=diversity, seed=seed)
        comparison.write_completions(folder, answers)
        names = [system.name for system in named]
        compared = comparison.judge_all(opened, names, answers, folder, options)
        comparison.write_results(folder, compared)
        comparison_page.render(folder)
    found = compared.result
    shown = shown_name(out.rstrip("/"))
    typer.echo(json.dumps(found, indent=2) if as_json else _shown(found, shown))
    comparison.check_replies(found, folder)


def local_systems(systems: Sequence[System]) -> list[System]:
    """The systems with run folders and models behind URLs copied to the cache."""
    from dataclasses import replace

    from amenable.pipeline.mirror import MODEL_FILES, local_copy

    return [
        system
        if system.is_file or not is_url(system.source)
        else replace(system, source=str(local_copy(system.source, MODEL_FILES, or_model=True)))
        for system in systems
    ]


def _shown(result: Mapping[str, Any], out: str) -> str:
    """A few lines for the terminal."""
    lines = []
    for row in result["comparisons"]:
        low, high = (f"{end:.3f}" for end in row["win_rate_ci95"])
        bias = row["bias"]
        lines += [
            f"{row['judge']}: {row['b']} against {row['a']} {row['win_rate']:.3f} [{low}, {high}]"
            f" over {row['prompts']} prompts (p {row['p_value']:.2g})",
            f"  wins {row['wins']}, ties {row['ties']}, losses {row['losses']}; at equal length "
            f"{row['length_controlled_win_rate']:.3f}; smallest difference that would show "
            f"{row['smallest_detectable']:.3f}",
            *_corrected(row),
            f"  the judge: first place wins {bias['first_wins']:.3f}, orders contradict each other "
            f"in {bias['flips']:.1%}, no verdict in {row['invalid']:.1%}",
        ]
    for judge, ranking in result["rankings"].items():
        places = ", ".join(f"{row['system']} {row['strength']:+.2f}" for row in ranking)
        lines.append(f"{judge}, all systems: {places}")
    for system, figures in result["diversity"].items():
        lines.append(
            f"{system} at temperature 1: distinct-1 {figures['distinct_1']:.2f}, distinct-2 "
            f"{figures['distinct_2']:.2f}, the same answer again {figures['duplicates']:.1%}"
        )
    return "\n".join([*lines, f"{out}/comparison.html, {out}/comparison.json"])


def _corrected(row: Mapping[str, Any]) -> list[str]:
    if "corrected_win_rate" not in row:
        return []
    if row["corrected_win_rate"] is None:
        return ["  corrected for its errors: not possible, it is no better than chance"]
    low, high = (f"{end:.3f}" for end in row["corrected_ci95"])
    return [f"  corrected for its errors: {row['corrected_win_rate']:.3f} [{low}, {high}]"]
