"""Runs the stages of a recipe on a Ray cluster; each does there what it does here.

Stages that several ranks compute together run in the workers of Ray Train, which starts them again
when one has died; they go on from the checkpoints in the run folder. The others, data and report,
are a Ray task each: one process, without the training stages' GPUs. What the leading worker says
comes back over a queue; Ray's own messages stay in its logs.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypeVar, cast

from amenable.artifacts import Deadline, Json, Progress, RunFolder, read_json, write_text
from amenable.config.ray import RAY_STAGES, RayStageConfig
from amenable.config.recipe import Recipe
from amenable.errors import AmenableError, StageError, UsageError
from amenable.masking import shown_name, without_secrets
from amenable.pipeline import local
from amenable.pipeline.fingerprint import code_hash
from amenable.pipeline.manifest import versions
from amenable.pipeline.mirror import place as located
from amenable.pipeline.preflight import check_inputs
from amenable.pipeline.stages import STAGES, Stage
from amenable.ranks.launch import LONGEST_STEP, seat

T = TypeVar("T")

_OBJECT_STORE_BYTES = 100 * 2**20  # of a local cluster: no tensor passes through it
_BETWEEN_LOOKS_S = 0.2  # for a line, and for the end
_HOST_ANSWERS_S = 120.0
_KNOCK_S = 10.0


@dataclass(frozen=True)
class Place:
    """What stages ask of the cluster."""

    workers: int
    cpus: float
    gpus: float
    together: bool
    """By the workers of Ray Train; else as one task."""


@dataclass(frozen=True)
class Failure:
    """An error that was raised on purpose in a worker."""

    message: str
    exit_code: int

    def raised(self) -> StageError:
        """The error, to be raised here."""
        error = StageError(self.message)
        error.exit_code = self.exit_code
        return error


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    recipe: Recipe
    folder: Path
    """Of the run."""
    directory: Path
    """Where the command was given: paths of the recipe are meant from there."""
    command: tuple[str, ...]
    stages: tuple[str, ...]
    end: float | None
    """Of the budget, in seconds since the epoch: it does not begin again with a worker."""
    place: Place
    lines: Any
    """A Ray queue of what the user shall see."""
    name: str
    """No other run's; that of Ray Train's records."""

    def minutes(self) -> float | None:
        """What is left of the budget; above 0."""
        return None if self.end is None else max(self.end - time.time(), 1.0) / 60


def run(
    recipe: Recipe,
    out_dir: Path | str,
    *,
    on: str,
    only: str | None = None,
    until: str | None = None,
    max_minutes: float | None = None,
    progress: Progress | None = None,
) -> Json:
    """As `local.run`, on a cluster.

    Args:
        recipe: the resolved recipe.
        out_dir: the run folder, made if missing; every host of the cluster must see it.
        on: `ray` starts a cluster on this machine for as long as the run takes; `ray://HOST:PORT`
            joins the one whose head is there, `ray://auto` the one that this host belongs to.
        only: run this stage alone; what it needs must be done.
        until: run the stages up to and with this one.
        max_minutes: end well inside this budget, with every artifact.
        progress: what the user sees; None draws on stderr.

    Raises:
        AmenableError: what was wrong, where, and what to do.
    """
    progress = progress or Progress()
    selected = local.select(STAGES, only, until)
    if max_minutes is not None and max_minutes <= 0:
        raise UsageError("--max-minutes: must be above 0")
    where = located(out_dir)
    if not isinstance(where, Path):
        raise UsageError(
            f"--on {on}: the run folder must lie on a file system that all hosts share, not at "
            f"{shown_name(where)}; give one with --out"
        )
    check_inputs(recipe, [stage.name for stage in selected])
    folder = RunFolder(where.absolute())
    deadline = Deadline(None if max_minutes is None else max_minutes * 60)
    parts = places(recipe, selected)
    _check_engine(recipe, parts)
    asked = [place for place, _ in parts]
    with _interruptible(), cluster(on, asked, folder.root, progress):
        for number, (place, stages) in enumerate(parts):
            rest = [stage for _, later in parts[number:] for stage in later]
            minutes = None if max_minutes is None else _minutes(deadline, stages, rest, recipe)
            _run_part(recipe, folder.root, place, stages, minutes, progress)
    return cast(Json, read_json(folder.summary_path))


def run_tasks(
    on: str,
    folder: Path,
    place: Place,
    max_failures: int,
    function: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    progress: Progress,
) -> None:
    """Call a function once for each set of arguments, each call a task of the cluster.

    Args:
        on: as `run` takes it.
        folder: where the function writes; every host of the cluster must see it.
        place: its CPUs and GPUs are each task's.
        max_failures: how often a task is started again after its process has died.
        function: a module's own, of a module that the hosts have.
        arguments: of the calls.
        progress: what the user sees.

    Raises:
        AmenableError: a call has raised it, or its process died too often.
    """
    with _interruptible(), cluster(on, [place], folder, progress):
        import ray

        task = ray.remote(num_cpus=place.cpus, num_gpus=place.gpus, max_retries=max_failures)(_call)
        waiting = [task.remote(Path.cwd(), function, own) for own in arguments]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            with _told("a task", max_failures):
                failure = ray.get(done[0])
            if failure is not None:
                raise failure.raised()
            progress.say(f"ray: {len(arguments) - len(waiting)} of {len(arguments)} tasks done")


def _call(directory: Path, function: Callable[..., None], own: tuple[Any, ...]) -> Failure | None:
    """In a worker: an error that was raised on purpose is an answer, as in `_work`."""
    os.chdir(directory)
    try:
        function(*own)
    except AmenableError as error:
        return Failure(str(error), error.exit_code)
    return None


def place_of(recipe: Recipe, stage: str) -> Place:
    """What a stage asks for, by name."""
    ours = recipe.ray
    if stage not in RAY_STAGES:
        return Place(1, ours.cpus_per_worker, 0.0, together=False)
    own: RayStageConfig = getattr(ours, stage)
    return Place(
        own.workers or ours.workers,
        own.cpus_per_worker or ours.cpus_per_worker,
        ours.gpus_per_worker if own.gpus_per_worker < 0 else own.gpus_per_worker,
        together=True,
    )


def places(recipe: Recipe, selected: Sequence[Stage]) -> list[tuple[Place, list[Stage]]]:
    """The stages in order; neighbours that ask for the same share their workers.

    A stage that is off asks for nothing and goes with the one before it.
    """
    parts: list[tuple[Place, list[Stage]]] = []
    for stage in selected:
        place = place_of(recipe, stage.name)
        if parts and (parts[-1][0] == place or stage.off(recipe)):
            parts[-1][1].append(stage)
        else:
            parts.append((place, [stage]))
    return parts


def _minutes(
    deadline: Deadline, stages: Sequence[Stage], rest: Sequence[Stage], recipe: Recipe
) -> float:
    """What is left of the budget for these stages, of all that are still to run; above 0."""
    due, still = (
        sum(stage.time_share for stage in some if not stage.off(recipe)) for some in (stages, rest)
    )
    return max(deadline.remaining_s(), 1.0) / 60 * (due / still if due else 1.0)


def _check_engine(recipe: Recipe, parts: Sequence[tuple[Place, list[Stage]]]) -> None:
    """Raises UsageError: vLLM, which runs within one process, would have to serve several."""
    for place, stages in parts:
        named = any(stage.name == "policy" for stage in stages)
        if named and place.workers > 1 and recipe.policy.engine == "vllm":
            raise UsageError(
                'policy.engine: "vllm" runs within one process; set ray.policy.workers = 1, or '
                'policy.engine = "own"'
            )


def _run_part(
    recipe: Recipe,
    folder: Path,
    place: Place,
    stages: Sequence[Stage],
    max_minutes: float | None,
    progress: Progress,
) -> None:
    """Raises AmenableError: of the leading worker, or StageError: workers died too often."""
    import ray
    from ray.util.queue import Queue

    names = tuple(stage.name for stage in stages)
    lines = Queue(actor_options={"num_cpus": 0})
    command = tuple(sys.argv)
    end = None if max_minutes is None else time.time() + 60 * max_minutes
    name = f"{names[0]}-{uuid.uuid4().hex[:8]}"
    job = Job(recipe, folder, Path.cwd(), command, names, end, place, lines, name)
    train = _trainer(job) if place.together else _task(job)
    try:
        with _told(" to ".join(dict.fromkeys((names[0], names[-1]))), recipe.ray.max_failures):
            failure = _listen(train, lines, progress.say)
    finally:
        _remove_records(job)
        ray.kill(lines.actor)
    if failure is not None:
        raise failure.raised()


def _storage(folder: Path) -> Path:
    """Where Ray Train keeps its own records while it runs, those of each run below its name."""
    return folder / ".ray"


def _remove_records(job: Job) -> None:
    """Those of this run: a second one, which the lock refuses, must leave the first one's."""
    shutil.rmtree(_storage(job.folder) / job.name, ignore_errors=True)
    with suppress(OSError):  # there are others', or none
        _storage(job.folder).rmdir()


