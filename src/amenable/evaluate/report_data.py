"""What the report shows, gathered from whatever a run folder holds. No HTML here but the charts.

Every section may be missing: a run that has just begun, failed or was stopped has a page as well.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import Json, RunFolder
from amenable.evaluate import curves
from amenable.evaluate.curves import Series
from amenable.evaluate.overoptimization import GoldCurve, fit_gold
from amenable.evaluate.pages import show
from amenable.evaluate.samples import Answer, Browser, Outcome, Sample, browser, pairs

SYSTEMS = {"base": "base", "sft": "SFT", "tuned": "tuned"}
STAGES = ("data", "sft", "collect", "reward", "policy", "evaluate")

GUIDES = {
    "loss": "Falls fast, then slowly. Held out rising again means too many epochs.",
    "rank_loss": "Falls, then flattens. It starts near 0.69 (a coin). Flat long before the end: "
    "fewer steps would do. Training falls while held out rises: it learns the pairs by heart.",
    "accuracy": "Rises from 0.5 and flattens. People agree with each other on about 0.73 of such "
    "pairs: a figure far above that on human labels is a reason to look for a leak.",
    "reward": "Rises, then plateaus. Still rising at the end: more updates may help. Flat or "
    "erratic: too few updates, too small a rate, or a reward model that cannot tell the samples "
    "apart.",
    "kl_loss": "Rises, then plateaus: the policy moves away from the reference as far as the "
    "penalty lets it. Below zero: the sampling is not the policy's own. Growing without a gain "
    "in reward: raise the KL weight.",
    "preference_loss": "Falls, then flattens. Held out rising again: fewer epochs, or a larger "
    "beta. With a reference it starts where the policy prefers neither side.",
    "preference_accuracy": "Rises from 0.5 and flattens. Training near 1 with held out far below: "
    "the pairs are learnt by heart.",
    "implicit_rewards": "The chosen one's lies above the rejected one's, and they part. Both "
    "falling: the policy leaves all that it was shown, the chosen completions included; try "
    "policy.preference.sft_coef or a larger beta.",
}
"""What a good curve looks like, and what the usual bad ones mean."""

SAMPLES_BUDGET = 1_200_000
"""Bytes of the samples; the page stays under 2 MB."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its reading guide: what a good one looks like, and what this one does."""

    title: str
    svg: Markup
    good: str = ""
    here: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run folder that the page is made of, as far as they exist."""

    summary: Json
    recipe: Json
    recipe_text: str
    manifest: Json
    states: dict[str, Json]
    metrics: dict[str, list[Json]]
    policy_samples: list[Json]
    completions: list[Json]
    headroom: Json
    selection: Json
    diversity: Json
    data: Json

    @property
    def simulated(self) -> bool:
        """True where a simulation stood in for people, by the summary or else by the recipe."""
        collected = section(self.summary, "collect")
        if isinstance(collected.get("simulated"), bool):
            return bool(collected["simulated"])
        return bool(section(self.recipe, "collect").get("annotator") == "simulated")

    @property
    def off_policy(self) -> bool:
        """True where the policy learnt from pairs, so that it never saw a reward."""
        name = section(self.summary, "policy").get("algorithm")
        name = name or section(self.recipe, "policy").get("algorithm")
        return name in ALGORITHMS and ALGORITHMS[name].learns_from == "preferences"


# Reading the folder --------------------------------------------------------------------------


def section(mapping: Mapping[str, Any], key: str) -> Json:
    """The table under `key`; an empty one where it is missing or null."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def read_object(path: Path) -> Json:
    """The JSON object in a file; empty where the file is missing, torn or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_rows(path: Path) -> list[Json]:
    """The objects of a JSON Lines file that can be read; a line still being written is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    return [row for row in map(_parsed, lines) if row]


def _parsed(line: str) -> Json:
    try:
        row = json.loads(line) if line.strip() else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def read_run(folder: RunFolder) -> Run:
    """Everything that the page may show; nothing of it has to exist."""
    stages = folder.root / "stages"
    try:
        recipe_text = (folder.root / "recipe.toml").read_text(encoding="utf-8")
        recipe = tomllib.loads(recipe_text)
    except (OSError, ValueError):
        recipe_text, recipe = "", {}
    return Run(
        summary=read_object(folder.root / "summary.json"),
        recipe=recipe,
        recipe_text=recipe_text,
        manifest=read_object(folder.root / "manifest.json"),
        states={name: read_object(stages / name / "state.json") for name in STAGES},
        metrics={name: read_rows(stages / name / "metrics.jsonl") for name in STAGES},
        policy_samples=read_rows(stages / "policy" / "samples.jsonl"),
        completions=read_rows(stages / "evaluate" / "completions.jsonl"),
        headroom=read_object(stages / "policy" / "headroom.json"),
        selection=read_object(stages / "policy" / "selection.json"),
        diversity=read_object(stages / "evaluate" / "diversity.json"),
        data=read_object(folder.data / "report.json"),
    )


