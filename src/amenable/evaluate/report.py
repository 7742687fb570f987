"""The report stage: one self-contained page and a model card for each model of the run.

The page loads nothing from a network; see `pages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amenable import __version__
from amenable.artifacts import RunFolder, StageContext, write_text
from amenable.evaluate import data_report, report_data
from amenable.evaluate.pages import environment, figures_of, frame
from amenable.evaluate.report_data import Run

MODELS = {
    "sft": "supervised fine-tuned model",
    "reward": "reward model",
    "tuned": "policy tuned against the reward",
}


def run(ctx: StageContext) -> dict[str, Any]:
    """The `report` stage: writes `report.html` and `models/*/README.md`; the summary stays.

    Raises:
        StorageError: a file cannot be written.
    """
    render(ctx.folder)
    write_model_cards(ctx.folder)
    return {}


def render(folder: RunFolder) -> None:
    """Writes `report.html` from whatever the run folder holds now, atomically.

    Works for a run that has only begun, that failed or that was stopped.

    Raises:
        StorageError: the page cannot be written.
    """
    write_text(folder.root / "report.html", page(report_data.read_run(folder), folder.root.name))


def page(run: Run, folder_name: str = "run") -> str:
    """The page as text; the same run gives the same bytes."""
    return (
        environment()
        .get_template("report.html")
        .render(
            **frame(),
            **page_context(run),
            name=run.summary.get("name") or run.recipe.get("name") or folder_name,
            figure=figures_of(run.summary),
        )
    )


def page_context(run: Run) -> dict[str, Any]:
    """Every section of the page as plain values, lists and charts; empty where there is nothing."""
    found = report_data.comparisons(run)
    return {
        "run": run,
        "progress": report_data.progress_of(run),
        "comparisons": found,
        "headline": report_data.headline(found),
        "policy_figures": report_data.policy_figures(run),
        "overoptimisation": report_data.overoptimisation(run),
        "health": report_data.health_rows(run),
        "checkpoints": report_data.checkpoint_figure(run),
        "diagnostics": report_data.diagnostics(run),
        "reward_figures": report_data.reward_figures(run),
        "accuracy_bars": report_data.accuracy_bars(run),
        "reward_verdict": report_data.reward_verdict(run),
        "accuracy_parts": report_data.accuracy_parts(run),
        "best_of_n": run.headroom.get("by_reward_model") or [],
        "calibration": report_data.calibration_figure(run),
        "sft_figures": report_data.sft_figures(run),
        "systems": report_data.systems_table(run),
        "samples": report_data.sample_browser(run),
        "samples_total": len(run.completions),
        "training_samples": report_data.training_samples(run),
        "headroom_bars": report_data.headroom_bars(run),
        "diversity": report_data.diversity_table(run),
        "stages": report_data.stage_table(run),
        "data": data_report.data_section(run.data),
        "provenance": report_data.provenance(run),
    }


# Model cards ---------------------------------------------------------------------------------


def write_model_cards(folder: RunFolder) -> list[Path]:
    """Writes `README.md` into each model folder that exists and returns their paths.

    Raises:
        StorageError: a card cannot be written.
    """
    run = report_data.read_run(folder)
    paths = [folder.root / "models" / kind / "README.md" for kind in MODELS]
    written = [path for path in paths if path.parent.is_dir()]
    for path in written:
        write_text(path, model_card(run, path.parent.name))
    return written


def model_card(run: Run, kind: str) -> str:
    """The card of the run's `sft`, `reward` or `tuned` model as Markdown."""
    found = report_data.comparisons(run)
    about = [c for c in found if kind in (c["entry"]["a"], c["entry"]["b"])]
    return (
        environment()
        .get_template("model_card.md")
        .render(
            kind=kind,
            title=_title(kind, run),
            run=run,
            name=run.summary.get("name") or run.recipe.get("name") or "run",
            base=_base_repository(str(run.summary.get("base_model") or "")),
            comparisons=about,
            tags=_tags(kind, run),
            version=__version__,
        )
    )


def _title(kind: str, run: Run) -> str:
    return "policy tuned on preferences" if kind == "tuned" and run.off_policy else MODELS[kind]


def _base_repository(base: str) -> str:
    """The hub's name of a built-in base model; other names as they are; nothing for a path."""
    if base == "smollm2-135m":
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return "" if base.startswith((".", "/", "~")) or base == "tiny" or "/" not in base else base


def _tags(kind: str, run: Run) -> Sequence[str]:
    algorithm = report_data.section(run.summary, "policy").get("algorithm")
    extra = {
        "sft": ["sft"],
        "reward": ["reward-model"],
        "tuned": ["rlhf", *([algorithm] if algorithm else [])],
    }
    return ["amenable", *extra[kind]]
