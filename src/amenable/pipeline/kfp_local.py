"""Runs a Kubeflow pipeline on this machine, without Docker: each task is a process of its own."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from kfp import local

from amenable.pipeline.kfp_tasks import FAILED, SAID, TaskFailed
from amenable.pipeline.local import Interrupted
from amenable.progress import duration

_COLOUR = re.compile(r"\x1b\[\d+m")
_STARTED = re.compile(r"Executing task '([\w-]+)'")
_FAILED = re.compile(rf"{SAID}([\w-]+){FAILED} (\d+): (.*)")
_RAISED = re.compile(r"[\w.]+(Error|Exception)\b")
_EXECUTOR = "kfp.dsl.executor_main"
_CACHED = re.compile(r"Task ([\w-]+) cache hit")


def run_pipeline(
    pipeline: Any,
    values: Mapping[str, Any],
    root: Path,
    say: Callable[[str], None],
    *,
    caching: bool = True,
) -> dict[str, Any]:
    """Runs the pipeline's tasks and returns its outputs.

    Args:
        pipeline: what `dsl.pipeline` made, or a compiled file that was loaded.
        values: of its parameters.
        root: the folder of its tasks' outputs and of the cache.
        say: takes a line of progress.
        caching: leave out what was done with the same inputs.

    Raises:
        TaskFailed: a task failed; says which, and what it said last.
        Interrupted: Ctrl-C or SIGTERM stopped it.
    """
    told = _Told(say)
    with _listening(told), _sigterm_goes_to_tasks(told), warnings.catch_warnings():
        # an image that is not used here, limits that only a cluster keeps
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"kfp\.local\.")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"kfp\.local\.")
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(root),
            enable_caching=caching,
            cache_root=str(root / "cache"),
        )
        try:
            outputs: dict[str, Any] = pipeline(**values).outputs
        except KeyboardInterrupt as error:
            raise told.interrupted() from error
        except RuntimeError as error:
            if told.stopped:
                raise told.interrupted() from error
            raise told.failure or TaskFailed(told.reason(error), 1) from error
    if told.stopped:
        raise told.interrupted()
    return outputs


class _Told(io.TextIOBase):
    """Stands in for stdout: lets through what tasks have to tell, and times them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._rest = ""
        self._started = 0.0
        self._error = ""
        self.task = ""
        self.stopped = False
        """SIGTERM came: no further task starts."""
        self.failure: TaskFailed | None = None

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._read(_COLOUR.sub("", line).strip())
        return len(text)

    def hear(self, message: str) -> None:
        """What kfp logs while no task runs."""
        if found := _CACHED.search(message):
            self._say(f"{found[1]}: cached")

    def reason(self, error: RuntimeError) -> str:
        """Of a failure that no task has told of: a defect, or a task that was killed."""
        return f"task {self.task} failed: {self._error or _COLOUR.sub('', str(error))}"

    def interrupted(self) -> Interrupted:
        """In the task that ran last, by SIGTERM or Ctrl-C."""
        return Interrupted(f"in {self.task}", signal.SIGTERM if self.stopped else signal.SIGINT)

    def _read(self, line: str) -> None:
        if found := _FAILED.fullmatch(line):
            self.failure = TaskFailed(f"{found[3]} (task {found[1]})", int(found[2]))
        elif line.startswith(SAID):
            self._say(line.removeprefix(SAID))
        elif found := _STARTED.search(line):
            if self.stopped:
                raise KeyboardInterrupt  # logging lets nothing else through
            self.task, self._started = found[1], time.monotonic()
            self._error, self.failure = "", None  # of an attempt before
        elif self.task and f"Task '{self.task}' finished with status SUCCESS" in line:
            self._say(f"{self.task}: task took {duration(time.monotonic() - self._started)}")
        elif _RAISED.match(line):
            self._error = line


class _Hearing(logging.Handler):
    def __init__(self, told: _Told) -> None:
        super().__init__(logging.INFO)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.hear(record.getMessage())


@contextlib.contextmanager
def _sigterm_goes_to_tasks(told: _Told) -> Iterator[None]:
    """The task that runs ends its command at a safe point, and is waited for.

    Outside the main thread, where Python runs no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, _: object) -> None:
        told.stopped = True
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _EXECUTOR in process.cmdline():
                    process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _listening(told: _Told) -> Iterator[None]:
    """Everything that kfp prints or logs goes to `told`."""
    logger = logging.getLogger()
    level, handlers = logger.level, logger.handlers[:]
    logger.handlers[:] = [_Hearing(told)]
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(told):
            yield
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers
