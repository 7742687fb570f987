"""The figures of a run in experiment trackers: Weights & Biases, MLflow, Trackio.

One run folder is one tracked run for as long as its recipe and what each stage is made of stay; a
resumed run goes on in it. `trackers.json` in the run folder keeps its ids and how far each stage
was told, so that no point comes twice. A tracker that fails is told of once and left out from then
on: it never stops training. Everything else (project, server, login) is set by the library's own
environment.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amenable.artifacts import Json, Observer, read_json, write_json
from amenable.errors import AmenableError, UsageError
from amenable.masking import shown_value, without_secrets

if TYPE_CHECKING:
    from amenable.config.recipe import Recipe

_PROJECT = "amenable"
_NO_FIGURES = ("trackers", "ray.", "kfp.", "checkpoint.")
"""Beginnings of the recipe keys that change where and how a run runs, not what it measures."""
_MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own defaults wait for minutes, in a row's place
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""Settings of its own that MLflow gets where the user has set none."""


class Tracker(Protocol):
    """A tracked run that is open."""

    id: str
    """By which a later process goes on in it."""

    def log(self, stage: str, step: int, figures: Mapping[str, float], order: int) -> None:
        """Points of one step of a stage, by their full names.

        Args:
            stage: its name.
            step: of the stage.
            figures: finite, by full names.
            order: grows from call to call, over all stages and processes of the run.
        """
        ...

    def finish(self, ok: bool) -> None:
        """The process ends; whether well."""
        ...


class WandB:
    """Weights & Biases. Each stage has an axis of its own, as `sft/step`."""

    def __init__(self, name: str, config: Json, known: str) -> None:
        wandb = importlib.import_module("wandb")
        self.id = known or uuid.uuid4().hex
        self._stages: set[str] = set()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=name,
            id=self.id,
            resume="allow",
            config=config,
            # without meta, which holds the command line, in which there may be secrets
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
        )

    def log(self, stage: str, step: int, figures: Mapping[str, float], order: int) -> None:
        """As `Tracker`."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **figures}, step=order)

    def finish(self, ok: bool) -> None:
        """As `Tracker`."""
        self._run.finish(exit_code=0 if ok else 1)


class MLflow:
    """MLflow, on the server or store of MLFLOW_TRACKING_URI."""

    def __init__(self, name: str, config: Json, known: str) -> None:
        for variable, value in _MLFLOW.items():
            os.environ.setdefault(variable, value)
        tracking = importlib.import_module("mlflow.tracking")
        entities = importlib.import_module("mlflow.entities")
        self._metric = entities.Metric
        self._client = tracking.MlflowClient()
        self.id = known
        if known:
            self._client.update_run(known, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self.id = self._client.create_run(experiment, run_name=name).info.run_id
        params = [entities.Param(key, str(value)) for key, value in config.items() if value != ""]
        self._client.log_batch(self.id, params=params[:100])
        for start in range(100, len(params), 100):  # the most in a call
            self._client.log_batch(self.id, params=params[start : start + 100])

    def log(self, stage: str, step: int, figures: Mapping[str, float], order: int) -> None:
        """As `Tracker`."""
        now = int(1000 * time.time())
        self._client.log_batch(
            self.id, metrics=[self._metric(key, value, now, step) for key, value in figures.items()]
        )

    def finish(self, ok: bool) -> None:
        """As `Tracker`."""
        self._client.set_terminated(self.id, "FINISHED" if ok else "FAILED")


class Trackio:
    """Trackio, in its local store or the Space of TRACKIO_SPACE_ID."""

    def __init__(self, name: str, config: Json, known: str) -> None:
        self._trackio = importlib.import_module("trackio")
        self.id = known or f"{name}-{uuid.uuid4().hex[:8]}"
        with redirect_stdout(io.StringIO()):  # it greets there, where results go
            self._run = self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=self.id,
                config=config,
                resume="allow",
                embed=False,
            )

    def log(self, stage: str, step: int, figures: Mapping[str, float], order: int) -> None:
        """As `Tracker`."""
        self._run.log(dict(figures), step=step)

    def finish(self, ok: bool) -> None:
        """As `Tracker`."""
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


KINDS: dict[str, Callable[[str, Json, str], Tracker]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Opens a tracked run, given the run's name, its settings and the id of an earlier process."""


@contextmanager
def _unasked() -> Iterator[None]:
    """Lets no library ask at a terminal, as for a login, while training would wait."""
    terminal = sys.stdin
    with open(os.devnull) as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = terminal


