"""FSDP2 on two ranks: each really holds half, and a checkpoint serves any number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file

from amenable.artifacts import read_json

from .sharding_worker import resumed, work
from .test_crew import free_port

WORKER = Path(__file__).with_name("sharding_worker.py")


@pytest.fixture(scope="module")
def sides(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, and what one process found; `rank-0.json` and `rank-1.json` beside it."""
    out = tmp_path_factory.mktemp("sharding")
    alone = work(tiny, out / "one", "fsdp2")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tiny), str(out)], env={**env, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    return out, alone


def test_each_rank_holds_half_of_the_weights_and_moments(
    sides: tuple[Path, dict[str, Any]],
) -> None:
    """Every matrix has an even number of rows; AdamW keeps two numbers a weight, and the head's 64
    weights are on every rank."""
    out, alone = sides
    assert alone["sharded"] == 0
    assert alone["held"] == alone["whole"]
    for rank in range(2):
        found = read_json(out / f"rank-{rank}.json")
        assert found["sharded"] == len(found["whole"]) > 10
        assert found["whole"] == alone["whole"]
        assert found["held"] == {name: count / 2 for name, count in found["whole"].items()}
        assert found["moments"] == sum(found["whole"].values()) / 2 + 64


def test_sharded_steps_are_those_of_one_process(sides: tuple[Path, dict[str, Any]]) -> None:
    out, alone = sides
    found = read_json(out / "rank-0.json")
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found["losses"][2] < found["losses"][0] - 1e-3, "it learns"
    one, two = (load_file(out / n / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4
    assert found["copied"], "roll-outs see the present weights"


def test_a_checkpoint_serves_any_number_of_ranks(
    tiny: Path, sides: tuple[Path, dict[str, Any]]
) -> None:
    """Two ranks go on from two and from one; one goes on from two."""
    out, alone = sides
    found = read_json(out / "rank-0.json")
    assert found["resumed"][0] == found["losses"][2]
    assert found["of one"][0] == pytest.approx(alone["losses"][2], rel=1e-5)
    again = resumed(tiny, out / "two", "fsdp2")
    assert again == pytest.approx(found["resumed"], rel=1e-5)