# Headline ------------------------------------------------------------------------------------


def progress_of(run: Run) -> Json:
    """How far the run is: `state` finished, running, failed or stopped, and the `stage` concerned.

    A killed run cannot say so itself: its last stage still counts as running.
    """
    statuses = dict(_statuses(run))
    failed = [n for n in STAGES if statuses[n] == "failed"]
    running = [
        n for n in STAGES if statuses[n] == "running" or (run.metrics[n] and not statuses[n])
    ]
    done = [n for n in STAGES if statuses[n] in ("done", "shortened")]
    wanted = section(run.recipe, "evaluate").get("enabled", True)
    if failed:
        return {"state": "failed", "stage": failed[-1]}
    if running:
        return {"state": "running", "stage": running[-1]}
    if run.summary.get("evaluate") or (done and not wanted):
        return {"state": "finished", "stage": None}
    return {"state": "stopped", "stage": (done or ["data"])[-1]}


def _statuses(run: Run) -> Iterator[tuple[str, str | None]]:
    """Each stage's status from its own state, else from the summary."""
    recorded = section(run.summary, "stages")
    for name in STAGES:
        yield name, run.states[name].get("status") or section(recorded, name).get("status")


def judge_label(judge: str, simulated: bool) -> str:
    """A judge's name in words; a simulated annotator is never called just an annotator."""
    if judge == "annotator":
        return "simulated annotator" if simulated else "annotator"
    return judge.replace("_", " ")


def verdict(entry: Mapping[str, Any]) -> str:
    """`better`, `worse` or `unclear`: where the interval of the win rate lies against one half."""
    interval = entry.get("win_rate_ci95")
    if not interval:
        return "unclear"
    low, high = interval
    return "better" if low > 0.5 else "worse" if high < 0.5 else "unclear"


def comparisons(run: Run) -> list[Json]:
    """The Side-by-Side entries with names in words, their verdict and their forest-plot row."""
    entries = run.summary.get("evaluate") or []
    return [_comparison(run, index, entry) for index, entry in enumerate(entries)]


def _comparison(run: Run, index: int, entry: Json) -> Json:
    a, b = SYSTEMS.get(entry["a"], entry["a"]), SYSTEMS.get(entry["b"], entry["b"])
    judge = judge_label(str(entry["judge"]), run.simulated)
    interval, rate = entry.get("win_rate_ci95"), entry.get("win_rate")
    label = f"win rate of {b} against {a} by the {judge}"
    mark = (
        Markup("")
        if rate is None
        else curves.interval_mark(
            rate, interval, label=label, muted=entry["judge"] == "reward_model"
        )
    )
    named = {"index": index, "a": a, "b": b, "judge": judge, "key": f"evaluate.{index}"}
    return named | {"entry": entry, "verdict": verdict(entry), "mark": mark}


def headline(found: Sequence[Json]) -> list[Json]:
    """The comparisons to lead with: tuned against SFT, then against base, by the best judge.

    The reward model is the judge of last resort: the policy was trained to please it.
    """
    tuned = [
        c for c in found if c["entry"]["b"] == "tuned" and c["entry"].get("win_rate") is not None
    ]
    judges = list(dict.fromkeys(c["entry"]["judge"] for c in tuned))
    judges.sort(key=lambda name: (name == "reward_model", name != "annotator"))
    chosen = [c for c in tuned if judges and c["entry"]["judge"] == judges[0]]
    return sorted(chosen, key=lambda c: c["entry"]["a"] != "sft")


# Curves --------------------------------------------------------------------------------------