def _trainer(job: Job) -> Callable[[], Failure | None]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    place = job.place
    resources = {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=int(LONGEST_STEP.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=place.workers, use_gpu=place.gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=str(_storage(job.folder)),
            failure_config=FailureConfig(max_failures=job.recipe.ray.max_failures),
        ),
    )
    return lambda: cast("Failure | None", trainer.fit().return_value)


def _task(job: Job) -> Callable[[], Failure | None]:
    import ray

    retries = job.recipe.ray.max_failures
    task = ray.remote(num_cpus=job.place.cpus, max_retries=retries)(_work)
    return lambda: cast("Failure | None", ray.get(task.remote({"job": job})))


def _work(told: Mapping[str, Job]) -> Failure | None:
    """In a worker: the stages as this rank takes part in them.

    An error that was raised on purpose is an answer, not raised: starting again would not help.
    Where it only tells that another rank has died, that death makes Ray start all of them again.
    """
    job = told["job"]
    os.chdir(job.directory)
    if job.place.gpus:
        import torch
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    own = seat()
    rank, size = (own.rank, own.size) if own else (0, 1)
    progress = Progress(stream=cast(TextIO, _Lines(job.lines)))
    if job.place.together:
        progress.say(f"ray: worker {rank} of {size}: {socket.gethostname()}, process {os.getpid()}")
    try:
        local.run(
            job.recipe,
            job.folder,
            only=job.stages,
            max_minutes=job.minutes(),
            progress=progress,
            command=job.command,
        )
    except AmenableError as error:
        return Failure(str(error), error.exit_code)
    return None


