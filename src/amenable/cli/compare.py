"""`amenable compare`: systems Side-by-Side, by any judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.options import AsJson

if TYPE_CHECKING:
    from amenable.data.schemas import Prompt
    from amenable.evaluate.judge_audit import Row as Audited
    from amenable.evaluate.systems import System
    from amenable.judges import Judge
    from amenable.judges.asking import Asked, Look
    from amenable.judges.store import ReplyStore

EXAMPLE = (
    "Example: amenable compare smollm2-135m runs/demo --prompts prompts.jsonl "
    "--judge http://127.0.0.1:8000/v1 --judge-model my-model"
)

Answered = list[tuple["Prompt", dict[str, str]]]
Ready = dict[str, dict[str, tuple["Prompt", str]]]


@dataclass(frozen=True)
class Options:
    """What the analysis needs beside the replies."""

    seed: int
    price: tuple[float, float]


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
        Path, typer.Option("--out", metavar="DIR", help="Where results and replies are kept.")
    ] = Path("runs/compare"),
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

    from amenable.artifacts import Progress, write_json, write_jsonl
    from amenable.errors import StageError, UsageError
    from amenable.evaluate.judged import MOST_INVALID
    from amenable.evaluate.systems import named_systems
    from amenable.judges.opening import open_judge
    from amenable.judges.scores import ScoreJudge
    from amenable.judges.template import load_template
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    named = named_systems(systems)
    if not judges:
        raise UsageError("nobody judges; name one with --judge, for example a service's URL")
    chosen = load_template(template)
    settings = {"token_env": token_env, "concurrency": concurrency}
    asked, ready = _read(named, prompts or [])
    opened = [open_judge(judge, judge_model, chosen, settings, out) for judge in judges]
    for judge in opened:
        if isinstance(judge, ScoreJudge) and judge.remark:
            Progress().say(judge.remark)
    if len({judge.name for judge in opened}) < len(opened):
        raise UsageError("two judges have the same name; compare by one of them at a time")
    audits = _audits(audited or [], opened)
    answered = _answers(named, asked, ready, seed)
    write_jsonl(out / "completions.jsonl", (_row(*answer) for answer in answered))
    names = [system.name for system in named]
    result = _compare(opened, names, answered, out, Options(seed, price), audits)
    result["diversity"] = _diversity(named, (asked or [])[:diversity], seed)
    write_json(out / "comparison.json", result)
    typer.echo(json.dumps(result, indent=2) if as_json else _shown(result, out))
    if result["unanswered"]:
        raise StageError(
            f"{sum(result['unanswered'].values())} questions went without a reply "
            f"({next(iter(result['unanswered']))}); the same command again asks them alone"
        )
    for row in result["comparisons"]:
        if row["invalid"] > MOST_INVALID:
            raise StageError(
                f"{row['judge']} gave no verdict in {row['invalid']:.1%} of its replies, more than "
                f"{MOST_INVALID:.0%}; read them in {out / 'looks.jsonl'}, and change --template"
            )


def _row(prompt: Prompt, completions: Mapping[str, str]) -> dict[str, Any]:
    return {"id": prompt.id, "input_text": prompt.text, "completions": dict(completions)}


def _read(systems: Sequence[System], files: Sequence[str]) -> tuple[list[Prompt] | None, Ready]:
    """Prompts and ready completions: what can be wrong with them is told before a model is loaded.

    Raises:
        UsageError: a model has no prompts to answer.
        DataError: a row is wrong, or a file lacks a prompt.
    """
    from amenable.data.reading.readers import read_prompts
    from amenable.errors import UsageError
    from amenable.evaluate.systems import gather, read_completions

    models = [system for system in systems if not system.is_file]
    if models and not files:
        raise UsageError(f"{models[0].name} has nothing to answer; name prompts with --prompts")
    asked = read_prompts(files) if files else None
    ready = {s.name: read_completions(s.source) for s in systems if s.is_file}
    if ready:
        list(gather([system for system in systems if system.is_file], asked, {}, ready))
    return asked, ready


def _answers(
    systems: Sequence[System], asked: list[Prompt] | None, ready: Ready, seed: int
) -> Answered:
    """Every system's completion of every prompt."""
    from amenable.cli.generate import complete, model_source, recipe_of
    from amenable.evaluate.systems import gather

    answers = {}
    for system in systems:
        if not system.is_file:
            source = model_source(system.source)
            recipe = recipe_of(source, None)
            rows = complete(source, asked or [], recipe, {"temperature": 0.0}, seed)
            answers[system.name] = {row["id"]: row["completion"] for row in rows}
    return list(gather(systems, asked, answers, ready))


