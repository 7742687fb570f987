"""Planted bugs break the code, are caught, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest

from amenable.lab.bugs import BUGS, planted
from amenable.lab.gradients import TABLE
from amenable.lab.planted import CLEAN, run_planted


def present(where: Any, name: str) -> Any:
    return where[name] if isinstance(where, dict) else vars(where)[name]


def test_there_are_enough_and_they_name_real_checks() -> None:
    assert len(BUGS) >= 10
    labels = {cell.label for cell in TABLE}
    assert {label for bug in BUGS.values() for label in bug.cells} <= labels


@pytest.mark.parametrize("name", list(BUGS))
def test_a_bug_is_there_and_then_gone(name: str) -> None:
    places = [(where, key) for where, key, _ in BUGS[name].patches()]
    before = [present(*place) for place in places]
    with planted(name):
        assert all(present(*p) is not b for p, b in zip(places, before, strict=True))
    assert all(present(*p) is b for p, b in zip(places, before, strict=True))


def test_clean_code_passes_and_bugs_are_caught() -> None:
    """By an identity alone, and by a gradient alone."""
    rows = run_planted(["everything ended", "itself in the baseline"])
    assert [row.algorithm for row in rows] == [CLEAN, "everything ended", "itself in the baseline"]
    assert all(row.passed for row in rows), [row.note for row in rows]
    assert [row.note for row in rows] == [
        "nothing caught it",
        "caught by identity: end of sequence",
        "caught by gradient: rloo, as published",
    ]


@pytest.mark.slow
def test_every_bug_is_caught() -> None:
    missed = [row.algorithm for row in run_planted() if not row.passed]
    assert missed == []
