"""What is compared: models that answer now, or files of ready completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amenable.data.reading.readers import read_prompts
from amenable.data.schemas import Prompt
from amenable.errors import DataError, UsageError

_FILES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_KEYS = ("completion", "prediction", "output_text", "response")


@dataclass(frozen=True)
class System:
    """One of the systems on the command line."""

    name: str
    source: str

    @property
    def is_file(self) -> bool:
        """Whether its completions are there already."""
        return self.source.endswith(_FILES)


def named_systems(arguments: Sequence[str]) -> list[System]:
    """From `NAME=SOURCE` or `SOURCE`; a name that is left out is the source's last part.

    Raises:
        UsageError: two have the same name, or there are fewer than two.
    """
    found = []
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if not equals or "/" in name:
            source = argument
            name = Path(source).name
            name = name.split(".")[0] if source.endswith(_FILES) else name or source
        found.append(System(name, source))
    names = [system.name for system in found]
    if len(found) < 2:
        raise UsageError("a comparison needs two systems; name a base and a tuned one")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(
            f"two systems are called {twice[0]!r}; write NAME=SOURCE to give each its own name"
        )
    return found


def model_source(model: str) -> Path | str:
    """The folder or hub id of a model; of a run folder, that of its tuned model.

    Raises:
        ModelError: it cannot be used.
    """
    from amenable.models.pull import resolve_base

    tuned = Path(model) / "models" / "tuned"
    return resolve_base(str(tuned) if tuned.is_dir() else model)


def systems_of_run(folder: Path) -> list[System]:
    """The base of a run, and the SFT and tuned models that it has made.

    Raises:
        UsageError: it is no run folder, or has made none of the two.
        RecipeError: its recipe cannot be read.
    """
    from amenable.artifacts import RunFolder
    from amenable.config.load import load_recipe

    run = RunFolder(folder)
    if not run.recipe_path.is_file():
        raise UsageError(
            f"{folder}: no run folder (no recipe.toml); give one, or two models: BASE TUNED"
        )
    made = [name for name in ("sft", "tuned") if (run.models / name).is_dir()]
    if not made:
        raise UsageError(f"{folder}: has no models/sft or models/tuned yet; let the run go on")
    base = System("base", load_recipe(run.recipe_path).model.base)
    return [base, *(System(name, str(run.models / name)) for name in made)]


def read_completions(path: str) -> dict[str, tuple[Prompt, str]]:
    """Prompt and completion by the prompt's text, of a file of completions.

    The completion is under the key `completion`, `prediction`, `output_text` or `response`.

    Raises:
        DataError: a row has none of them, or two rows have the same prompt.
    """
    found: dict[str, tuple[Prompt, str]] = {}
    for number, prompt in enumerate(read_prompts([path]), 1):
        text = next((prompt.meta[k] for k in _KEYS if isinstance(prompt.meta.get(k), str)), None)
        if text is None:
            keys = ", ".join(map(repr, _KEYS))
            raise DataError(
                f"a completion is missing; give it under one of {keys}",
                path=path,
                line=number,
                field=_KEYS[0],
            )
        key = prompt_name(prompt)
        if key in found:
            raise DataError(
                f"the prompt of {found[key][0].id!r} comes again; keep one completion of each",
                path=path,
                line=number,
            )
        found[key] = prompt, text
    return found


def prompt_name(prompt: Prompt) -> str:
    """All its turns: what a prompt is matched by across files."""
    return "\n\0".join(f"{message.speaker}: {message.content}" for message in prompt.messages)


def gather(
    systems: Sequence[System],
    prompts: Sequence[Prompt] | None,
    answers: Mapping[str, Mapping[str, str]],
    files: Mapping[str, Mapping[str, tuple[Prompt, str]]],
) -> Iterator[tuple[Prompt, dict[str, str]]]:
    """Each prompt with every system's completion.

    Args:
        systems: all of them.
        prompts: asked for; None: those of the first file.
        answers: of the models, by system and prompt id.
        files: of the others, by system and prompt's text.

    Raises:
        DataError: a file lacks a prompt.
    """
    asked = prompts
    if asked is None:
        first = next(system for system in systems if system.is_file)
        asked = [prompt for prompt, _ in files[first.name].values()]
    for prompt in asked:
        found: dict[str, Any] = {}
        for system in systems:
            if system.name in answers:
                found[system.name] = answers[system.name][prompt.id]
                continue
            row = files[system.name].get(prompt_name(prompt))
            if row is None:
                raise DataError(
                    f"has no completion of prompt {prompt.id!r}; every system must answer the same "
                    "prompts",
                    path=system.source,
                )
            found[system.name] = row[1]
        yield prompt, found
