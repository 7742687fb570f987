"""What a rank hands to the others in an update, measured, beside the model of docs/scaling.md.

    python benchmarks/traffic.py                 1, 2 and 4 ranks over gloo; LoRA and FSDP2

Runs `examples/tiny.toml` to its reward model, then PPO with as many updates once more than the
other time: the difference is the updates' own. Counted are the bytes that a rank puts into each
exchange, whatever a ring makes of them: `amenable.ranks.group.traffic`, and FSDP2's gathers of
parameters and scatters of gradients. It starts itself: `--worker` is what each rank runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FEW, MORE = 1, 3
KEYS = (
    "policy.prompts_per_update=8",
    "policy.samples_per_prompt=2",
    "policy.epochs=2",
    "policy.minibatches=2",
    "policy.micro_batch_tokens=512",
    "policy.gate=false",
    "policy.learning_rate=1e-12",
    "policy.ppo.critic_learning_rate=1e-12",
    'policy.selection.by="last"',
    "policy.checkpoint_every=100",
    "evaluate.best_of=0",
)
MODES = {
    "lora": (),
    "fsdp2": ("model.lora.enabled=false", 'model.shard="fsdp2"'),
}


def worker(out: Path, mode: str, updates: int) -> None:
    """One rank: the run up to the policy's end, and what it has handed over."""
    import torch.distributed as dist

    from amenable.config.load import load_recipe
    from amenable.pipeline import local
    from amenable.ranks import group

    counted: Counter[str] = Counter()

    def counting(names: tuple[str, ...], kind: str, place: int) -> None:
        name = next(name for name in names if hasattr(dist, name))  # torch's own names have changed
        exchange = getattr(dist, name)
        key = ("output", "input")[place]

        def count(*args: Any, **kwargs: Any) -> Any:
            named = [value for word, value in kwargs.items() if word.startswith(key)]
            tensor = args[place] if len(args) > place else named[0]
            counted[kind] += tensor.numel() * tensor.element_size()
            return exchange(*args, **kwargs)

        setattr(dist, name, count)

    counting(("all_gather_single", "all_gather_into_tensor"), "weights", 0)
    counting(("reduce_scatter_single", "reduce_scatter_tensor"), "scattered gradients", 1)
    keys = [*KEYS, *MODES[mode], f"policy.updates={updates}"]
    recipe = load_recipe(ROOT / "examples" / "tiny.toml", keys)
    local.run(recipe, out, until="policy")
    found = {**group.traffic, **counted}
    (out.parent / f"{out.name}-{group.rank()}.json").write_text(json.dumps(found))


def measured(ranks: int, mode: str, folder: Path) -> dict[str, float]:
    """Bytes by kind that rank 0 puts into the exchanges of one update."""
    found = []
    for updates in (FEW, MORE):
        out = folder / f"{mode}-{ranks}-{updates}"
        words = ["--worker", str(out), "--mode", mode, "--updates", str(updates)]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={ranks}",
                str(Path(__file__).resolve()),
                *words,
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found.append(Counter(json.loads((folder / f"{out.name}-0.json").read_text())))
    few, more = found
    return {kind: (more[kind] - few[kind]) / (MORE - FEW) for kind in sorted(more)}


def modelled(ranks: int, mode: str, data: Path) -> dict[str, float]:
    """The same of the planner's model, before a ring's share is taken."""
    from amenable.config.load import load_recipe
    from amenable.plan.forecast import renderer
    from amenable.plan.hardware import hardware
    from amenable.plan.layouts import Layout, spread
    from amenable.plan.rows import rows_of
    from amenable.plan.shape import config_of, shape_of

    recipe = load_recipe(ROOT / "examples" / "tiny.toml", [*KEYS, *MODES[mode]])
    shape = shape_of(config_of("tiny"), "tiny")
    layout = Layout(name=mode, shards=0 if mode == "fsdp2" else 1)
    rows = rows_of(recipe, renderer(recipe), data)
    found = spread(recipe, shape, rows, hardware("cpu"), layout, ranks)
    ring = (ranks - 1) / ranks
    return {kind: sent / ring for kind, sent in found.sent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--mode", choices=list(MODES))
    parser.add_argument("--updates", type=int)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.mode, options.updates)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            for ranks in map(int, options.ranks.split(",")):
                seen = measured(ranks, mode, Path(folder))
                data = Path(folder) / f"{mode}-{ranks}-{MORE}" / "data"
                rows.append(
                    {
                        "mode": mode,
                        "ranks": ranks,
                        "measured": seen,
                        "modelled": modelled(ranks, mode, data),
                    }
                )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
