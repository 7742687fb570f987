"""The numerics gate on the demo's model: its time, false alarms, and planted faults.

    python benchmarks/gate.py [--dtype fp32 bf16] [--sets 1] [--faults [--only NAME ...]]

The gate looks at the sound model, with a fresh adapter, in each precision, and every figure is
printed beside its bound. With `--faults` each fault of `tests/unit/train/gate_faults.py` is then
planted in the model in turn. Prompts are the built-in task's.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from amenable.artifacts import MetricsLog, RunFolder, StageContext
from amenable.config.load import load_recipe
from amenable.data.docstrings import harvest
from amenable.data.schemas import Prompt
from amenable.errors import NumericsError
from amenable.examples_folder import example
from amenable.progress import Deadline, Progress

FAULTS = Path(__file__).parents[1] / "tests" / "unit" / "train" / "gate_faults.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of faults")
    parser.add_argument("--sets", type=int, default=1, help="sets of 64 prompts to look at")
    options = parser.parse_args()
    module = _faults()
    prompts = _prompts(64 * options.sets)
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as folder:
            world = module.build_world(_context(Path(folder), dtype), prompts)
            for index in range(options.sets):
                world.prompts = prompts[64 * index : 64 * (index + 1)]
                _look(world, dtype)
            world.prompts = prompts[:64]
            if options.faults:
                _plant_all(module, world, dtype, options.only)


def _prompts(count: int) -> list[Prompt]:
    """Of the built-in task, drawn with a fixed seed."""
    rows = harvest(36)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[index].prompt for index in order[:count]]


def _faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate_faults", FAULTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_faults"] = module
    spec.loader.exec_module(module)
    return module


def _context(root: Path, dtype: str) -> StageContext:
    recipe = load_recipe(example("demo.toml"))
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype))  # type: ignore[arg-type]  # argparse checks it
    folder = RunFolder(root)
    return StageContext(
        recipe=recipe,
        folder=folder,
        stage="policy",
        log=MetricsLog("policy", folder.stage("policy"), tensorboard=False),
        progress=Progress(),
        deadline=Deadline(None),
    )


def _look(world: Any, dtype: str) -> None:
    before, cpu = time.perf_counter(), time.process_time()
    try:
        found = world.look(skip=tuple(_checks()))
    except NumericsError as error:
        print(error)
        return
    wall, cpu = time.perf_counter() - before, time.process_time() - cpu
    alarms = [name for name, check in found["checks"].items() if not check["holds"]]
    print(
        f"\n{dtype}, sound: {wall:.1f} s ({cpu:.1f} s of CPU, {torch.get_num_threads()} threads); "
        f"false alarms: {', '.join(alarms) or 'none'}; noise {found['noise']}; {found['rows']}"
    )
    for name, check in found["checks"].items():
        for row in check["figures"]:
            figures = f"{row['figure']:9.2e}  {row['bound']:9.2e}"
            print(f"  {name:12} {row['quantity']:62} {figures}", flush=True)


def _checks() -> list[str]:
    from amenable.train.gate.findings import CHECKS

    return list(CHECKS)


def _plant_all(module: ModuleType, world: Any, dtype: str, only: list[str] | None) -> None:
    print(f"\n{dtype}: | fault | caught by |")
    caught = wanted = 0
    by_name = {planted.name: planted for planted in module.FAULTS}
    for planted in (by_name[name] for name in only or by_name):
        if dtype == "bf16" and not planted.bf16:
            continue
        wanted += 1
        with pytest.MonkeyPatch.context() as patch:
            broken = replace(world)
            if planted.check not in ("reward", "critic"):  # half of the time
                broken.roles, broken.critic = replace(world.roles, reward_role=None), None
            planted.plant(patch, broken)
            found = broken.look(skip=tuple(_checks()))["checks"]
        names = [name for name, check in found.items() if not check["holds"]]
        caught += planted.check in names
        print(f"| `{planted.name}` | {', '.join(names) or 'nothing'} |", flush=True)
    print(f"{dtype}: {caught} of {wanted} faults are caught by the check that must name them")


if __name__ == "__main__":
    main()
