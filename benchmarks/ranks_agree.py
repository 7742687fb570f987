"""Whether N ranks × batch B / N give the update of one × B, for every algorithm of the table.

    python benchmarks/ranks_agree.py                        the whole table, in fp64 and fp32
    python benchmarks/ranks_agree.py --ranks 1,2 --cases sft,ppo --modes lora --dtypes fp64

Every case makes 5 updates on a random two-layer Llama, with uneven batches. In fp64 all logged
figures and all exported weights are compared with those of one process, in fp32 the gradients of
the first update. Writes a Markdown table, and beside it what each rank handed to the others. The
result in docs/several-processes.md is this script's.

It starts itself: `--worker FOLDER` is what each rank runs, over all cases, to import torch once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODES = {
    "lora": [],
    "full": ["model.lora.enabled=false"],
    "fsdp2": ["model.lora.enabled=false", 'model.shard="fsdp2"'],
}
"""How weights are trained and laid out; one process never shards."""

TOLERANCE = {"fp64": 1e-8, "fp32": 1e-5}
_RATES = ("sft.", "reward.", "policy.", "policy.ppo.critic_", "policy.preference.")
SENTENCE = "open the file and read every line then return a list of words in it or raise"
WORDS = SENTENCE.split()


def cases() -> list[str]:
    """Every stage and algorithm that learns; the first two make what the others start from."""
    from amenable.algorithms import ALGORITHMS

    return ["sft", "reward", *ALGORITHMS, "ppo-head", "ppo-ensemble", "rloo-text"]


def few_letters(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """A reward that reads texts, which rank 0 alone asks."""
    return [-len(text) / 10 for text in completions]


# What each rank runs ------------------------------------------------------------------------------


def settings(case: str, mode: str, dtype: str, updates: int) -> list[str]:
    """Recipe keys of a case."""
    found = [
        f'model.dtype="{dtype}"',
        *MODES[mode],
        "data.max_prompt_tokens=64",
        "data.max_completion_tokens=10",
        "sft.batch_size=7",
        f"sft.max_steps={updates}",
        "sft.epochs=5.0",
        "sft.evaluations=1",
        "sft.micro_batch_tokens=96",
        "reward.batch_size=5",
        f"reward.max_steps={updates}",
        "reward.epochs=5.0",
        "reward.evaluations=1",
        "reward.micro_batch_tokens=96",
        f"policy.updates={updates}",
        "policy.prompts_per_update=6",
        "policy.samples_per_prompt=3",
        "policy.micro_batch_tokens=64",
        "policy.gate=false",
        f"policy.checkpoint_every={updates}",
        'policy.selection.by="last"',
        "policy.preference.batch_size=5",
        f"policy.preference.max_steps={updates}",
        "policy.preference.epochs=5.0",
        "policy.preference.evaluations=1",
        "policy.preference.micro_batch_tokens=96",
        "evaluate.best_of=0",
        *(f"{key}learning_rate={0.01 if mode == 'lora' else 0.001}" for key in _RATES),
    ]
    algorithm = {"ppo-head": "ppo", "ppo-ensemble": "ppo", "rloo-text": "rloo"}.get(case, case)
    if case not in ("sft", "reward"):
        found.append(f'policy.algorithm="{algorithm}"')
    if case == "ppo":
        found += ["policy.gate=true", 'policy.ppo.critic="adapter"']
    if case == "rloo-text":
        found.append('policy.reward="ranks_agree:few_letters"')
    if case == "ppo-head":
        found.append('policy.ppo.critic="head"')
    if case == "ppo-ensemble":
        found += ["reward.heads=3", "policy.disagreement_coef=0.5", 'policy.ppo.critic="adapter"']
    return found


def rows(count: int, name: str) -> list[dict[str, Any]]:
    """Texts of unlike lengths, seeded by their place."""
    found = []
    for i in range(count):
        text = " ".join(
            WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + 3 * i % 11)
        )
        found.append({"id": f"{name}{i}", "group": f"{name}{i}", "input_text": text})
    return found


def write_data(folder: Path) -> None:
    """Every split that a stage reads."""
    from amenable.artifacts import write_jsonl

    def answers(n: int, shift: int) -> str:
        return " ".join(WORDS[(n * 3 + k + shift) % len(WORDS)] for k in range(1 + (n + shift) % 4))

    for split, count in (("train", 17), ("validation", 5), ("test", 5)):
        own = rows(count, split[:2])
        shown = [{**row, "output_text": answers(i, 0)} for i, row in enumerate(own)]
        pairs = [
            {
                **row,
                "candidate_0": answers(i, 1),
                "candidate_1": answers(i, 2),
                "choice": "tie" if i % 6 == 5 else i % 2,
                "weight": 1.0 + i % 3,
            }
            for i, row in enumerate(own)
        ]
        write_jsonl(folder / f"demonstrations.{split}.jsonl", shown)
        write_jsonl(folder / f"preferences.{split}.jsonl", pairs)
        write_jsonl(folder / f"prompts.{split}.jsonl", shown)


def work(
    out: Path,
    names: list[str],
    modes: list[str],
    dtypes: list[str],
    updates: int,
    start: Path | None = None,
) -> None:
    """All cases in all modes, one after the other, in run folders below `out`.

    In fp32 they begin with the models that one process has made in `start`: a gradient is compared
    at the same weights.
    """
    import torch

    from amenable.artifacts import writes_left_out
    from amenable.ranks import group
    from amenable.ranks.launch import join, seat

    torch.set_num_threads(1)
    own = seat()
    if own is not None:
        join(own)
    with writes_left_out(out) if group.rank() else nullcontext():
        for dtype in dtypes:
            for mode in modes:
                for name in names:
                    steps = 1 if dtype == "fp32" else updates
                    keys = settings(name, mode, dtype, steps)
                    begin = start / f"{dtype}-{alone(mode)}" if start and dtype == "fp32" else None
                    _case(out / f"{dtype}-{mode}", name, keys, begin)


def _case(out: Path, name: str, keys: list[str], start: Path | None) -> None:
    """One case; what it made is kept in `out/NAME`."""
    import torch

    from amenable.artifacts import write_json
    from amenable.ranks import group

    stage = name if name in ("sft", "reward") else "policy"
    folder = out / "run"
    if name == "ppo-ensemble":  # which needs a reward model of its own
        folder = out / "ensemble"
        _run("reward", folder, keys)
    if start is not None and group.rank() == 0:
        for path in (start / folder.name / "models").iterdir():
            own = folder / "models" / path.name
            if path.name != stage and own.exists():
                shutil.rmtree(own)
                shutil.copytree(path, own)
    group.gathered(None)
    group.traffic.clear()
    gradients = _run(stage, folder, keys)
    group.gathered(None)  # rank 0 has written
    if group.rank() == 0:
        kept, made = out / name, "tuned" if stage == "policy" else stage
        shutil.copytree(folder / "models" / made, kept / "model")
        shutil.copy(folder / "stages" / stage / "metrics.jsonl", kept)
        torch.save(gradients, kept / "gradients.pt")
        write_json(kept / "traffic.json", dict(group.traffic))
        if stage == "policy":
            shutil.rmtree(folder / "models" / made)
            shutil.rmtree(folder / "stages" / stage)
    group.gathered(None)  # and has cleaned up


def _run(stage: str, root: Path, keys: list[str]) -> dict[str, Any]:
    """A stage; the gradients of its first steps, by optimizer."""
    from amenable.artifacts import MetricsLog, RunFolder, StageContext
    from amenable.config.load import load_recipe
    from amenable.pipeline.stages import STAGES
    from amenable.progress import Deadline, Progress
    from amenable.ranks import group
    from amenable.ranks.sharding import whole
    from amenable.train import loop

    folder = RunFolder(root)
    write_data(folder.data)
    group.gathered(None)
    recipe = load_recipe(ROOT / "examples" / "tiny.toml", keys)
    found: dict[str, Any] = {}
    clip, seen = loop.clip_gradients, []

    def spied(parameters: Any, most: float) -> Any:
        known = [p for p in parameters if p.grad is not None]
        place = id(known[0]) if known else 0
        if place not in seen:
            seen.append(place)
            found[f"optimizer {len(seen)}"] = [whole(p.grad).clone() for p in known]
        return clip(parameters, most)

    loop.clip_gradients = spied
    try:
        (row,) = [row for row in STAGES if row.name == stage]
        row.load()(
            StageContext(
                recipe=recipe,
                folder=folder,
                stage=stage,
                log=MetricsLog(stage, folder.stage_path(stage), tensorboard=False),
                progress=Progress(quiet=True),
                deadline=Deadline(None),
            )
        )
    finally:
        loop.clip_gradients = clip
    return found


# What compares them -------------------------------------------------------------------------------


def launch(
    ranks: int,
    out: Path,
    names: list[str],
    modes: list[str],
    dtypes: list[str],
    updates: int = 5,
    start: Path | None = None,
) -> None:
    """Run the cases in so many processes, by torchrun."""
    words = ["--worker", str(out), "--updates", str(updates), "--cases", ",".join(names)]
    words += ["--modes", ",".join(modes), "--dtypes", ",".join(dtypes)]
    words += [] if start is None else ["--models-of", str(start)]
    if ranks == 1:
        command = [sys.executable, __file__, *words]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={ranks}", __file__, *words]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks: failed\n{done.stdout}\n{done.stderr}")


def furthest(one: Path, other: Path, dtype: str) -> dict[str, float]:
    """The largest difference of figures and weights, or of first gradients over their largest."""
    import torch
    from safetensors.torch import load_file

    def largest(values: Iterable[Any]) -> float:
        return float(torch.stack([torch.as_tensor(x).double().abs().max() for x in values]).max())

    if dtype != "fp64":
        sides = [torch.load(p / "gradients.pt") for p in (one, other)]
        assert sides[0].keys() == sides[1].keys(), "other optimizers"
        apart = []
        for a, b in zip(*(side.values() for side in sides), strict=True):
            assert largest(a) > 0, "a gradient of zero shows nothing"
            apart.append(largest(x - y for x, y in zip(a, b, strict=True)) / largest(a))
        return {"gradients": largest(apart)}
    lines = [p.joinpath("metrics.jsonl").read_text().splitlines() for p in (one, other)]
    assert len(lines[0]) == len(lines[1]) > 0, "other steps"
    figures = []
    for a, b in zip(*(map(json.loads, own) for own in lines), strict=True):
        assert a.keys() == b.keys(), "other figures"
        for key in a.keys() - {"wall_s"}:
            assert (a[key] is None) == (b[key] is None), key
            if a[key] is not None:
                figures.append((a[key] - b[key]) / max(1.0, abs(a[key])))
    weights = []
    for path in sorted((one / "model").glob("*.safetensors")):
        mine, theirs = load_file(path), load_file(other / "model" / path.name)
        assert mine.keys() == theirs.keys(), path.name
        weights += [mine[key] - theirs[key] for key in mine]
    return {"figures": largest(figures), "weights": largest(weights)}


def alone(mode: str) -> str:
    """How one process does what several do in a mode."""
    return "full" if mode == "fsdp2" else mode


def compare(
    ranks: list[int], names: list[str], modes: list[str], dtypes: list[str], updates: int
) -> bool:
    """Print the tables; whether all is within the tolerance."""
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        folders = {n: Path(scratch) / f"{n}" for n in (1, *ranks)}
        for n, folder in folders.items():
            own = modes if n > 1 else sorted({alone(mode) for mode in modes})
            launch(n, folder, names, own, dtypes, updates, folders[1] if n > 1 else None)
        for dtype in dtypes:
            for mode in modes:
                print(f"\n{dtype}, {mode}; allowed: {TOLERANCE[dtype]:g}\n")
                head = [f"{n} ranks" for n in ranks] + [f"MB, {n} ranks" for n in ranks]
                print("| case | " + " | ".join(head) + " |")
                print("| --- " + "| ---: " * len(head) + "|")
                for name in names:
                    one = folders[1] / f"{dtype}-{alone(mode)}" / name
                    others = {n: folders[n] / f"{dtype}-{mode}" / name for n in ranks}
                    cells = []
                    for other in others.values():
                        found = furthest(one, other, dtype)
                        ok = all(x <= TOLERANCE[dtype] for x in found.values())
                        good = good and ok
                        text = ", ".join(f"{key} {x:.1e}" for key, x in found.items())
                        cells.append(text if ok else f"**{text}**")
                    for other in others.values():
                        sent = json.loads((other / "traffic.json").read_text())
                        cells.append(f"{sum(sent.values()) / 1e6:.2f}")
                    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--cases", default="")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--dtypes", default="fp64,fp32")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--models-of", type=Path)
    given = parser.parse_args()
    names = given.cases.split(",") if given.cases else cases()
    modes, dtypes = given.modes.split(","), given.dtypes.split(",")
    if given.worker is not None:
        work(given.worker, names, modes, dtypes, given.updates, given.models_of)
        return
    ranks = [int(n) for n in given.ranks.split(",") if n != "1"]
    sys.exit(0 if compare(ranks, names, modes, dtypes, given.updates) else 1)


if __name__ == "__main__":
    main()
