from __future__ import annotations

import os
import subprocess
import sys

import pytest

_COUNT_FAULTS = """
import resource, sys, torch
from amenable.models.allocator import keep_freed_memory
print(int(keep_freed_memory()) if "keep" in sys.argv else 0)
def step():
    return torch.ones(10_000_000).mul(2).sum()  # 40 MB twice
counts = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(counts[10:]))
"""


def faults(*words: str, **environment: str) -> tuple[int, int]:
    """Whether memory was kept, and page faults of twenty equal steps."""
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES",)} | environment
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS, *words],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    )
    kept, count = map(int, done.stdout.split())
    return kept, count


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
def test_a_repeated_step_asks_the_system_for_no_new_pages() -> None:
    kept, count = faults("keep")
    assert kept
    assert count <= 200_000  # of 20 steps; each touches 20,000 pages
    assert faults()[1] > 380_000


def test_what_the_environment_says_is_left_alone() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == 0
