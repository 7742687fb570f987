"""`amenable benchmark`: standard tasks before and after, by the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.compare import local_systems
from amenable.cli.options import AsJson
from amenable.masking import shown_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from amenable.evaluate.harness import Scores
    from amenable.evaluate.systems import System

EXAMPLE = "Example: amenable benchmark runs/demo --tasks arc_easy,my_task.yaml --limit 200"


def benchmark(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN | BEFORE AFTER...",
            help="A run folder: its base, SFT and tuned model. Or models, each a run folder, "
            "model folder, built-in or hub id; NAME=SOURCE names one.",
        ),
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            metavar="TASK,...",
            help="Of the harness, by name, or task files (.yaml); may be repeated.",
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Take the first N documents of each task."),
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Examples in the prompt.  [default: the task's]"),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template", help="Ask in each model's chat template.  [default: plain text]"
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 8,
    out: Annotated[
        str, typer.Option("--out", metavar="DIR|URL", help="Where results are kept.")
    ] = "runs/benchmark",
    as_json: AsJson = False,
) -> None:
    """Measure what alignment cost: standard benchmarks before and after, paired by document.

    Needs EleutherAI's lm-evaluation-harness: pip install "amenable[lm-eval]".
    """
    import json

    from amenable.artifacts import Progress, plain, write_json, write_jsonl
    from amenable.errors import UsageError
    from amenable.pipeline.mirror import output_folder
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    named = _named(systems)
    names = [name.strip() for words in tasks for name in words.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task")

    from amenable.evaluate.benchmark import compared
    from amenable.evaluate.harness import Settings, harness_version, measure, open_tasks

    harness = harness_version()
    sources = _sources(named, chat_template)
    opened = open_tasks(names)

    from amenable.config.load import recipe_beside
    from amenable.models.build import best_device
    from amenable.models.load import resolve_dtype

    settings = Settings(limit, few_shot, chat_template, batch_size)
    device = best_device()
    precision = resolve_dtype(recipe_beside(sources[named[-1].name][0]).model.dtype, device)
    scores: dict[str, list[Scores]] = {}
    asked: list[dict[str, Any]] = []
    for name, (source, tokenizer) in sources.items():
        scores[name], asked = measure(
            name, source, tokenizer, opened, settings, dtype=precision, device=device
        )
    result: dict[str, Any] = {
        "harness": f"lm-eval {harness}",
        "systems": [{"name": name, "source": str(source)} for name, (source, _) in sources.items()],
        "chat_template": chat_template,
        "precision": str(precision).removeprefix("torch."),
        "tasks": asked,
        "comparisons": compared(scores, opened.groups),
    }
    with output_folder(out, Progress().say, "folder") as (folder, _):
        write_jsonl(folder / "documents.jsonl", _documents(scores))
        write_json(folder / "benchmark.json", result)
    shown = shown_name(out.rstrip("/"))
    typer.echo(json.dumps(plain(result), indent=2) if as_json else _shown(result, shown))


def _named(arguments: Sequence[str]) -> list[System]:
    """Raises UsageError: one system alone that is no run folder, or a file of completions."""
    from amenable.errors import UsageError
    from amenable.evaluate.systems import named_systems, systems_of_run
    from amenable.pipeline.mirror import MODEL_FILES, local_copy

    if len(arguments) == 1:
        named = systems_of_run(local_copy(arguments[0], MODEL_FILES))
    else:
        named = local_systems(named_systems(arguments))
    for system in named:
        if system.is_file:
            raise UsageError(
                f"{system.source}: ready completions cannot be asked new questions; give a model"
            )
    return named


def _sources(
    systems: Sequence[System], chat_template: bool
) -> dict[str, tuple[Path | str, PreTrainedTokenizerBase]]:
    """Folder or hub id and tokenizer of every system; no weight is read.

    Raises:
        ModelError: a model is missing, or of an unsupported kind.
        UsageError: a chat template is wanted of a model that has none.
    """
    from amenable.errors import UsageError
    from amenable.evaluate.systems import model_source
    from amenable.models.check import check_base
    from amenable.models.load import load_tokenizer

    found = {}
    for system in systems:
        source = model_source(system.source)
        check_base(source)
        tokenizer = load_tokenizer(source)
        if chat_template and not tokenizer.chat_template:
            raise UsageError(
                f"--chat-template: {system.name} ({source}) has no chat template; leave it out"
            )
        found[system.name] = source, tokenizer
    return found


def _documents(scores: Mapping[str, Sequence[Scores]]) -> Iterator[dict[str, Any]]:
    """One row a document, metric and filter: its value by system."""
    first, *others = scores
    for score in scores[first]:
        key = (score.task, score.metric, score.filter)
        same = {
            name: next(s for s in scores[name] if (s.task, s.metric, s.filter) == key)
            for name in others
        }
        for number, value in score.documents.items():
            yield {
                "task": score.task,
                "metric": score.metric,
                "filter": score.filter,
                "document": number,
                "values": {
                    first: value,
                    **{name: s.documents.get(number) for name, s in same.items()},
                },
            }


def _shown(result: Mapping[str, Any], out: str) -> str:
    """A few lines for the terminal."""
    lines = []
    rows = sorted(
        result["comparisons"], key=lambda row: (row["task"], row["metric"], row["filter"])
    )
    for (task, metric, name), own in groupby(
        rows, key=lambda row: (row["task"], row["metric"], row["filter"])
    ):
        pairs = list(own)
        read = "" if name == "none" else f" ({name})"
        lines.append(f"{task}, {metric}{read}, {pairs[0]['documents']} documents")
        for row in pairs:
            low, high = (f"{end:+.3f}" for end in row["difference_ci95"])
            lines.append(
                f"  {row['before']} {row['before_value']:.3f}, {row['after']} "
                f"{row['after_value']:.3f}: {row['difference']:+.3f} [{low}, {high}]"
            )
            lines.append(f"    {row['meaning']}")
    return "\n".join([*lines, f"{out}/benchmark.json, {out}/documents.jsonl"])
