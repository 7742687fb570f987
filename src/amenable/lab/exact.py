"""The exact lab: every check's jobs, run side by side, as one list of rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from amenable.algorithms import ALGORITHMS
from amenable.errors import UsageError
from amenable.lab.rows import Job, Options, Row, run_jobs

CHECKS = {
    "fixed point": "amenable.lab.fixed_points:jobs",
    "gradient": "amenable.lab.gradients:jobs",
    "identity": "amenable.lab.identities:jobs",
}
"""Each check and its `module:function` of (Options) -> list[Job]."""


def jobs(options: Options) -> list[Job]:
    """The work of all checks.

    Raises:
        UsageError: an unknown algorithm or problem, or nothing to do.
    """
    unknown = [name for name in options.algorithms if name not in ALGORITHMS]
    if unknown:
        raise UsageError(f"--only: {unknown[0]!r} is no algorithm; choose from {list(ALGORITHMS)}")
    found: list[Job] = []
    for path in CHECKS.values():
        module, _, name = path.partition(":")
        make: Callable[[Options], list[Job]] = getattr(importlib.import_module(module), name)
        found += make(options)
    if not found:
        raise UsageError("nothing to check with these options; leave out --only")
    return found


def run(options: Options) -> Iterator[list[Row]]:
    """Rows as their jobs end, in any order; `in_order` sorts them."""
    yield from run_jobs(jobs(options), options.workers)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows by check, algorithm, setting, problem and seed, in the order of the tables."""
    from amenable.lab.problems import PROBLEMS
    from amenable.lab.settings import SETTINGS

    checks = {name: place for place, name in enumerate(CHECKS)}
    settings = {(s.algorithm, s.name): place for place, s in enumerate(SETTINGS)}
    problems = {problem.name: place for place, problem in enumerate(PROBLEMS)}
    last = len(settings) + len(problems)

    def place(row: Row) -> tuple[Any, ...]:
        return (
            checks.get(row.check, last),
            row.control,
            settings.get((row.algorithm, row.setting), last),
            problems.get(row.problem, last),
            row.seed,
        )

    return sorted(rows, key=place)


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """`{"rows": […], "controls": […], "passed": …}`; controls are the rows that must fail."""
    return {
        "rows": [row.to_json() for row in rows if not row.control],
        "controls": [row.to_json() for row in rows if row.control],
        "passed": all(row.as_it_should for row in rows),
    }
