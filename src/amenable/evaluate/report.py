"""The report stage: one self-contained page and a model card for each model of the run.

The page opens from the file system with no network: style sheet, script and charts are inside, and
its content security policy forbids everything else. All text of models and people is escaped by
the template engine; control and direction-changing characters are made visible first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from amenable import __version__
from amenable.artifacts import RunFolder, StageContext, write_text
from amenable.evaluate import curves, data_report, report_data
from amenable.evaluate.report_data import Run

TEMPLATES = Path(__file__).parent / "templates"

MODELS = {
    "sft": "supervised fine-tuned model",
    "reward": "reward model",
    "tuned": "policy tuned against the reward",
}

_KEPT = {"\n", "\t", "\u200c", "\u200d"}


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
    style, script = template_text("report.css"), template_text("report.js")
    context = page_context(run)
    return (
        environment()
        .get_template("report.html")
        .render(
            **context,
            name=run.summary.get("name") or run.recipe.get("name") or folder_name,
            version=__version__,
            style=Markup(style),  # our own file, which the policy's hash vouches for
            script=Markup(script),
            policy=content_policy(style, script),
            figure=_figure_of(run.summary),
        )
    )


def page_context(run: Run) -> dict[str, Any]:
    """Every section of the page as plain values, lists and charts; empty where there is nothing."""
    found = report_data.comparisons(run)
    shown = report_data.sample_rows(run)
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
        "samples": shown,
        "samples_total": len(run.completions),
        "training_samples": report_data.training_samples(run),
        "headroom_bars": report_data.headroom_bars(run),
        "diversity": report_data.diversity_table(run),
        "stages": report_data.stage_table(run),
        "data": data_report.data_section(run.data),
        "provenance": report_data.provenance(run),
    }


# Text ----------------------------------------------------------------------------------------


def visible(text: object) -> str:
    """`text` with control, format and direction-changing characters spelled out, e.g. `⟨U+202E⟩`.

    New lines, tabs and the joiners that scripts and emoji need stay. A lone surrogate, which no
    file can hold, is spelled out as well.
    """
    return "".join(_spelled(c) for c in str(text))


def _spelled(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if hidden and character not in _KEPT else character


def clip(text: object, shown: int) -> tuple[str, str, int]:
    """The beginning of a text, what unfolds after it, and how many characters were left out.

    Args:
        text: any text; its hidden characters are spelled out.
        shown: characters to begin with; the cut is moved back to a space where one is near.
    """
    whole = str(text)
    left_out = max(0, len(whole) - report_data.MAX_TEXT)
    clean = visible(whole[: report_data.MAX_TEXT])
    if len(clean) <= shown + 40:
        return clean, "", left_out
    cut = clean.rfind(" ", shown - 30, shown)
    cut = cut if cut > 0 else shown
    return clean[:cut], clean[cut:], left_out


def one_line(text: object) -> str:
    """`text` for a line of Markdown: no breaks, and nothing that Markdown or HTML would read."""
    clean = " ".join(visible(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in clean)


# Figures -------------------------------------------------------------------------------------


def lookup(summary: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key such as `evaluate.0.win_rate`; None where there is none."""
    found: Any = summary
    for part in key.split("."):
        if isinstance(found, list):
            found = found[int(part)] if part.isdigit() and int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, Mapping) else None
    return found


def show(value: object, style: str = "number") -> str:
    """A value as the page prints it; the styles are the keys below, text passes through."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else visible(value)
    number = float(value)
    text = {
        "percent": lambda: f"{100 * number:.1f}\u00a0%",
        "points": lambda: f"{100 * number:.1f}\u00a0points",
        "bare": lambda: f"{100 * number:.1f}",
        "integer": lambda: f"{number:,.0f}".replace(",", "\u202f"),
        "duration": lambda: _duration(number),
        "p": lambda: "<\u00a00.001" if number < 0.001 else f"{number:.3f}",
        "gb": lambda: f"{number:.1f}\u00a0GB",
        "one": lambda: f"{number:.1f}",
        "fixed": lambda: f"{number:.3f}",
        "number": lambda: curves.number(number),
    }[style]()
    return text.replace("-", "−")


def _duration(seconds: float) -> str:
    """e.g. `4.2 s`, `8 min 31 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def _figure_of(summary: Mapping[str, Any]) -> Callable[[str, str], Markup]:
    """The template's way to print a figure of `summary.json`, marked with its key and value."""

    def figure(key: str, style: str = "number") -> Markup:
        value = lookup(summary, key)
        text = escape(show(value, style))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Markup(f'<span class="none">{text}</span>')
        raw = json.dumps(value)
        return Markup(
            f'<data value="{raw}" data-key="{escape(key)}" data-style="{style}">{text}</data>'
        )

    return figure


# The page's parts ----------------------------------------------------------------------------


def content_policy(style: str, script: str) -> str:
    """Nothing but this page's own style sheet, its own script and its icon."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def template_text(name: str) -> str:
    """A style sheet or script of the pages."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Jinja2 with escaping on for HTML; a name that is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(visible=visible, show=show, one_line=one_line, quoted=_quoted)
    environment.globals.update(clip=clip)
    return environment


def _quoted(text: object) -> str:
    """A YAML string: JSON's, in ASCII."""
    return json.dumps(str(text))


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