def column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that hold `key` (null as NaN)."""
    found = [row for row in rows if key in row and "step" in row]
    return [float(row["step"]) for row in found], curves.as_floats([row[key] for row in found])


def _here(name: str, values: Sequence[float]) -> str:
    """What the curve did, with the means of its first and last fifth."""
    ends = curves.first_and_last_fifth(values)
    if ends is None:
        return "Too short to read."
    first, last, error = ends
    means = f"{curves.number(first)} in the first fifth, {curves.number(last)} in the last"
    spread = f"standard error of the difference {curves.number(error)}"
    return f"{name} {curves.trend(values)}: {means} ({spread})."


def _curve(
    run: Run,
    stage: str,
    names: Sequence[tuple[str, str]],
    title: str,
    *,
    good: str = "",
    smooth: bool = True,
    error: str | None = None,
    x_label: str = "step",
    y_label: str = "",
    spoken: str = "It",
) -> Figure | None:
    """A chart of some metrics of a stage, or None where the first of them was never written."""
    rows = run.metrics[stage]
    series = []
    for key, legend in names:
        x, y = column(rows, f"{stage}/{key}")
        noisy = smooth and len(x) >= 20
        band = column(rows, f"{stage}/{error}")[1] if error and key == names[0][0] else None
        if curves.finite(y).size:
            series.append(
                Series(legend, x, y, band if band and len(band) == len(y) else None, smooth=noisy)
            )
    if not series or not curves.finite(column(rows, f"{stage}/{names[0][0]}")[1]).size:
        return None
    svg = curves.line_chart(title, series, x_label=x_label, y_label=y_label)
    return Figure(title, svg, good, _here(spoken, series[0].y))


def policy_figures(run: Run) -> list[Figure]:
    """Reward and KL curves, or loss and accuracy on pairs, with their reading guide."""
    figures = [
        *_preference_figures(run),
        _curve(
            run,
            "policy",
            [("reward", "reward")],
            "reward",
            error="reward_se",
            x_label="update",
            y_label="mean score, before the KL penalty",
            spoken="The reward",
            good=GUIDES["reward"],
        ),
        _curve(
            run,
            "policy",
            [("kl_loss", "kl_loss")],
            "kl_loss",
            x_label="update",
            y_label="nats a sequence",
            spoken="The KL",
            good=GUIDES["kl_loss"],
        ),
    ]
    return [f for f in figures if f]


def _preference_figures(run: Run) -> list[Figure | None]:
    """Of an algorithm that learns from pairs."""
    if not run.off_policy:
        return []
    return [
        _curve(
            run,
            "policy",
            [("loss", "training"), ("eval_loss", "held out")],
            "loss",
            y_label="mean loss of a pair",
            spoken="The training loss",
            good=GUIDES["preference_loss"],
        ),
        _curve(
            run,
            "policy",
            [("accuracy", "training"), ("eval_accuracy", "held out")],
            "accuracy",
            y_label="share of pairs",
            spoken="Training accuracy",
            good=GUIDES["preference_accuracy"],
        ),
        _curve(
            run,
            "policy",
            [("chosen_reward", "chosen"), ("rejected_reward", "rejected")],
            "implicit reward",
            y_label="implicit reward",
            spoken="That of the chosen",
            good=GUIDES["implicit_rewards"],
        ),
    ]


def diagnostics(run: Run) -> list[Figure]:
    """Small charts of what usually explains a bad run."""
    wanted = (
        (
            "gold",
            "gold score",
            "The annotator's own score of the roll-outs. It should rise with the reward.",
        ),
        ("entropy", "entropy, nats a token", "Falls gently. A fall to near zero is a collapse."),
        ("completion_tokens", "completion tokens", "Should not run to the limit, nor to nothing."),
        ("eos_rate", "share that ended itself", "Near 1."),
        ("clip_fraction", "clip fraction", "Below 0.3."),
        ("approx_kl", "KL of old and new policy", "Small and steady: below 0.05 a token."),
        (
            "explained_variance",
            "explained variance of the critic",
            "Above 0 after the first updates.",
        ),
        ("kl_coef", "weight of the KL penalty", "Constant, or steered to the target."),
        ("margin", "margin of the implicit rewards", "Rises, then plateaus."),
        ("chosen_nll", "chosen completions, nats a token", "Should not rise far."),
        ("reference_point", "reference point z, nats", "KTO's estimate of the KL; rises slowly."),
    )
    found = [
        _curve(run, "policy", [(key, title)], title, good=good, x_label="update")
        for key, title, good in wanted
    ]
    return [f for f in found if f]


def overoptimisation(run: Run) -> list[Figure]:
    """Proxy and gold score against the distance from the reference, sqrt(KL)."""
    rows = [r for r in run.metrics["policy"] if r.get("policy/kl_loss") is not None]
    if not any(r.get("policy/gold") is not None for r in rows):
        return []
    x = curves.root_kl(curves.as_floats([r["policy/kl_loss"] for r in rows])).tolist()
    figures = []
    widest = max(1e-6, *x) * 1.04
    for key, title in (("reward", "proxy: reward model"), ("gold", "gold: annotator")):
        y = curves.as_floats([r.get(f"policy/{key}") for r in rows])
        here = _here(f"Over the updates the {title.split(':')[0]}", y)
        series = [Series(title, x, y, dots=True)]
        fitted = fit_gold(*_paired(x, y)) if key == "gold" else None
        if fitted is not None:
            steps = np.linspace(0, max(x), 60).tolist()
            series.append(Series("fitted", steps, [fitted.at(step) for step in steps]))
            here += f" {_turn(fitted, max(x))}"
        svg = curves.line_chart(
            f"{title} against the square root of KL",
            series,
            x_label="√KL, √nats",
            y_label="mean score",
            x_range=(0.0, widest),
        )
        figures.append(Figure(title, svg, "", here))
    return figures


def _paired(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Those places where both are numbers."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return [a for a, _ in both], [b for _, b in both]


def _turn(curve: GoldCurve, furthest: float) -> str:
    """Where the fitted curve has its maximum, in words."""
    turn = curve.turning_point
    if turn is None or turn > furthest:
        return "The fitted curve d (a − b log d) does not turn within what was measured."
    return f"The fitted curve d (a − b log d) turns at √KL = {curves.number(turn)}."


def checkpoint_figure(run: Run) -> Figure | None:
    """Scores that chose a checkpoint, start included."""
    rows = [r for r in run.selection.get("checkpoints") or [] if isinstance(r, dict)]
    points = _paired(
        curves.as_floats([r.get("updates") for r in rows]),
        curves.as_floats([r.get("score") for r in rows]),
    )
    if len(points[0]) < 2:
        return None
    by = "annotator" if run.selection.get("by") == "annotator" else f"{run.selection.get('by')}"
    title = f"score by {by}, answers to prompts that only choose"
    svg = curves.line_chart(title, [Series(title, *points)], x_label="update", y_label="mean score")
    chosen = run.selection.get("chosen")
    here = f"The checkpoint after update {chosen} scores highest and is the tuned model."
    if chosen == 0:
        here = "No checkpoint scores higher than the start, so the tuned model is the start."
    elif chosen == points[0][-1]:
        here = "The last checkpoint scores highest and is the tuned model."
    good = (
        "Rises, then plateaus. Where it turns down, later checkpoints please the reward model "
        "only. Its prompts are neither trained on nor among those of the comparison above."
    )
    return Figure("Which checkpoint stays", svg, good, here)


def health_rows(run: Run) -> list[Json]:
    """What the health rules said: of stages that are done, or failed by it."""
    told = [row for row in run.summary.get("health") or [] if isinstance(row, dict)]
    known = {row.get("stage") for row in told}
    for stage, state in run.states.items():
        if stage not in known:
            told += [row for row in state.get("health") or [] if isinstance(row, dict)]
    return told


def reward_figures(run: Run) -> list[Figure]:
    """rank_loss and accuracy while the reward model is trained."""
    figures = [
        _curve(
            run,
            "reward",
            [("rank_loss", "training"), ("eval_rank_loss", "held out")],
            "rank_loss",
            y_label="nats a pair",
            spoken="The training loss",
            good=GUIDES["rank_loss"],
        ),
        _curve(
            run,
            "reward",
            [("accuracy", "training"), ("eval_accuracy", "held out")],
            "accuracy",
            y_label="share of pairs",
            spoken="Training accuracy",
            good=GUIDES["accuracy"],
        ),
    ]
    return [f for f in figures if f]


def sft_figures(run: Run) -> list[Figure]:
    """The loss of supervised fine-tuning."""
    figure = _curve(
        run,
        "sft",
        [("loss", "training"), ("eval_loss", "held out")],
        "loss",
        y_label="nats a token",
        spoken="The training loss",
        good=GUIDES["loss"],
    )
    return [figure] if figure else []


# Reward model --------------------------------------------------------------------------------


def accuracy_bars(run: Run) -> list[Json]:
    """Held-out accuracy of the reward model, free of length, and of the rules it must beat."""
    reward = section(run.summary, "reward")
    matched = f"reward model, equal lengths ({reward.get('length_matched_pairs')} pairs)"
    rows = (
        ("accuracy", "accuracy_ci95", "reward model"),
        ("length_matched_accuracy", "length_matched_ci95", matched),
        (
            "length_balanced_accuracy",
            "length_balanced_ci95",
            "reward model, longer and shorter winners alike",
        ),
        ("bag_of_words_accuracy", "", "bag of words"),
        ("longest_wins_accuracy", "", "the longer one wins"),
        ("shortest_wins_accuracy", "", "the shorter one wins"),
    )
    return [
        {
            "key": f"reward.{key}",
            "name": name,
            "muted": not interval,
            "first": key == "accuracy",
            "interval": f"reward.{interval}" if reward.get(interval) else "",
            "bar": curves.bar(reward[key], reward.get(interval), reference=0.5, muted=not interval),
        }
        for key, interval, name in rows
        if reward.get(key) is not None
    ]


def reward_verdict(run: Run) -> str:
    """Where the accuracy's interval lies against the best simple rule.

    `above`, `unclear` or `below`; empty if unknown.
    """
    reward = section(run.summary, "reward")
    interval = reward.get("accuracy_ci95")
    keys = ("bag_of_words_accuracy", "longest_wins_accuracy", "shortest_wins_accuracy")
    known = [reward[key] for key in keys if reward.get(key) is not None]
    if not interval or not known:
        return ""
    best = max(0.5, *known)
    return "above" if interval[0] > best else "below" if interval[1] < best else "unclear"


def accuracy_parts(run: Run) -> list[Json]:
    """Accuracy by kind of pair: by which candidate is better, and by slice."""
    reward = section(run.summary, "reward")
    names = {"longer": "the longer one is better", "shorter": "the shorter one is better"}
    found = [
        {
            "name": name,
            "accuracy": f"reward.{way}_better_accuracy",
            "interval": f"reward.{way}_better_ci95",
            "pairs": f"reward.{way}_better_pairs",
            "p": "",
            "bar": _accuracy_bar(reward[f"{way}_better_accuracy"], reward[f"{way}_better_ci95"]),
        }
        for way, name in names.items()
        if reward.get(f"{way}_better_accuracy") is not None
    ]
    for n, row in enumerate(reward.get("slices") or []):
        key = f"reward.slices.{n}"
        found.append(
            {
                "name": row["slice"],
                "accuracy": f"{key}.accuracy",
                "interval": f"{key}.accuracy_ci95",
                "pairs": f"{key}.pairs",
                "p": f"{key}.p_holm",
                "bar": _accuracy_bar(row["accuracy"], row["accuracy_ci95"]),
            }
        )
    return found


def _accuracy_bar(accuracy: float, interval: Sequence[float]) -> Markup:
    return curves.bar(accuracy, interval, reference=0.5)


def calibration_figure(run: Run) -> Figure | None:
    """Confidence against accuracy in bins."""
    bins = section(run.summary, "reward").get("calibration") or []
    if not bins:
        return None
    x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    svg = curves.line_chart(
        "Calibration of the reward model on held-out pairs",
        [Series("right", x, y, dots=True)],
        x_label="confidence",
        y_label="share right",
        x_range=(0.5, 1.0),
        y_range=(min(0.4, *y) - 0.02, 1.02),
        diagonal=True,
    )
    return Figure(
        "calibration",
        svg,
        "Dots lie on the line: of pairs called with 80 % confidence, 80 % are right.",
    )


# Tables --------------------------------------------------------------------------------------


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def systems_table(run: Run) -> list[Json]:
    """Mean scores, length and share of ended completions of each system on the held-out prompts."""
    rows = run.completions
    names = [n for n in SYSTEMS if any(n in section(r, "completions") for r in rows)]
    judges = list(dict.fromkeys(j for r in rows for j in section(r, "scores")))
    return [
        {
            "name": SYSTEMS[n],
            "scores": [
                (
                    judge_label(j, run.simulated),
                    _mean([section(section(r, "scores"), j).get(n) for r in rows]),
                )
                for j in judges
            ],
            "tokens": _mean([section(r, "tokens").get(n) for r in rows]),
            "ended": _mean([section(r, "ended").get(n) for r in rows]),
        }
        for n in names
    ]


def sample_browser(run: Run) -> Browser | None:
    """The side-by-side samples: as many held-out prompts as fit the page, in the file's order."""
    rows = run.completions
    names = [n for n in SYSTEMS if any(n in section(r, "completions") for r in rows)]
    judges = list(dict.fromkeys(judge for row in rows for judge in section(row, "scores")))
    judges.sort(key=lambda judge: judge != "annotator")
    if not names:
        return None
    return browser(
        [SYSTEMS[n] for n in names],
        [judge_label(judge, run.simulated) for judge in judges],
        (_sample(row, names, judges, run.simulated) for row in rows),
        budget=SAMPLES_BUDGET,
        chosen=(max(0, len(names) - 2), len(names) - 1),
    )


