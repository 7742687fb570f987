"""What happens inside a task of a Kubeflow pipeline: a key for every stage, a command line.

A pipeline caches a task by its inputs, and would not notice an edit of an imported package, a new
data file under an old name or a run folder that has been emptied. So the first task, which is never
cached, looks at all of these and gives each stage a key, one of its inputs: the key of last time
where the stage's results lie in the run folder as that task left them and nothing that they depend
on has changed; else a new one.

Standard library, Amenable's configuration and its own tables; no kfp.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from amenable.artifacts import RunFolder, read_json, write_json, write_text
from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.errors import AmenableError, RecipeError, StageError
from amenable.masking import without_secrets
from amenable.pipeline import local
from amenable.pipeline.fingerprint import FileHashes, fingerprint, stage_ingredients
from amenable.pipeline.lock import run_lock
from amenable.pipeline.preflight import base_model, check_inputs, silence_libraries
from amenable.pipeline.stages import STAGES, Stage
from amenable.pipeline.state import read_state

SAID = "amenable> "
"""Before every line that a task has to tell, among those that the executor writes."""

FAILED = ": failed with exit code"
"""After the task's name, before the exit code and the message."""


class TaskFailed(StageError):
    """A command that a task ran has failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Takes the command's exit code for its own."""
        super().__init__(message)
        self.exit_code = exit_code


def say(text: str) -> None:
    """One line to the task's log."""
    print(f"{SAID}{text}", flush=True)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that the recipe wants, in order: one task each."""
    return [stage.name for stage in STAGES if not stage.off(recipe)]


def prepare(text: str, run_folder: str, stages: Sequence[str]) -> dict[str, str]:
    """Puts the recipe into the run folder and returns a key for every stage; empty: it is off.

    Args:
        text: the recipe, as TOML.
        run_folder: made if missing.
        stages: that the pipeline was compiled with.

    Ends the process, with the command line's exit code, where the recipe or what it names is wrong.
    """
    folder = RunFolder(Path(run_folder))
    with task("prepare"):
        recipe = _put_recipe(folder, text, stages)
        silence_libraries()
        check_inputs(recipe)
        base = base_model(recipe, say)
        for stage in STAGES:  # what a stage left that is off now would be used by later ones
            if stage.off(recipe) and read_state(folder, stage.name) is not None:
                local.run(recipe, folder.root, only=stage.name, stages=STAGES)
        hashes = FileHashes(folder.root / ".hashes.json")
        keys = {
            stage.name: _key(folder, stage, recipe, base, hashes) if stage.name in stages else ""
            for stage in STAGES
        }
        hashes.save()
    return keys


def run_stage(stage: str, run_folder: str, key: str) -> str:
    """Runs `amenable run RECIPE --only STAGE` and returns the hash of the stage's state.

    Args:
        stage: its name.
        run_folder: as `prepare` left it.
        key: of this stage, from `prepare`.

    Ends the process with the command's exit code where that is not 0.
    """
    folder = RunFolder(Path(run_folder))
    recipe = str(_own(folder) / "recipe.toml")
    with task(stage):
        amenable("run", recipe, "--only", stage, "--out", run_folder)
        state = _state_of(folder, stage, FileHashes(folder.root / ".hashes.json"))
        write_json(_own(folder) / "keys" / f"{stage}.json", {"key": key, "state": state})
    return state


def results(run_folder: str, page: str, numbers: str, figures: str) -> dict[str, float]:
    """Copies the results to where a pipeline keeps its artifacts; returns the main figures.

    Args:
        run_folder: of the finished run.
        page: takes report.html.
        numbers: takes summary.json.
        figures: takes the figures that are returned; an artifact without a file is never cached.
    """
    folder = RunFolder(Path(run_folder))
    summary = read_json(folder.summary_path)
    reward, found = summary.get("reward") or {}, {}
    if reward.get("accuracy") is not None:
        found["reward_accuracy"] = reward["accuracy"]
    for row in summary.get("evaluate") or ():
        if row["win_rate"] is not None:
            found[f"win_rate_{row['b']}_against_{row['a']}_by_{row['judge']}"] = row["win_rate"]
    shutil.copyfile(folder.report_path, page)
    shutil.copyfile(folder.summary_path, numbers)
    write_json(Path(figures), found)
    return found


@contextmanager
def task(name: str) -> Iterator[None]:
    """Ends the process, with the error's exit code, where the block fails, and tells why."""
    try:
        yield
    except AmenableError as error:
        say(f"{name}{FAILED} {error.exit_code}: {without_secrets(str(error))}")
        sys.exit(error.exit_code)


def amenable(*words: str) -> None:
    """Runs an `amenable` command in a process of its own and tells what it says as it says it.

    SIGTERM goes on to it, so that it ends with a checkpoint, and is waited for.

    Raises:
        TaskFailed: it ended with another exit code than 0; has that, and its error line.
    """
    error = ""
    with (
        subprocess.Popen(
            [sys.executable, "-m", "amenable", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        ) as process,
        _sigterm_goes_to(process),
    ):
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("amenable: "):
                error = line.rstrip().removeprefix("amenable: ")
            elif line.strip():
                say(line.rstrip())
    if code := process.returncode:  # below 0: a signal's
        raise TaskFailed(error or "ended without a word", code if code > 0 else 128 - code)


@contextmanager
def _sigterm_goes_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """Outside the main thread, where Python runs no handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _own(folder: RunFolder) -> Path:
    return folder.root / "kfp"


def _put_recipe(folder: RunFolder, text: str, stages: Sequence[str]) -> Recipe:
    """The recipe, checked and written into the run folder.

    Raises:
        RecipeError: it is wrong, or wants other stages than the pipeline has.
        StageError: another process writes the run folder.
    """
    path = _own(folder) / "recipe.toml"
    with run_lock(folder.lock_path):
        write_text(path, text)
    recipe = load_recipe(path)
    wanted = stages_of(recipe)
    if wanted != list(stages):
        raise RecipeError(
            f"{path}: wants the stages {', '.join(wanted)}, and the pipeline was compiled with"
            f" {', '.join(stages)}; compile it again from this recipe"
        )
    return recipe


def _key(
    folder: RunFolder, stage: Stage, recipe: Recipe, base: Path | str, hashes: FileHashes
) -> str:
    """The key of last time while that holds, or a new one."""
    own = fingerprint(stage_ingredients(stage, recipe, base, {}, hashes))[:16]
    with suppress(AmenableError, KeyError, TypeError):
        last = read_json(_own(folder) / "keys" / f"{stage.name}.json")
        same = last["state"] == _state_of(folder, stage.name, hashes)
        if same and last["key"].startswith(own):
            return str(last["key"])
    return f"{own}-{uuid.uuid4().hex[:16]}"


def _state_of(folder: RunFolder, stage: str, hashes: FileHashes) -> str:
    """A hash of what the stage was made of and of what it made; empty unless all of it is whole."""
    state = read_state(folder, stage)
    if state is None or not state.done:
        return ""
    try:
        whole = all(
            hashes.digest(folder.root / path) == digest for path, digest in state.outputs.items()
        )
    except OSError:
        return ""
    told = json.dumps([state.fingerprint, state.outputs], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest() if whole else ""
