"""Planted bugs: what the lab's checks say of code that is broken on purpose.

Each bug of the table must be noticed by a named check: an identity, or the gradient of an algorithm
that goes through the broken line. The same checks run on the code as it is, and must all pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from amenable.errors import AmenableError
from amenable.lab.bench import Bench, Finding
from amenable.lab.bugs import BUGS, planted
from amenable.lab.gradients import TABLE as CELLS
from amenable.lab.gradients import measure
from amenable.lab.identities import TABLE as IDENTITIES
from amenable.lab.identities import look
from amenable.lab.places import POINTS, Place, problem_named
from amenable.lab.rows import Row

CHECK = "planted bug"
CLEAN = "none"

_PROBLEM = "gradient table"
_BATCHES = 80
_GUARD_LETTERS = 60


def run_planted(names: Sequence[str] = ()) -> list[Row]:
    """A row for the code as it is, and one for each bug.

    A row passes where the bug is caught; that of the clean code where every check passes. `note`
    tells which checks caught it.

    Args:
        names: only these bugs; empty: all.
    """
    chosen = {name: BUGS[name] for name in names or BUGS}
    cells = sorted({label for bug in chosen.values() for label in bug.cells})
    with tempfile.TemporaryDirectory(prefix="amenable-lab-") as folder:
        place = Place.of(problem_named(_PROBLEM), Path(folder) / "reference")
        false = caught_by(place, cells, Path(folder) / "clean")
        rows = [_row(place, CLEAN, "the code as it is", false, passed=not false)]
        for number, (name, bug) in enumerate(chosen.items()):
            with planted(name):
                found = caught_by(place, bug.cells, Path(folder) / str(number))
            rows.append(_row(place, name, bug.what, found, passed=bool(found)))
    return rows


def caught_by(place: Place, cells: Sequence[str], folder: Path) -> list[str]:
    """What notices: identities, gradients at the farthest policy, or the code's own guards."""
    bench = Bench(place, folder)
    findings = {name: look(name, bench) for name in IDENTITIES}
    caught = [f"identity: {name}" for name, own in findings.items() if not _stands(own)]
    guards = [own.refused for own in findings.values() if own.refused]
    for cell in CELLS:
        if cell.label not in cells:
            continue
        try:
            if not measure(place, cell, POINTS[2], folder / cell.label, _BATCHES).passed:
                caught.append(f"gradient: {cell.label}")
        except (AmenableError, ValueError, RuntimeError, IndexError, KeyError) as error:
            guards.append(f"{type(error).__name__}: {error}")
    return caught + [f"guard: {said}" for said in dict.fromkeys(_short(text) for text in guards)]


def _stands(found: Finding) -> bool:
    return found.passed or bool(found.refused)


def _short(text: str) -> str:
    return text.split(":", 2)[0] + ":" + text.split(":", 2)[1][:_GUARD_LETTERS].rstrip()


def _row(place: Place, name: str, what: str, caught: Sequence[str], *, passed: bool) -> Row:
    return Row(
        check=CHECK,
        algorithm=name,
        setting=what,
        problem=place.world.problem.name,
        beta=place.world.problem.beta,
        seed=0,
        passed=passed,
        note=("caught by " + "; ".join(caught)) if caught else "nothing caught it",
    )