def _sample(row: Json, names: Sequence[str], judges: Sequence[str], simulated: bool) -> Sample:
    texts = section(row, "completions")
    scores = {judge: section(section(row, "scores"), judge) for judge in judges}
    reference = row.get("reference")
    return Sample(
        id=str(row.get("id", "")),
        prompt=str(row.get("input_text", "")),
        answers=[
            Answer(
                str(texts[n]),
                notes=tuple(
                    f"{judge_label(judge, simulated)} {show(of[n], 'fixed')}"
                    for judge, of in scores.items()
                    if of.get(n) is not None
                ),
                change=_change(scores, judges) if n == "tuned" else None,
            )
            if n in texts
            else None
            for n in names
        ],
        outcomes=[
            [_outcome(scores[judge], texts, a, b) for a, b in pairs(names)] for judge in judges
        ],
        reference=None if reference is None else str(reference),
    )


def _change(scores: Mapping[str, Json], judges: Sequence[str]) -> float | None:
    """Of the tuned model's score over SFT's, or the base model's, by the first judge."""
    of = scores[judges[0]] if judges else {}
    before, after = of.get("sft", of.get("base")), of.get("tuned")
    return None if before is None or after is None else after - before


def _outcome(scores: Json, texts: Json, a: str, b: str) -> Outcome | None:
    """The difference of two scores; the same text is a tie whatever the scores."""
    if scores.get(a) is None or scores.get(b) is None:
        return None
    same = a in texts and texts.get(a) == texts.get(b)
    return Outcome(0.0 if same else scores[b] - scores[a])