class _Lines(io.TextIOBase):
    """Text whose whole lines go into a queue."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._begun = queue, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._queue.put(line)
        return len(text)


def _listen(work: Callable[[], T], lines: Any, say: Callable[[str], None]) -> T:
    """What `work` returns or raises; meanwhile the lines are said.

    It runs in a thread, so that Ctrl-C reaches this one and no handler of Ray's.
    """
    from ray.util.queue import Empty

    result: list[T] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=call, name="amenable on ray", daemon=True)
    thread.start()
    while True:
        is_last = not thread.is_alive()
        try:
            while True:
                say(lines.get(timeout=_BETWEEN_LOOKS_S))
        except Empty:
            pass
        if is_last:
            break
    if failure:
        raise failure[0]
    return result[0]


@contextmanager
def _told(what: str, max_failures: int) -> Iterator[None]:
    """Raises StageError: one line of what Ray tells in many."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    try:
        yield
    except (RayError, TrainingFailedError) as failure:
        causes = getattr(failure, "worker_failures", {}) or {0: failure}
        worker, cause = min(causes.items())
        last = _last_line(cause).split(". ")[0]
        raise StageError(
            f"{what}: worker {worker} failed on Ray, more often than ray.max_failures = "
            f"{max_failures} forgives; the last time: {last}; the same command goes on "
            "from the last checkpoint"
        ) from failure


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raises Interrupted: Ctrl-C or SIGTERM came; what runs on the cluster ends with the command.

    Outside the main thread, where Python runs no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as error:
        raise local.Interrupted("on Ray", heard[-1] if heard else signal.SIGINT) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cluster(on: str, asked: Sequence[Place], folder: Path, progress: Progress) -> Iterator[None]:
    """Joins a cluster, or starts one on this machine, and leaves or ends it after the block.

    Args:
        on: as `run` takes it.
        asked: what will be wanted of it.
        folder: that all its hosts must see.
        progress: hears what may be a mistake.

    Raises:
        UsageError: Ray is not installed, no such cluster, it is too small, or a host does not fit.
    """
    ray = _import_ray(on)
    address = on.removeprefix("ray").removeprefix("://") or "local"
    settings: Json = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        wanted = max((place.workers * place.cpus for place in asked), default=0.0)
        settings |= {
            "num_cpus": max(os.cpu_count() or 1, math.ceil(wanted)),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        _knock(address)
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, **settings)
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray has put its own in its place
            signal.signal(signal.SIGTERM, handler)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--on {on}: {_first_line(error)}; give the address that `ray start --head` listens "
            "at, on a host that `ray start --address` has joined to the cluster"
        ) from error
    try:
        _check_room(on, asked, ray.cluster_resources(), progress)
        if address != "local":
            _check_hosts(ray, folder)
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError: nobody listens at HOST:PORT; Ray would try for minutes, aloud."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def _import_ray(on: str) -> ModuleType:
    if not re.fullmatch(r"ray(://[^/]+)?", on):
        raise UsageError(f"--on: found {on!r}; expected ray, ray://auto or ray://HOST:PORT")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.train
    except ImportError as error:
        raise UsageError(
            f'--on {on}: Ray is not installed ({error}); pip install "amenable[ray]"'
        ) from error
    return cast(ModuleType, ray)


