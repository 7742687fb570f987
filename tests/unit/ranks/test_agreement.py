"""N ranks × batch B / N make the update of one × B: 2 ranks here, in float64.

`benchmarks/ranks_agree.py` does it for every algorithm, on 2 and 4 ranks; this takes its cases.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[3]
CASES = ["sft", "reward", "ppo", "online-dpo", "kto"]
MODES = ["lora", "fsdp2"]


def script() -> Any:
    path = ROOT / "benchmarks" / "ranks_agree.py"
    spec = importlib.util.spec_from_file_location("ranks_agree", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases by one process and by two; two updates each."""
    out, agree = tmp_path_factory.mktemp("ranks"), script()
    agree.launch(1, out / "1", CASES, [agree.alone(mode) for mode in MODES], ["fp64"], updates=2)
    agree.launch(2, out / "2", CASES, MODES, ["fp64"], updates=2)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_make_the_update_of_one(made: Path, mode: str, case: str) -> None:
    agree = script()
    one, two = made / "1" / f"fp64-{agree.alone(mode)}", made / "2" / f"fp64-{mode}"
    found = agree.furthest(one / case, two / case, "fp64")
    assert found["figures"] <= 1e-8
    assert found["weights"] <= 1e-8
    sent = json.loads((two / case / "traffic.json").read_text())
    assert all(sent[kind] > 0 for kind in ("gradients", "objects")), "nobody shared the work"
