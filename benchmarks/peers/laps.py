"""Step times and peak memory of a training process; the same code on both sides."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


class Laps:
    """Seconds from the end of one step to the end of the next.

    The first step warms up: time is counted from its end.

    Args:
        timed: steps to time.
    """

    def __init__(self, timed: int) -> None:
        self._timed = timed
        self._ends: list[float] = []

    @property
    def planned(self) -> int:
        """Steps that a trainer must make."""
        return self._timed + 1

    def mark(self) -> bool:
        """Take note that a step has ended; whether it was the last."""
        self._ends.append(time.monotonic())
        return len(self._ends) == self.planned

    def report(self, side: str, threads: int, before_s: float = 0.0) -> None:
        """Print the figures as one line of JSON, the process's last.

        Args:
            side: name and version.
            threads: of a matrix product.
            before_s: seconds of a step's work that were done ahead of the steps.

        Raises:
            SystemExit: there were fewer steps than planned.
        """
        if len(self._ends) != self.planned:
            raise SystemExit(f"{len(self._ends)} steps ended, and not {self.planned}")
        steps = [end - start for start, end in pairwise(self._ends)]
        found: dict[str, Any] = {
            "side": side,
            "threads": threads,
            "step_s": statistics.median(steps) + before_s,
            "steps_s": steps,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        print(json.dumps(found), flush=True)


def parser(about: str | None) -> argparse.ArgumentParser:
    """The arguments of every side."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("work", type=Path, help="made by work.py")
    made.add_argument("algorithm")
    made.add_argument("--mode", choices=("full", "lora", "head"), default="full")
    made.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    made.add_argument("--steps", type=int, default=2, help="timed, after the first")
    return made