def check_trackers(names: Iterable[str]) -> None:
    """Returns when the packages of these trackers are installed.

    Raises:
        UsageError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"trackers: {name!r} needs the package {name}, which is not installed; "
                f"pip install {name}, or remove it from the recipe"
            )


class Trackers:
    """The trackers of one run folder; each is opened when the first figure comes.

    Args:
        recipe: names them.
        root: the run folder.
        say: takes a line for the user.
    """

    def __init__(self, recipe: Recipe, root: Path, say: Callable[[str], None]) -> None:
        from amenable.config.load import flatten

        self._recipe, self._say, self._path = recipe, say, root / "trackers.json"
        self._config = {key: shown_value(value) for key, value in flatten(recipe).items()}
        self._open: dict[str, Tracker] = {}
        self._off: set[str] = set()
        self._told: dict[str, Json] = self._read()

    def of(self, stage: str, then: Observer, made: str = "") -> Observer:
        """What hears the log of a stage, and tells `then` after the trackers.

        Args:
            stage: its name.
            then: hears it too.
            made: the stage's fingerprint; another one than was told is another tracked run.
        """
        return _StageTracker(self, stage, then, made) if self._recipe.trackers else then

    def log(self, stage: str, step: int, figures: Mapping[str, float], made: str = "") -> None:
        """Tells every tracker what it has not been told; what is no number is left out."""
        finite = {f"{stage}/{k}": v for k, v in figures.items() if math.isfinite(v)}
        for name in self._recipe.trackers:
            if name in self._off:
                continue
            with self._told_once(name):
                self._start_anew(name, stage, made)
                tracker, steps = self._tracker(name), self._told[name]["steps"]
                self._told[name]["made"][stage] = made
                if step > steps.get(stage, -1):
                    steps[stage] = step
                    tracker.log(stage, step, finite, sum(steps.values()) + len(steps))
                    self._write()

    def finish(self, ok: bool) -> None:
        """Closes those that are open."""
        for name, tracker in self._open.items():
            if name not in self._off:
                with self._told_once(name):
                    tracker.finish(ok)
        self._open.clear()

    def _start_anew(self, name: str, stage: str, made: str) -> None:
        """Leaves the tracked run in which the stage stands as it was before."""
        if self._told.get(name, {}).get("made", {}).get(stage, made) != made:
            del self._told[name]
            if name in self._open:
                self._open.pop(name).finish(True)

    def _tracker(self, name: str) -> Tracker:
        if name not in self._open:
            known = self._told.setdefault(name, {"id": "", "steps": {}, "made": {}})
            with _unasked():
                self._open[name] = KINDS[name](self._recipe.name, self._config, known["id"])
            known["id"] = self._open[name].id
            self._write()
        return self._open[name]

    @contextmanager
    def _told_once(self, name: str) -> Iterator[None]:
        """Says what went wrong, and leaves the tracker out from then on."""
        try:
            yield
        except AmenableError:  # our own disk
            raise
        except Exception as error:  # every tracker has its own errors
            self._off.add(name)
            text = without_secrets(str(error)).strip() or type(error).__name__
            self._say(
                f"trackers: warning: {name} is left out from here on ({text.splitlines()[0]}); "
                "training goes on"
            )

    def _fingerprint(self) -> str:
        settings = {k: v for k, v in self._config.items() if not k.startswith(_NO_FIGURES)}
        return hashlib.sha256(
            json.dumps(settings, sort_keys=True, default=str).encode()
        ).hexdigest()

    def _read(self) -> dict[str, Json]:
        """What was told so far; nothing where the recipe was another one."""
        with suppress(AmenableError, KeyError, TypeError, AttributeError):
            found = read_json(self._path)
            if found["recipe"] == self._fingerprint():
                return {
                    name: {
                        "id": str(own["id"]),
                        "steps": dict(own["steps"]),
                        "made": dict(own["made"]),
                    }
                    for name, own in found["trackers"].items()
                }
        return {}

    def _write(self) -> None:
        write_json(self._path, {"recipe": self._fingerprint(), "trackers": self._told})


class _StageTracker:
    """Hears the log of one stage."""

    def __init__(self, trackers: Trackers, stage: str, then: Observer, made: str) -> None:
        self._trackers, self._stage, self._then, self._made = trackers, stage, then, made

    def begin(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Tell what stands in the log already and was not told."""
        kept = list(rows)
        for step, figures in kept:
            self._trackers.log(self._stage, step, figures, self._made)
        self._then.begin(kept)

    def see(self, step: int, figures: Mapping[str, float]) -> None:
        """One more row."""
        self._trackers.log(self._stage, step, figures, self._made)
        self._then.see(step, figures)
