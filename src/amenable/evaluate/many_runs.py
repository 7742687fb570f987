"""Several runs beside each other: what each says, and how far seeds alone move it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup
from scipy.stats import t as student

from amenable.artifacts import Json, RunFolder
from amenable.evaluate import curves, report_data
from amenable.evaluate.curves import Series
from amenable.evaluate.pages import environment, frame
from amenable.evaluate.report_data import Run

CURVES = (
    ("sft", "loss", "training loss of fine-tuning", "nats a token"),
    ("reward", "rank_loss", "training loss of the reward model", "nats a pair"),
    ("policy", "reward", "reward of the roll-outs", "mean score"),
    ("policy", "kl_loss", "KL from the reference", "nats a sequence"),
    ("policy", "gold", "gold score of the roll-outs", "mean score"),
    ("policy", "loss", "loss on pairs", "mean loss of a pair"),
)
"""(stage, figure, title, unit) of what is drawn."""

LINES = 6
"""Most runs in a chart."""


def gather(folders: Sequence[Path]) -> Json:
    """Figures of the runs and the spread over seeds, ready for JSON.

    Returns:
        `runs`: of each its `folder`, `name`, `seed`, `comparisons` and further figures. `spread`:
        of each group of runs that differ in their seed alone, and of each pair of systems and
        judge: `seeds`, `win_rates`, `mean`, `standard_deviation`, `lowest`, `highest`, and `ci95`
        of the mean over seeds (Student's t), which holds what another seed would change beside
        what other prompts would.
    """
    read = [(folder, report_data.read_run(RunFolder(folder))) for folder in folders]
    groups: dict[str, list[Run]] = {}
    for _, run in read:
        groups.setdefault(_without_seed(run), []).append(run)
    return {
        "runs": [_run(folder, run) for folder, run in read],
        "spread": [row for group in groups.values() if len(group) > 1 for row in _spread(group)],
    }


def _without_seed(run: Run) -> str:
    told = {key: value for key, value in run.recipe.items() if key not in ("seed", "name")}
    return json.dumps(told, sort_keys=True, default=str)


def _run(folder: Path, run: Run) -> Json:
    policy, reward = (report_data.section(run.summary, name) for name in ("policy", "reward"))
    return {
        "folder": str(folder),
        "name": run.summary.get("name"),
        "seed": run.summary.get("seed"),
        "algorithm": policy.get("algorithm"),
        "comparisons": [_shown(row) for row in run.summary.get("evaluate") or []],
        "reward_accuracy": reward.get("accuracy"),
        "kl_last": policy.get("kl_last"),
        "chosen_update": policy.get("chosen_update"),
        "updates": policy.get("updates"),
        "health": len(run.summary.get("health") or []),
        "wall_s": run.summary.get("wall_s"),
        "simulated": run.simulated,
    }


def _shown(row: Json) -> Json:
    keys = ("a", "b", "judge", "prompts", "win_rate", "win_rate_ci95", "length_controlled_win_rate")
    return {key: row.get(key) for key in keys}


def _spread(runs: Sequence[Run]) -> list[Json]:
    rates: dict[tuple[str, str, str], dict[Any, float]] = {}
    for run in runs:
        for row in run.summary.get("evaluate") or []:
            if row.get("win_rate") is not None:
                key = (row["a"], row["b"], row["judge"])
                rates.setdefault(key, {})[run.summary.get("seed")] = row["win_rate"]
    return [
        {"a": a, "b": b, "judge": judge, "simulated": runs[0].simulated, **spread_of(own)}
        for (a, b, judge), own in rates.items()
        if len(own) > 1
    ]


def spread_of(rates: Mapping[Any, float]) -> Json:
    """Mean and spread over two seeds or more, and Student's interval of the mean.

    Args:
        rates: win rate by seed.
    """
    values = list(rates.values())
    mean, deviation = fmean(values), stdev(values)
    half = float(student.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return {
        "seeds": list(rates),
        "win_rates": values,
        "mean": mean,
        "standard_deviation": deviation,
        "lowest": min(values),
        "highest": max(values),
        "ci95": [max(0.0, mean - half), min(1.0, mean + half)],
    }


def page(folders: Sequence[Path], found: Json) -> str:
    """The page as text, self-contained.

    Args:
        folders: of the runs.
        found: what `gather` says of them.
    """
    runs = [report_data.read_run(RunFolder(folder)) for folder in folders]
    names = _names(found["runs"])
    led = sorted(found["spread"], key=_first_of_all)
    for row in found["spread"]:
        row["judge_label"] = report_data.judge_label(row["judge"], row["simulated"])
    return (
        environment()
        .get_template("runs.html")
        .render(
            **frame(),
            runs=[{**row, "label": name} for row, name in zip(found["runs"], names, strict=True)],
            comparisons=_table(found["runs"], names),
            spread=led,
            systems=report_data.SYSTEMS,
            charts=_charts(runs, names),
            most=LINES,
            simulated=any(row["simulated"] for row in found["runs"]),
        )
    )


def _first_of_all(row: Json) -> tuple[bool, bool, bool]:
    """Tuned against SFT by somebody other than the reward model leads."""
    return (row["judge"] == "reward_model", row["b"] != "tuned", row["a"] != "sft")


def _names(rows: Sequence[Json]) -> list[str]:
    """Short names that tell the runs apart: the seed, the folder's name, or the whole path."""
    for name in (
        [f"seed {row['seed']}" for row in rows],
        [Path(row["folder"]).name for row in rows],
    ):
        if len(set(name)) == len(name):
            return name
    return [row["folder"] for row in rows]


def _table(rows: Sequence[Json], names: Sequence[str]) -> list[Json]:
    """A line for each run and comparison, those of one comparison together."""
    found = []
    keys = dict.fromkeys(
        (own["a"], own["b"], own["judge"]) for row in rows for own in row["comparisons"]
    )
    for a, b, judge in keys:
        for row, name in zip(rows, names, strict=True):
            own = next(
                (c for c in row["comparisons"] if (c["a"], c["b"], c["judge"]) == (a, b, judge)),
                None,
            )
            if own is None or own["win_rate"] is None:
                continue
            systems = report_data.SYSTEMS
            label = report_data.judge_label(judge, row["simulated"])
            words = f"{systems.get(b, b)} against {systems.get(a, a)}"
            mark = curves.interval_mark(
                own["win_rate"],
                own["win_rate_ci95"],
                label=f"win rate of {words} in {name}",
                muted=judge == "reward_model",
            )
            found.append({**own, "words": words, "judge": label, "run": name, "mark": mark})
    return found


def _charts(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, Markup]]:
    found = []
    for stage, figure, title, unit in CURVES:
        series = []
        for run, name in list(zip(runs, names, strict=True))[:LINES]:
            x, y = report_data.column(run.metrics[stage], f"{stage}/{figure}")
            if curves.finite(y).size > 1:
                series.append(Series(name, x, y))
        if series:
            label = "update" if stage == "policy" else "step"
            svg = curves.line_chart(title, series, x_label=label, y_label=unit)
            found.append((title, svg))
    return found
