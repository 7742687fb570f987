"""Worlds of the lab, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from amenable.lab.fixed_points import open_world
from amenable.lab.optima import World
from amenable.lab.problems import PROBLEMS, Problem

SMALL = replace(PROBLEMS[0], name="small", letters="ab", prompts=("a", "b"), max_tokens=2, kl=0.6)
"""7 completions a prompt."""

OpenWorld = Callable[[Problem], tuple[World, Path]]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenWorld:
    """The world of a problem and the folder of its reference model."""
    made: dict[str, tuple[World, Path]] = {}

    def open_once(problem: Problem) -> tuple[World, Path]:
        if problem.name not in made:
            folder = tmp_path_factory.mktemp("lab") / "reference"
            made[problem.name] = (open_world(problem, folder), folder)
        return made[problem.name]

    return open_once
