"""`amenable audit`: a judge against people's choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.options import AsJson, on_this_machine

if TYPE_CHECKING:
    from amenable.data.schemas import Preference
    from amenable.evaluate.judge_audit import Row
    from amenable.judges.asking import Look

EXAMPLE = "Example: amenable audit preferences.jsonl --judge smollm2-135m --template answer-1"


def audit(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Preferences that people have given, or rows of RewardBench."
        ),
    ],
    judge: Annotated[
        str, typer.Option("--judge", metavar="JUDGE", help="As of `amenable compare`.")
    ],
    judge_model: Annotated[
        str, typer.Option(metavar="NAME", help="The service's name of the model.")
    ] = "",
    template: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="How a judge that reads is asked.")
    ] = "help-1",
    token_env: Annotated[
        str, typer.Option(metavar="VARIABLE", help="Holds the service's token.")
    ] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Calls to a service in flight.")] = 8,
    rows: Annotated[int, typer.Option(min=0, help="Take the first so many; 0 takes all.")] = 0,
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Where results and replies are kept.")
    ] = "runs/audit",
    seed: Annotated[int, typer.Option(help="Seeds resampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how far a judge agrees with people, before its win rates are believed.

    Replies are kept in OUT as they arrive: the same command again asks nothing twice. A reward
    model on rows of RewardBench or RewardBench 2 is scored as these define it.
    """
    import json
    from dataclasses import asdict

    from amenable.artifacts import Progress, RunFolder, write_json, write_jsonl
    from amenable.cli.rewardbench import audit_on_rewardbench
    from amenable.data.reading.readers import read_preferences
    from amenable.errors import StageError, UsageError
    from amenable.evaluate import judge_audit
    from amenable.evaluate.rewardbench import edition_of, read_items
    from amenable.judges.asking import Pair, ask_both_orders
    from amenable.judges.opening import open_judge
    from amenable.judges.scores import ScoreJudge
    from amenable.judges.store import ReplyStore
    from amenable.judges.template import load_template
    from amenable.pipeline.lock import run_lock
    from amenable.pipeline.preflight import silence_libraries

    folder = on_this_machine(out)
    silence_libraries()
    settings = {"token_env": token_env, "concurrency": concurrency}
    chosen, edition = load_template(template), edition_of(files)
    items = [] if edition is None else read_items(files, edition)
    people = read_preferences(files) if edition is None else []
    with run_lock(RunFolder(folder).lock_path, "folder"):
        opened = open_judge(judge, judge_model, chosen, settings, folder)
        if edition is not None and isinstance(opened, ScoreJudge):
            audit_on_rewardbench(opened, items[:rows] if rows else items, edition, folder, as_json)
            return
        if edition == 2:
            raise UsageError(
                f"--judge: {opened.name} compares two texts, and rows of RewardBench 2 want a "
                "score of each; name a reward model, or a function that scores"
            )
        if edition == 1:
            people = read_preferences(files)
        people = people[:rows] if rows else people
        pairs = [Pair(row.prompt, row.candidate_0, row.candidate_1) for row in people]
        track = Progress().track(2 * len(pairs), f"audit: {opened.name}")
        with closing(ReplyStore(folder / "replies.sqlite")) as store, track as tracker:
            asked = ask_both_orders(opened, pairs, store, tracker.advance)
        judged = list(_rows(people, asked.looks))
        result = {
            "judge": opened.name,
            "identity": opened.identity,
            **judge_audit.audit([row for _, row in judged], seed=seed),
            "left_out": len(people) - len(judged),
            "unanswered": len(asked.unanswered),
        }
        write_jsonl(folder / "audited.jsonl", (asdict(row) for _, row in judged))
        write_jsonl(folder / "disagreements.jsonl", _disagreements(judged, asked.looks))
        write_json(folder / "audit.json", result)
    typer.echo(json.dumps(result, indent=2) if as_json else _shown(result, folder))
    if asked.unanswered:
        raise StageError(
            f"{len(asked.unanswered)} questions went without a reply ({asked.unanswered[0]}); the "
            "same command again asks them alone"
        )


def _rows(people: Sequence[Preference], looks: Sequence[Look]) -> Iterator[tuple[Preference, Row]]:
    """The rows with a valid verdict in both orders."""
    from amenable.data.content.agreement import pair_key
    from amenable.data.schemas import Choice
    from amenable.evaluate.both_orders import Orders
    from amenable.evaluate.judge_audit import Row

    orders = Orders.of(looks)
    scores = dict(zip(orders.prompts, orders.scores.tolist(), strict=True))
    for row in people:
        if row.prompt.id in scores:
            key, turned = pair_key(row.prompt, row.candidate_0, row.candidate_1)
            human = {Choice.FIRST: 0.0, Choice.TIE: 0.5, Choice.SECOND: 1.0}[row.choice]
            words = len(row.candidate_1.split()) - len(row.candidate_0.split())
            longer = 0.5 if not words else float(words > 0)
            judge = scores[row.prompt.id]
            yield row, Row(row.prompt.group, str(key), turned, human, judge, longer)


def _disagreements(
    judged: Sequence[tuple[Preference, Row]], looks: Sequence[Look]
) -> list[dict[str, Any]]:
    """Rows in which the judge is decided and says the other than people, with its replies."""
    replies: dict[str, dict[str, str]] = {}
    for look in looks:
        order = "candidate_1 first" if look.swapped else "candidate_0 first"
        replies.setdefault(look.pair.prompt.id, {})[order] = look.reply.text
    return [
        {
            "id": row.prompt.id,
            "input_text": row.prompt.text,
            "candidate_0": row.candidate_0,
            "candidate_1": row.candidate_1,
            "choice": row.choice.value,
            "replies": replies[row.prompt.id],
        }
        for row, found in judged
        if (found.human - 0.5) * (found.judge - 0.5) < 0
    ]


def _shown(result: Mapping[str, Any], out: Path) -> str:
    """A table for the terminal, with what it means."""
    lines = [f"{result['judge']} against people, {result['rows']} rows"]
    for name in ("accuracy", "precision", "recall", "f1", "kappa", "ac1", "longest_accuracy"):
        value, interval = result[name], result[f"{name}_ci95"]
        label = name.replace("_", " ").replace("longest accuracy", "the longer text wins")
        if value is None:
            lines.append(f"  {label:<22} not defined: one of the two never says so")
        else:
            lines.append(f"  {label:<22} {value:6.3f}  [{interval[0]:.3f}, {interval[1]:.3f}]")
    ceiling = result["people"]
    if ceiling["agreement"] is None:
        lines.append("  people with each other  no pair was judged twice")
    else:
        low, high = ceiling["agreement_ci95"]
        lines.append(
            f"  people with each other {ceiling['agreement']:6.3f}  [{low:.3f}, {high:.3f}], "
            f"{ceiling['pairs']} pairs"
        )
    lines += [f"  {sentence}" for sentence in _meaning(result)]
    return "\n".join([*lines, f"{out / 'audit.json'}, {out / 'disagreements.jsonl'}"])


def _meaning(result: Mapping[str, Any]) -> list[str]:
    """What to make of it."""
    from amenable.evaluate.judge_audit import FEWEST

    found = []
    low, high = result["accuracy_ci95"]
    if result["judge_ties"]:
        found.append(
            f"Undecided in {result['judge_ties']} rows: it said so, or its two orders contradict "
            "each other."
        )
    if high < 0.5:
        found.append("WORSE THAN CHANCE on these rows: it prefers what people do not.")
    elif not result["better_than_chance"]:
        found.append(
            "NO BETTER THAN CHANCE on these rows: its interval holds 0.5. Do not believe its win "
            "rates."
        )
    if result["longest_accuracy"] >= low:
        found.append("The rule that the longer text wins may do as well.")
    if result["decided"] < FEWEST:
        found.append(f"Fewer than {FEWEST} rows: give more before you rely on this.")
    return found
