"""Stores in memory for tests, and one whose power is cut at a chosen moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec

from amenable.pipeline.store import Store


class PowerCut(Exception):
    """Nothing answers any more."""


class CutFile:
    """A file that is written through `cut`."""

    def __init__(self, file: Any, cut: Callable[[], None]) -> None:
        self._file, self._cut = file, cut

    def write(self, chunk: bytes) -> None:
        self._cut()
        self._file.write(chunk[: len(chunk) // 2])
        self._cut()
        self._file.write(chunk[len(chunk) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Cut:
    """A filesystem in memory that dies at its `at`-th step, for good; reading is no step.

    If it dies `late`, that step is done and only its answer is lost.
    """

    STEPS = ("pipe_file", "cp_file", "rm_file")

    def __init__(self, at: int | None = None) -> None:
        self._system = fsspec.filesystem("memory")
        self.at, self.steps, self.late = at, 0, False

    def cut(self) -> None:
        self.steps += 1
        if self.at is not None and self.steps >= self.at:
            raise PowerCut("the power is cut")

    def open(self, path: str, mode: str, **options: Any) -> Any:
        if mode == "rb":
            return self._system.open(path, mode, **options)
        self.cut()
        return CutFile(self._system.open(path, mode, **options), self.cut)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._system, name)
        if name not in self.STEPS:
            return found

        def step(*given: Any, **options: Any) -> Any:
            if self.late and self.steps + 1 == self.at:
                found(*given, **options)
            self.cut()
            return found(*given, **options)

        return step


def memory_store(name: str, at: int | None = None) -> Store:
    """The store `memory://NAME`, which waits for nothing."""
    return Store(f"memory://{name}", wait_s=0, system=Cut(at))


def clear(name: str) -> None:
    """Empties it."""
    system = fsspec.filesystem("memory")
    if system.exists(f"/{name}"):
        system.rm(f"/{name}", recursive=True)
