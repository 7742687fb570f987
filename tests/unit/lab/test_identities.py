"""Every identity holds on the code as it is, and each kind can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amenable.lab.bench import Bench, Finding
from amenable.lab.bugs import planted
from amenable.lab.formula_identities import _n_step
from amenable.lab.identities import TABLE, jobs, look
from amenable.lab.places import POINTS, Place, problem_named
from amenable.lab.rows import Options


def new_bench(folder: Path, problem: str) -> Bench:
    return Bench(Place.of(problem_named(problem), folder / "reference", POINTS[:2]), folder)


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    return {
        name: new_bench(tmp_path_factory.mktemp("lab"), name)
        for name in ("gradient table", "gradient llama")
    }


@pytest.mark.parametrize("problem", ["gradient table", "gradient llama"])
@pytest.mark.parametrize("name", list(TABLE))
def test_it_holds(benches: dict[str, Bench], name: str, problem: str) -> None:
    found = TABLE[name](benches[problem])
    assert found.passed, f"{found.worst:.3g} > {found.allowed:.3g} {found.note}"


@pytest.mark.parametrize(
    ("bug", "names"),
    [
        ("missing EOS", ["end of sequence", "whole mass"]),
        ("leaky mask", ["neighbours"]),
        ("temperature", ["temperature"]),
        ("moving reference", ["reference log-probabilities"]),
        ("stale log-probabilities", ["first ratio", "old log-probabilities"]),
        ("score one token off", ["rewards of tokens"]),
        ("GAE one value off", ["GAE"]),
        ("mean log-probabilities", ["DPO's implicit reward"]),
    ],
)
def test_it_fails_on_broken_code(tmp_path: Path, bug: str, names: list[str]) -> None:
    bench = new_bench(tmp_path, "gradient table")
    with planted(bug):
        findings = {name: look(name, bench) for name in names}
    assert not any(found.passed for found in findings.values())


def test_what_is_not_a_number_does_not_pass() -> None:
    assert not Finding(float("nan"), 1.0).passed


def test_n_step_returns_by_hand() -> None:
    """Rewards 1, 2 and values 0.5, 3. With gamma 1 and lambda 1/2 the first token has one step to
    1 + 3 = 4 with weight 1/2 and two steps to 3 with the rest: 3.5 - 0.5. The second: 2 - 3."""
    rewards = torch.tensor([1.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.5, 3.0], dtype=torch.float64)
    assert _n_step(rewards, values, 1.0, 0.5).tolist() == [3.0, -1.0]


def test_k2_says_how_far_it_is_off(benches: dict[str, Bench]) -> None:
    assert "% off a KL of 1" in TABLE["k2"](benches["gradient table"]).note


def test_jobs_belong_to_no_algorithm() -> None:
    assert len(jobs(Options())) == 2
    assert jobs(Options(algorithms=("ppo",))) == []
