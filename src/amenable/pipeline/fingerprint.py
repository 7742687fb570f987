"""What a stage depends on, reduced to one number: its settings, inputs and code.

Files are hashed by content. A file whose size, inode and times are those of the last look is
not read again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import amenable
from amenable.artifacts import read_json, write_json
from amenable.config.checks import lookup
from amenable.config.data import SourceConfig
from amenable.config.load import flatten
from amenable.config.recipe import Recipe
from amenable.config.rewards import outside_sources
from amenable.errors import AmenableError
from amenable.pipeline.stages import Stage, config_values

Ingredients = dict[str, str]
"""Everything that a stage depends on: what it is -> its value or hash."""

_PACKAGE = Path(amenable.__file__).parent
_NO_INFLUENCE = ("cli/", "web/", "pipeline/", "plan/", "progress.py")
_REPORT_ONLY = ("evaluate/report.py", "evaluate/templates/")
_UNSETTLED_S = 0.1
_NO_CONTENT = ("README.md", "amenable.json")


class FileHashes:
    """SHA-256 of files, remembered between runs."""

    def __init__(self, path: Path):
        """Reads what was remembered at `path`; a missing or broken memory is an empty one."""
        self._path = path
        self._known: dict[str, list[Any]] = {}
        with suppress(AmenableError):
            known = read_json(path)
            self._known = known if isinstance(known, dict) else {}

    def digest(self, path: Path) -> str:
        """The file's SHA-256 in hex.

        Raises:
            OSError: it cannot be read.
        """
        status = path.stat()
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        key = str(path.resolve())
        known = self._known.get(key)
        if known is not None and known[:-1] == identity:
            return str(known[-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - status.st_ctime > _UNSETTLED_S:  # else it may change within one clock tick
            self._known[key] = [*identity, digest]
        return digest

    def tree(self, path: Path, label: str) -> Ingredients:
        """Digests of a file, or of every file below a folder, under names that start with `label`.

        Model cards and the cache's own markers are left out: they change no result.
        """
        if path.is_file():
            return {label: self.digest(path)}
        return {
            f"{label}/{file.relative_to(path).as_posix()}": self.digest(file)
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name not in _NO_CONTENT
        }

    def save(self) -> None:
        """Remembers for the next run."""
        write_json(self._path, self._known)


def fingerprint(ingredients: Ingredients) -> str:
    """One SHA-256 over all ingredients."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The ingredients that differ, by name, in the order of `new`."""
    names = [*new, *(name for name in old if name not in new)]
    return [name for name in names if old.get(name) != new.get(name)]


def stage_ingredients(
    stage: Stage,
    recipe: Recipe,
    base: Path | str,
    artifacts: Mapping[str, str],
    hashes: FileHashes,
) -> Ingredients:
    """Everything that `stage` depends on.

    Args:
        stage: a row of the table.
        recipe: the resolved recipe.
        base: the base model's folder, or its hub id.
        artifacts: path in the run folder -> hash, of the stages that it needs.
        hashes: hashes files outside the run folder.
    """
    values = config_values(stage, flatten(recipe))
    found = {key: json.dumps(value) for key, value in values.items()}
    for label, source in _sources(stage, recipe, base):
        found |= hashes.tree(source, label) if isinstance(source, Path) else {label: source}
    found |= dict(matching(artifacts, stage.reads))
    if stage.name == "data" and recipe.data.task == "docstrings":
        from amenable.data.docstrings import harvest_fingerprint

        found["installed packages"] = json.dumps(harvest_fingerprint(), sort_keys=True)
    found["amenable"] = code_hash(with_report=stage.name == "report")
    return found


def matching(artifacts: Mapping[str, str], patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The artifacts that match a pattern; a `*` spans folders."""
    wanted = tuple(patterns)
    for path, digest in artifacts.items():
        if any(fnmatchcase(path, pattern) for pattern in wanted):
            yield path, digest


@cache
def code_hash(*, with_report: bool) -> str:
    """A hash of the package's source, without what cannot change a result."""
    left_out = _NO_INFLUENCE if with_report else _NO_INFLUENCE + _REPORT_ONLY
    total = hashlib.sha256(amenable.__version__.encode())
    for path in sorted(_PACKAGE.rglob("*")):
        name = path.relative_to(_PACKAGE).as_posix()
        source = path.suffix == ".py" or "templates/" in name
        if source and path.is_file() and not name.startswith(left_out):
            total.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _sources(stage: Stage, recipe: Recipe, base: Path | str) -> Iterator[tuple[str, Path | str]]:
    for key in stage.sources:
        if key == "model.base":
            yield "base model", base
        elif key == "policy.reward":
            for name, source in outside_sources(recipe.policy):
                yield from _code(name, ready_reward(source))
        else:
            yield from _data_sources(key, lookup(recipe, key))


def _data_sources(key: str, config: SourceConfig) -> Iterator[tuple[str, Path | str]]:
    """Files and remote files of one kind of row, and the code of its reader."""
    from amenable.data.reading.sources import find_sources, state_of

    for number, source in enumerate(find_sources(config.files)):
        local = source.local
        yield f"{key}[{number}] content", state_of(source) if local is None else local
    if config.reader:
        yield from _code(f"{key}.reader content", source_of_function(config.reader))


def _code(label: str, source: Path | str) -> Iterator[tuple[str, Path | str]]:
    """A function's file, or what stands for it, and the files beside it that it imports."""
    yield label, source
    if isinstance(source, Path) and source.suffix == ".py":
        for file in imported_beside(source):
            yield f"{label}, import of {file.name}", file


def imported_beside(path: Path) -> list[Path]:
    """The .py files of the same folder that a file names in import statements, at any depth.

    Packages, and modules of any other folder, are not looked at: a change of those is not seen.
    """
    found = {path}
    waiting = [path]
    while waiting:
        for name in _imported(waiting.pop()):
            file = path.with_name(f"{name}.py")
            if file not in found and file.is_file():
                found.add(file)
                waiting.append(file)
    return sorted(found - {path})


def _imported(path: Path) -> Iterator[str]:
    """Every part of each name that a file imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # whoever runs it says so
    for node in ast.walk(tree):
        names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        for name in names:
            yield from name.split(".")


def source_of_function(name: str) -> Path | str:
    """The source file of `module:function` or `path/to/file.py:function`, else the name.

    A module is looked for in the current directory first, as where it is loaded.
    """
    module, colon, _ = name.rpartition(":")
    if not colon:
        return name
    if module.endswith(".py") and Path(module).expanduser().is_file():
        return Path(module).expanduser()
    here = Path.cwd().joinpath(*module.split("."))
    for file in (here / "__init__.py", here.with_name(f"{here.name}.py")):
        if file.is_file():
            return file
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin)
    return name


def ready_reward(reward: str) -> Path | str:
    """A reward-model folder, the source file of `module:function`, or the hub id as it stands."""
    folder = Path(reward).expanduser()
    if reward and folder.is_dir():
        return folder
    return source_of_function(reward)