def training_samples(run: Run, steps: int = 6, each: int = 2) -> list[Json]:
    """A few roll-outs of evenly spread updates, the first and the last among them."""
    by_step: dict[int, list[Json]] = {}
    for row in run.policy_samples:
        by_step.setdefault(int(row.get("step", 0)), []).append(row)
    order = sorted(by_step)
    if not order:
        return []
    count = min(steps, len(order))
    picks = sorted({order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(count)})
    return [row for step in picks for row in by_step[step][:each]]


def headroom_bars(run: Run) -> list[Json]:
    """The annotator's mean score of SFT answers, greedy, sampled, and the best of n samples."""
    count = run.headroom.get("best_of", "n")
    names = (
        ("sft_sampled", "SFT, one sample"),
        ("sft_greedy", "SFT, greedy"),
        ("best_of_n", f"SFT, best of {count} samples"),
    )
    known = [(name, run.headroom[key]) for key, name in names if run.headroom.get(key) is not None]
    if not known:
        return []
    domain = (min(0.0, *(v for _, v in known), 0.0), max(*(v for _, v in known), 1e-9))
    return [
        {
            "name": name,
            "value": value,
            "bar": curves.bar(value, domain=domain, muted=name[-7:] != "samples"),
        }
        for name, value in known
    ]


def diversity_table(run: Run) -> list[Json]:
    """distinct-n and duplicates of each system, sampled."""
    systems = section(run.diversity, "systems")
    return [{"name": SYSTEMS.get(n, n), **section(systems, n)} for n in systems]


def stage_table(run: Run) -> list[Json]:
    """Status, time and memory of each stage in the order they ran."""
    recorded = section(run.summary, "stages")
    names = [n for n in STAGES if n in recorded] + [n for n in recorded if n not in STAGES]
    longest = max([section(recorded, n).get("wall_s") or 0.0 for n in names], default=0.0)
    return [
        {
            "name": n,
            "key": f"stages.{n}",
            "status": section(recorded, n).get("status") or "–",
            "bar": curves.bar(
                section(recorded, n).get("wall_s") or 0.0, domain=(0.0, longest or 1.0), muted=True
            ),
        }
        for n in names
    ]


def provenance(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as headed lists of (name, value): single values first, then each table."""
    single = [(k, _text(v)) for k, v in run.manifest.items() if not isinstance(v, dict)]
    tables = [
        (k, [(str(a), _text(b)) for a, b in v.items()])
        for k, v in run.manifest.items()
        if isinstance(v, dict)
    ]
    return ([("run", single)] if single else []) + tables


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
