"""`amenable generate`: complete prompts with any model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.cli.options import On, on_this_machine

if TYPE_CHECKING:
    from amenable.config.recipe import Recipe
    from amenable.data.schemas import Prompt

EXAMPLE = (
    'Example: amenable generate runs/demo/models/tuned "Return the number of words in a text."'
)
_SHOWN_PROMPT = 70
_BETWEEN_WRITES = 256  # prompts


class Shape(StrEnum):
    """Of a row."""

    NATIVE = "native"
    GCPC = "gcpc"


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder, model folder, built-in or hub id.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to complete.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--prompts", metavar="FILE", help="Rows with input_text; may be repeated."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write rows there instead.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep this mass of the likeliest tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest completion.  [default: the run's, else 64]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds sampling.")] = 0,
    shape: Annotated[
        Shape,
        typer.Option("--format", help="Of the rows; gcpc: as its bulk inference does."),
    ] = Shape.NATIVE,
    shard: Annotated[
        str, typer.Option(metavar="K/N", help="Every N-th prompt, from the K-th (from 0) on.")
    ] = "0/1",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line on stdout.")
    ] = False,
    on: On = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tasks that share the prompts, with --on.")
    ] = 1,
) -> None:
    """Complete prompts with a model.

    A model in a run folder is asked as it was trained: with that run's instruction, system
    message and lengths. With --out the same command goes on where it was stopped.
    """
    import json

    from amenable.errors import UsageError
    from amenable.evaluate.systems import model_source
    from amenable.pipeline.preflight import silence_libraries

    file_out = None if out is None else on_this_machine(out, "file")
    if workers > 1 and on is None:
        raise UsageError("--workers: goes with --on; without it, share the prompts with --shard")
    silence_libraries()
    asked = _sharded(_prompts(prompts or (), file or ()), shard)
    source = model_source(model)
    recipe = _recipe_of(source, max_new_tokens)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if on is not None:
        _on_ray(on, workers, file_out, source, asked, recipe, sampling, seed, shape)
        return
    if file_out is not None:
        _to_file(file_out, source, asked, recipe, sampling, seed, shape)
        return
    rows = [_shaped(row, recipe, shape) for row in complete(source, asked, recipe, sampling, seed)]
    if as_json or shape is not Shape.NATIVE:
        typer.echo("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        typer.echo("\n".join(_shown(row, alone=len(rows) == 1) for row in rows))


def _sharded(prompts: list[Prompt], shard: str) -> list[Prompt]:
    """Raises UsageError: the text is no K/N with 0 <= K < N."""
    from amenable.errors import UsageError

    number, slash, count = shard.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UsageError(f"--shard: found {shard!r}; expected K/N with K from 0 to N - 1, as 0/4")
    return prompts[int(number) :: int(count)]


def _shaped(row: dict[str, Any], recipe: Recipe, shape: Shape) -> dict[str, Any]:
    """The row in the wanted shape."""
    if shape is Shape.NATIVE:
        return row
    from amenable.data.formats.gcpc import prediction_row

    return prediction_row(recipe.data.instruction, row["input_text"], row["completion"])


def _to_file(
    out: Path,
    source: Path | str,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    sampling: dict[str, Any],
    seed: int,
    shape: Shape,
) -> None:
    """Write the rows; the unfinished file is OUT.part."""
    from amenable.artifacts import whole_rows, write_jsonl
    from amenable.pipeline.lock import file_lock

    part = out.with_name(f"{out.name}.part")
    with file_lock(out):
        _fill(part, source, prompts, recipe, sampling, seed, shape)
        write_jsonl(out, whole_rows(part)[1:])
        part.unlink()


def _on_ray(
    on: str,
    workers: int,
    out: Path | None,
    source: Path | str,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    sampling: dict[str, Any],
    seed: int,
    shape: Shape,
) -> None:
    """The same file by so many tasks; each fills OUT.K-of-N.part, kept when they are stopped."""
    from amenable.artifacts import Progress, whole_rows, write_jsonl
    from amenable.errors import UsageError
    from amenable.pipeline.lock import file_lock
    from amenable.pipeline.ray import place_of, run_tasks

    if out is None:
        raise UsageError("--on: say where the rows go, with --out FILE")
    out = out.absolute()
    parts = [out.with_name(f"{out.name}.{n}-of-{workers}.part") for n in range(workers)]
    shared = [
        (part, source, prompts[n::workers], recipe, sampling, seed, shape)
        for n, part in enumerate(parts)
    ]
    place = replace(place_of(recipe, "evaluate"), workers=workers)
    with file_lock(out):
        run_tasks(on, out.parent, place, recipe.ray.max_failures, _fill_alone, shared, Progress())
        rows = [whole_rows(part)[1:] for part in parts]
        write_jsonl(out, (rows[n % workers][n // workers] for n in range(len(prompts))))
        for part in parts:
            part.unlink()


def _fill_alone(part: Path, *what: Any) -> None:
    """`_fill` while nobody else does."""
    from amenable.pipeline.lock import file_lock

    with file_lock(part):
        _fill(part, *what)


def _fill(
    part: Path,
    source: Path | str,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    sampling: dict[str, Any],
    seed: int,
    shape: Shape,
) -> None:
    """Write the rows, some prompts at a time; what a stopped command has written is kept.

    The first line says what the file is the output of.
    """
    import json

    from amenable.artifacts import Progress, append_jsonl, whole_rows, write_jsonl
    from amenable.config.load import recipe_to_dict

    asked = [(prompt.id, prompt.text) for prompt in prompts]
    told = [str(source), asked, recipe_to_dict(recipe), sampling, seed, str(shape)]
    head = {"of": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}
    known = whole_rows(part)
    if known[:1] == [head]:
        Progress().say(f"generate: {len(known) - 1} of {len(prompts)} rows are there already")
    else:
        write_jsonl(part, [head])
        known = [head]
    rows = complete(source, prompts[len(known) - 1 :], recipe, sampling, seed)
    while some := list(itertools.islice(rows, _BETWEEN_WRITES)):
        append_jsonl(part, [_shaped(row, recipe, shape) for row in some])


def _prompts(texts: Sequence[str], files: Sequence[str]) -> list[Prompt]:
    from amenable.data.reading.readers import read_prompts
    from amenable.data.schemas import Message, Prompt, Speaker
    from amenable.errors import UsageError

    typed = [
        Prompt(messages=(Message(Speaker.USER, text),), id=f"argument-{n}", group=text)
        for n, text in enumerate(texts)
    ]
    if not typed and not files:
        raise UsageError("nothing to complete; give a text, or a file with --prompts")
    return [*typed, *(read_prompts(files) if files else ())]


def _recipe_of(source: Path | str, max_new_tokens: int | None) -> Recipe:
    """The recipe of the run that the model belongs to, or the defaults."""
    from amenable.config.load import recipe_beside

    recipe = recipe_beside(source)
    if max_new_tokens is None:
        return recipe
    return replace(recipe, data=replace(recipe.data, max_completion_tokens=max_new_tokens))


def complete(
    source: Path | str,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    sampling: dict[str, Any],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yields one row a prompt: id, input_text, completion, tokens, ended."""
    from amenable.evaluate.generate import Completer
    from amenable.rollout.types import Sampling

    options = Sampling(max_new_tokens=recipe.data.max_completion_tokens, **sampling)
    yield from Completer(source, recipe).complete(prompts, options, seed)


def _shown(row: dict[str, Any], *, alone: bool) -> str:
    if alone:
        return str(row["completion"])
    prompt = " ".join(row["input_text"].split())
    short = prompt if len(prompt) <= _SHOWN_PROMPT else f"{prompt[: _SHOWN_PROMPT - 1]}…"
    return f"> {short}\n{row['completion']}\n"
