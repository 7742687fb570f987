"""Amenable against TRL: seconds and memory of a step, on the same rows, model and settings.

    .venv/bin/python benchmarks/peers/peers.py [--dtype bf16|fp32] [--steps 3] [--only ROW ...]

SmolLM2-135M; 16 prompts of 44 to 380 tokens (140 in the mean), completions of 48. SFT takes 16
rows, reward model and DPO 16 pairs, GRPO and RLOO 2 prompts with 8 samples each, PPO 16 episodes
with 4 passes over them and a reward model. `--dtype bf16` is autocast over float32 weights on both
sides (with adapters our frozen base is bfloat16), `fp32` float32 throughout.

Every run is a process of its own; the two sides take turns, ours first in the first repeat, theirs
in the next. Time is the median of the steps after the first, memory the process's largest resident
set up to the last step; the table has medians over the repeats. Nothing is saved, evaluated or
exported in what is measured. The floor is that of our work (`floor.py`), at rates measured before
the first run. TRL's environments are made by `make peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARITY = HERE.parent / "parity"


@dataclass(frozen=True)
class Run:
    """One process."""

    side: str
    algorithm: str
    mode: str

    def command(self, work: Path, dtype: str, steps: int) -> list[str]:
        """Words of the command line."""
        environment, script = {
            "ours": (".venv", "amenable_side.py"),
            "trl": (".venv-peers-trl", "trl_side.py"),
            "trl-ppo": (".venv-peers-trl112", "trl_ppo_side.py"),
        }[self.side if self.side == "ours" or self.algorithm != "ppo" else "trl-ppo"]
        python = ROOT / environment / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python} is missing: `make peers` makes the environments")
        own = ["--mode", self.mode, "--dtype", dtype, "--steps", str(steps)]
        return [str(python), str(HERE / script), str(work), self.algorithm, *own]


@dataclass(frozen=True)
class Cell:
    """A row of the table."""

    algorithm: str
    mode: str = "full"
    peer_mode: str = "full"

    @property
    def ours(self) -> Run:
        """Our run."""
        return Run("ours", self.algorithm, self.mode)

    @property
    def peer(self) -> Run:
        """The peer's; the same run may serve several rows."""
        return Run("trl", self.algorithm, self.peer_mode)


CELLS = {
    "sft": Cell("sft"),
    "reward": Cell("reward"),
    "dpo": Cell("dpo"),
    "grpo": Cell("grpo"),
    "rloo": Cell("rloo"),
    "ppo": Cell("ppo"),
    "ppo-lora": Cell("ppo", "lora"),
    "ppo-lora-head": Cell("ppo", "head"),
    "ppo-lora-both": Cell("ppo", "lora", "lora"),
}


def environment() -> dict[str, str]:
    """Of every process: no hub, no bars, and the parity benchmark's modules within reach."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(PARITY)]),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def call(words: Sequence[str], log: Path) -> dict[str, Any]:
    """The JSON of a process's last line; what it says on stderr goes to the log.

    Raises:
        SystemExit: it failed.
    """
    with log.open("a", encoding="utf-8") as errors:
        errors.write(f"\n$ {' '.join(words)}\n")
        errors.flush()
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), check=False
        )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} of {' '.join(words)}; see {log}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(
    cells: Sequence[Cell], work: Path, options: argparse.Namespace
) -> dict[Run, list[dict[str, Any]]]:
    """What each run's processes report, the sides in turn."""
    log, found = work / "log.txt", {}
    for repeat in range(options.repeats):
        for algorithm in dict.fromkeys(cell.algorithm for cell in cells):
            own = [cell for cell in cells if cell.algorithm == algorithm]
            sides = [[cell.ours for cell in own], [cell.peer for cell in own]]
            for run in dict.fromkeys(chain(*(sides if repeat % 2 == 0 else sides[::-1]))):
                report = call(run.command(work, options.dtype, options.steps), log)
                found.setdefault(run, []).append(report)
                line = {"repeat": repeat, "mode": run.mode, "algorithm": algorithm, **report}
                print(json.dumps(line), file=sys.stderr, flush=True)
    return found


def row(
    cell: Cell, found: dict[Run, list[dict[str, Any]]], floor: float, rows: int
) -> dict[str, Any]:
    """Medians over the repeats."""
    ours, peer = found[cell.ours], found[cell.peer]
    ours_s, peer_s, ours_gb, peer_gb = (
        statistics.median(report[key] for report in reports)
        for key in ("step_s", "peak_gb")
        for reports in (ours, peer)
    )
    critic = {"full": "full", "lora": "adapter", "head": "head"}[cell.mode]
    return {
        "algorithm": cell.algorithm,
        "mode": "full" if cell.mode == "full" else "lora",
        "critic": critic if cell.algorithm == "ppo" else None,
        "peer": peer[0]["side"],
        "peer_mode": cell.peer_mode,
        "ours_s": ours_s,
        "peer_s": peer_s,
        "ratio": peer_s / ours_s,
        "ours_rows_s": rows / ours_s,
        "peer_rows_s": rows / peer_s,
        "ours_gb": ours_gb,
        "peer_gb": peer_gb,
        "floor_s": floor,
        "ours_over_floor": ours_s / floor,
        "peer_over_floor": peer_s / floor,
        "repeats": len(ours),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        "| step | Amenable, s | TRL, s | ratio | Amenable, GB | TRL, GB | floor, s |"
        " Amenable / floor | TRL / floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        critic = f", critic {r['critic']}" if r["mode"] == "lora" else ""
        name = f"{r['algorithm']}, {r['mode']}{critic} / {r['peer']} {r['peer_mode']}"
        lines.append(
            f"| {name} | {r['ours_s']:.1f} | {r['peer_s']:.1f} | {r['ratio']:.1f} |"
            f" {r['ours_gb']:.1f} | {r['peer_gb']:.1f} | {r['floor_s']:.1f} |"
            f" {r['ours_over_floor']:.1f} | {r['peer_over_floor']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peers", help="work folder")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=1, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed in a process, after the first")
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    work = options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = str(ROOT / ".venv" / "bin" / "python")
    subprocess.run([python, str(HERE / "work.py"), str(work)], env=environment(), check=True)
    rates = call([python, str(HERE / "floor.py"), "--dtype", options.dtype], work / "log.txt")
    cells = [CELLS[name] for name in options.only]
    found = measure(cells, work, options)
    rows = with_floors(cells, found, rates, work, options.dtype)
    if options.json:
        print(json.dumps({"dtype": options.dtype, "rates": rates, "rows": rows}))
        return
    print(markdown(rows))
    print(
        f"\n{options.dtype}, {rates['threads']} threads: {rates['flops_s'] / 1e9:.0f} GFLOP/s,"
        f" {rates['bytes_s'] / 1e9:.1f} GB/s read"
    )


def with_floors(
    cells: Sequence[Cell],
    found: dict[Run, list[dict[str, Any]]],
    rates: dict[str, Any],
    work: Path,
    dtype: str,
) -> list[dict[str, Any]]:
    """A row for each cell."""
    sys.path.append(str(PARITY))
    from floor import Rates, Shape, floor_s

    shape = Shape.read(work / "start")
    settings = json.loads((work / "work.json").read_text(encoding="utf-8"))["settings"]
    return [
        row(
            cell,
            found,
            floor_s(cell.algorithm, cell.mode, shape, settings, Rates(**rates), dtype),
            len(settings["lengths"]),
        )
        for cell in cells
    ]


if __name__ == "__main__":
    main()
