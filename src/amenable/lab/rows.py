"""What the lab's checks report, and how their jobs are spread over processes.

A check is a module with `jobs(options) -> list[Job]`; `exact.CHECKS` lists them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Target = Literal["pi_star", "own"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of the table: an algorithm's setting on a problem with a seed.

    A figure that its check does not measure is None.
    """

    check: str
    """Which check: "fixed point", "gradient", "identity"."""

    algorithm: str
    """A row of the algorithm table, or what the identity is about."""

    setting: str
    """Which settings of it."""

    problem: str
    """A problem's name."""

    beta: float
    """Weight of the KL term."""

    seed: int
    """Of the run."""

    target: Target | None = None
    """The optimum that it is measured against: the closed form, or its own."""

    kl_to_target: float | None = None
    """KL(policy || target), nats, mean over prompts."""

    objective_gap: float | None = None
    """(J* - J) / (J* - J(reference)); of other targets KL(policy || t) / KL(reference || t)."""

    gradient_p_value: float | None = None
    """Two-sided, of the mean stochastic gradient against the enumerated one."""

    distance_from_pi_star: float | None = None
    """KL(target || pi*), nats, where the target is its own."""

    passed: bool
    """Every bound of its check holds."""

    control: bool = False
    """A row that must *not* pass: it shows that the check can fail."""

    note: str = ""
    """What went wrong, or what was caught."""

    wall_s: float = 0.0
    """Seconds."""

    @property
    def as_it_should(self) -> bool:
        """Passed, or, of a control, failed."""
        return self.passed is not self.control

    def to_json(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        algorithms: only these; empty: all.
        problems: only these; empty: all.
        seeds: how many, from 0.
        workers: processes.
    """

    algorithms: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seeds: int = 3
    workers: int = 2


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Args:
        run: `module:function` that returns the rows.
        arguments: keyword arguments, picklable.
        cost: rough seconds; the longest jobs start first.
    """

    run: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 1.0

    def __call__(self) -> list[Row]:
        """The rows, with the time that each took."""
        module, _, name = self.run.partition(":")
        function: Callable[..., list[Row]] = getattr(importlib.import_module(module), name)
        start = time.monotonic()
        rows = function(**self.arguments)
        each = (time.monotonic() - start) / max(1, len(rows))
        return [row if row.wall_s else replace(row, wall_s=each) for row in rows]


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[list[Row]]:
    """The rows of each job as it ends; each process computes on one thread.

    Args:
        jobs: independent of each other.
        workers: processes; with 1 the jobs run here, one after the other.
    """
    ordered = sorted(jobs, key=lambda job: -job.cost)
    if workers <= 1 or len(ordered) <= 1:
        for job in ordered:
            yield job()
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(ordered)), initializer=on_one_thread) as pool:
        yield from pool.imap_unordered(_call, ordered)


def on_one_thread() -> None:
    """Set up a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)


def _call(job: Job) -> list[Row]:
    return job()
