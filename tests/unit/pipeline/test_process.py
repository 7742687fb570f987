from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amenable.pipeline import process

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # <malloc.h>


class FakeLibc:
    """Remembers what malloc is told."""

    def __init__(self, answer: int = 1) -> None:
        self.told: dict[int, int] = {}
        self._answer = answer

    def mallopt(self, name: int, value: int) -> int:
        self.told[name] = value
        return self._answer


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name in ("LD_PRELOAD", "THP_MEM_ALLOC_ENABLE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "x")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")  # whatever the test sets is undone


def use(monkeypatch: pytest.MonkeyPatch, libc: Any) -> None:
    def load(name: str) -> Any:
        if isinstance(libc, Exception):
            raise libc
        return libc

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_malloc_is_told_to_keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = FakeLibc()
    use(monkeypatch, libc)
    assert process.keep_freed_memory() is True
    assert libc.told[MMAP_MAX] == 0, "large blocks come from the heap, which is kept"
    assert libc.told[TRIM_THRESHOLD] == 2**31 - 1, "the heap is never given back"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_a_malloc_that_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeLibc(answer=0))
    assert process.keep_freed_memory() is False


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "LD_PRELOAD"])
def test_the_users_own_settings_win(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    libc = FakeLibc()
    use(monkeypatch, libc)
    monkeypatch.setenv(name, "4")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert process.keep_freed_memory() is False
    assert libc.told == {}
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.mark.parametrize("libc", [OSError("no glibc"), object()])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, libc: Any) -> None:
    use(monkeypatch, libc)
    assert process.keep_freed_memory() is False


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = FakeLibc()
    use(monkeypatch, libc)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert process.keep_freed_memory() is False
    assert libc.told == {}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_real_process_goes_on_working_and_needs_no_torch() -> None:
    script = (
        "import sys; from amenable.pipeline.process import keep_freed_memory;"
        "kept = keep_freed_memory(); blocks = [bytearray(10**7) for _ in range(5)];"
        "print(kept in (True, False), sum(map(len, blocks)), 'torch' in sys.modules)"
    )
    source = str(Path(process.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "50000000", "False"]
