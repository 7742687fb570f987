"""The table of the parity runs: mean reward of each side at equal KL, over seeds.

    .venv/bin/python benchmarks/parity/table.py OUT [--json]

A run's saved policies give a curve of reward over sequence KL that begins at the start model. All
runs of an algorithm are compared at one KL, the smallest that any of them ends with: reward is
interpolated on the last piece of each curve that crosses it, linearly in the root of the KL (reward
grows about as that: Gao et al. 2022, arXiv:2210.10760). Standard errors are over seeds; that of a
difference is the root of the sum of both squares. Exits with 1 if a run is missing or ours is worse
by more than 2 standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import task

WORST = -2.0
"""Standard errors by which ours may differ."""

Curve = list[tuple[float, float]]


def reward_at(curve: Curve, kl: float) -> float:
    """Reward where the curve of (KL, reward) last crosses `kl`."""
    for (kl0, reward0), (kl1, reward1) in reversed(list(pairwise(curve))):
        if min(kl0, kl1) <= kl <= max(kl0, kl1):
            low, wanted, high = (math.sqrt(max(0.0, value)) for value in (kl0, kl, kl1))
            share = (wanted - low) / (high - low) if high != low else 1.0
            return reward0 + share * (reward1 - reward0)
    raise ValueError(f"the curve never reaches a KL of {kl}")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def read_runs(out: Path, algorithm: str, side: str) -> list[task.Row]:
    runs = []
    for path in sorted(out.glob(f"{algorithm}-{side}-*/points.json")):
        points = json.loads(path.read_text(encoding="utf-8"))
        run = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        runs.append({**run, "curve": [(p["kl"], p["reward"]) for p in points]})
    return runs


def compare(out: Path, algorithm: str) -> task.Row | None:
    """A row of the table; None without two runs on each side."""
    ours, theirs = (read_runs(out, algorithm, side) for side in ("ours", "trl"))
    if min(len(ours), len(theirs)) < 2:
        return None
    kl = min(run["curve"][-1][0] for run in ours + theirs)
    row: task.Row = {"algorithm": algorithm, "peer": theirs[0]["side"], "kl": kl}
    row["start_reward"] = ours[0]["curve"][0][1]
    for name, runs in (("ours", ours), ("peer", theirs)):
        mean, error = mean_and_error([reward_at(run["curve"], kl) for run in runs])
        row[f"{name}_runs"] = len(runs)
        row[f"{name}_reward"], row[f"{name}_se"] = mean, error
        row[f"{name}_final_kl"] = statistics.mean(run["curve"][-1][0] for run in runs)
        row[f"{name}_final_reward"] = statistics.mean(run["curve"][-1][1] for run in runs)
        row[f"{name}_cpu_s"] = statistics.mean(run["cpu_s"] for run in runs)
        row[f"{name}_wall_s_max"] = max(run["wall_s"] for run in runs)
    row["difference"] = row["ours_reward"] - row["peer_reward"]
    row["difference_se"] = math.hypot(row["ours_se"], row["peer_se"])
    row["standard_errors"] = row["difference"] / row["difference_se"]
    return row


def markdown(rows: Sequence[task.Row]) -> str:
    """The rows for people."""
    lines = [
        "| algorithm | peer | KL (nats) | start | ours | peer | difference | in standard errors"
        " | final reward at final KL, ours / peer | CPU s a run, ours / peer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['algorithm']} | {r['peer']} | {r['kl']:.2f} | {r['start_reward']:.3f}"
        f" | {r['ours_reward']:.4f} ± {r['ours_se']:.4f} | {r['peer_reward']:.4f} ±"
        f" {r['peer_se']:.4f} | {r['difference']:+.4f} ± {r['difference_se']:.4f}"
        f" | {r['standard_errors']:+.1f} | {r['ours_final_reward']:.3f} at"
        f" {r['ours_final_kl']:.2f} / {r['peer_final_reward']:.3f} at {r['peer_final_kl']:.2f}"
        f" | {r['ours_cpu_s']:.1f} / {r['peer_cpu_s']:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for name in task.SETTINGS if (row := compare(options.out, name))]
    print(json.dumps({"rows": rows}) if options.json else markdown(rows))
    whole = len(rows) == len(task.SETTINGS)
    return 0 if whole and all(row["standard_errors"] >= WORST for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