def _compare(
    judges: Sequence[Judge],
    names: Sequence[str],
    answered: Answered,
    out: Path,
    options: Options,
    audits: Mapping[str, list[Audited]],
) -> dict[str, Any]:
    """All pairs of systems by all judges, and with three systems or more their ranking."""
    from amenable.artifacts import write_jsonl
    from amenable.evaluate.judged import games, judged
    from amenable.evaluate.ranking import rank
    from amenable.judges.asking import Pair
    from amenable.judges.people import SheetJudge
    from amenable.judges.store import ReplyStore

    comparisons, rankings, looks = [], {}, []
    unanswered: Counter[str] = Counter()
    with closing(ReplyStore(out / "replies.sqlite")) as store:
        for judge in judges:
            if isinstance(judge, SheetJudge):  # one sheet for all pairs of systems
                shown = [
                    Pair(prompt, texts[a], texts[b]).question(False)
                    for a, b in combinations(names, 2)
                    for prompt, texts in answered
                    if texts[a] != texts[b]
                ]
                judge.expect(shown)
            played = []
            for a, b in combinations(names, 2):
                asked = _ask(judge, a, b, answered, store)
                unanswered.update(asked.unanswered)
                looks += [_look(judge.name, a, b, look) for look in asked.looks]
                row = judged(
                    a, b, judge.name, asked.looks, seed=options.seed, audited=audits.get(judge.name)
                )
                comparisons.append(row | _spent(asked, options.price))
                played += games(a, b, asked.looks)
            if len(names) > 2:
                rankings[judge.name] = rank(played).rows()
    write_jsonl(out / "looks.jsonl", looks)
    return {"comparisons": comparisons, "rankings": rankings, "unanswered": dict(unanswered)}


def _audits(folders: Sequence[Path], judges: Sequence[Judge]) -> dict[str, list[Audited]]:
    """Audited rows by judge.

    Raises:
        UsageError: an audit of nobody who judges here, or of the same judge asked another way.
        DataError: a folder has no audit.
    """
    from amenable.artifacts import read_json, read_jsonl
    from amenable.errors import UsageError
    from amenable.evaluate.judge_audit import Row

    found = {}
    for folder in folders:
        about = read_json(folder / "audit.json")
        judge = next((judge for judge in judges if judge.name == about["judge"]), None)
        if judge is None:
            raise UsageError(
                f"--audited {folder}: is of {about['judge']!r}, who does not judge here"
            )
        if about["identity"] != judge.identity:
            raise UsageError(
                f"--audited {folder}: {judge.name} was asked another way (template, sampling or "
                "service) than it is here; audit it as it judges"
            )
        found[judge.name] = [Row(**row) for row in read_jsonl(folder / "audited.jsonl")]
    return found


def _diversity(
    systems: Sequence[System], prompts: Sequence[Prompt], seed: int
) -> dict[str, dict[str, float]]:
    """Of the models' answers at temperature 1: greedy answers hide that a model says one thing."""
    from amenable.cli.generate import complete, model_source, recipe_of
    from amenable.evaluate.statistics import text_diversity

    found = {}
    for system in systems:
        if prompts and not system.is_file:
            source = model_source(system.source)
            rows = complete(source, prompts, recipe_of(source, None), {"temperature": 1.0}, seed)
            found[system.name] = text_diversity([row["completion"] for row in rows])
    return found


def _ask(judge: Judge, a: str, b: str, answered: Answered, store: ReplyStore) -> Asked:
    from amenable.artifacts import Progress
    from amenable.judges.asking import Pair, ask_both_orders

    pairs = [Pair(prompt, texts[a], texts[b]) for prompt, texts in answered]
    with Progress().track(2 * len(pairs), f"compare: {judge.name}, {a} and {b}") as tracker:
        return ask_both_orders(judge, pairs, store, tracker.advance)


def _look(judge: str, a: str, b: str, look: Look) -> dict[str, Any]:
    reply = look.reply
    return {
        "judge": judge,
        "a": a,
        "b": b,
        "id": look.pair.prompt.id,
        "first": b if look.swapped else a,
        "verdict": str(reply.verdict),
        "confidence": reply.confidence,
        "reply": reply.text,
    }


def _spent(asked: Asked, price: tuple[float, float]) -> dict[str, Any]:
    """Tokens and money of all replies, and how many of them were asked for now."""
    read = sum(look.reply.prompt_tokens for look in asked.looks)
    written = sum(look.reply.completion_tokens for look in asked.looks)
    return {
        "calls": asked.calls,
        "prompt_tokens": read,
        "completion_tokens": written,
        "cost": (read * price[0] + written * price[1]) / 1e6,
    }


def _shown(result: Mapping[str, Any], out: Path) -> str:
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
    return "\n".join([*lines, f"{out / 'comparison.json'}"])


def _corrected(row: Mapping[str, Any]) -> list[str]:
    if "corrected_win_rate" not in row:
        return []
    if row["corrected_win_rate"] is None:
        return ["  corrected for its errors: not possible, it is no better than chance"]
    low, high = (f"{end:.3f}" for end in row["corrected_ci95"])
    return [f"  corrected for its errors: {row['corrected_win_rate']:.3f} [{low}, {high}]"]
