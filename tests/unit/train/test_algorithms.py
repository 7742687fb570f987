from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys

import pytest

from amenable.algorithms import ALGORITHMS, kl_placement
from amenable.config.policy import KLConfig, PolicyConfig

PAPERS = {
    "ppo": "reward",
    "grpo": "loss",
    "dr-grpo": "loss",
    "dapo": "none",
    "gspo": "loss",
    "rloo": "reward",
    "reinforce++": "reward",
    "reinforce++-baseline": "loss",
    "online-dpo": "loss",
}


def test_the_kl_enters_where_the_papers_have_it() -> None:
    on_policy = {name for name, row in ALGORITHMS.items() if row.learns_from == "prompts"}
    assert set(PAPERS) | {"best-of-n"} == on_policy
    for name, row in ALGORITHMS.items():
        assert row.kl == PAPERS.get(name, "none")
        assert kl_placement(PolicyConfig(algorithm=name)) == row.kl  # type: ignore[arg-type]


@pytest.mark.parametrize("placement", ["reward", "loss", "both", "none"])
def test_a_recipe_may_place_it_elsewhere(placement: str) -> None:
    policy = PolicyConfig(algorithm="grpo", kl=KLConfig(placement=placement))  # type: ignore[arg-type]
    assert kl_placement(policy) == placement


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_are_whole(name: str) -> None:
    row = ALGORITHMS[name]
    module, _, function = row.run.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert row.summary == row.summary.strip()
    assert 10 < len(row.summary) < 95
    assert not row.summary.endswith(".")
    assert not (row.needs_groups and row.learns_from == "preferences")


def test_summaries_tell_the_rows_apart() -> None:
    assert len({row.summary for row in ALGORITHMS.values()}) == len(ALGORITHMS)


def test_a_row_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALGORITHMS["ppo"].kl = "none"  # type: ignore[misc]


def test_reading_the_table_imports_no_torch() -> None:
    code = "import sys, amenable.algorithms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