def _check_room(
    on: str, asked: Sequence[Place], has: Mapping[str, float], progress: Progress
) -> None:
    """Raises UsageError: a stage would wait for ever."""
    for kind, key in (("CPU", "cpus"), ("GPU", "gpus")):
        for place in asked:
            wanted = place.workers * getattr(place, key)
            if wanted > has.get(kind, 0.0):
                raise UsageError(
                    f"--on {on}: the recipe asks for {place.workers} workers with "
                    f"{getattr(place, key):g} {kind}s each and the cluster has "
                    f"{has.get(kind, 0.0):g} {kind}s; lower ray.workers or ray.{key}_per_worker"
                )
    if has.get("GPU") and not any(place.gpus for place in asked):
        progress.say(
            f"ray: the cluster has {has['GPU']:g} GPUs and the recipe asks for none; "
            "ray.gpus_per_worker = 1 takes one a worker"
        )


def _check_hosts(ray: ModuleType, folder: Path) -> None:
    """Every host of the cluster is asked before a stage starts.

    Raises:
        UsageError: one has other versions, or does not see this folder or the run folder.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark = folder / f".ray-{uuid.uuid4().hex[:8]}"
    write_text(mark, "")
    try:
        asked = []
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                look = ray.remote(num_cpus=0, scheduling_strategy=there)(_look)
                asked.append((node["NodeManagerHostname"], look.remote(Path.cwd(), mark, facts())))
        for host, answer in asked:
            try:
                fault = ray.get(answer, timeout=_HOST_ANSWERS_S)
            except ray.exceptions.RayError as error:
                fault = f"{_last_line(error)}; the same amenable must be installed there"
            if fault:
                raise UsageError(f"host {host} of the cluster: {fault}")
    finally:
        mark.unlink(missing_ok=True)


def facts() -> dict[str, str | None]:
    """Versions that decide results."""
    return {
        **versions(),
        "ray": importlib.metadata.version("ray"),
        "amenable's source": code_hash(with_report=True)[:12],
    }


def _look(directory: Path, mark: Path, wanted: Mapping[str, str | None]) -> str:
    """On a host of the cluster: what does not fit; empty if all does."""
    for name, own in facts().items():
        if own != wanted[name]:
            return f"the version of {name} is {own} there and {wanted[name]} here"
    if not directory.is_dir():
        return f"{directory}, where this command was given, is not there; share it under that path"
    if not mark.exists():
        return (
            f"{mark.parent} is not the run folder there; put it (--out) on a file system that all "
            "hosts share, under the same path"
        )
    return ""


def _first_line(error: BaseException) -> str:
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])


def _last_line(error: BaseException) -> str:
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[-1])
