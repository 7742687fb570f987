"""Kills a training stage with SIGKILL at random moments, runs it again, and compares every bit.

    python benchmarks/kill_and_resume.py             sft, reward, ppo, grpo, dpo; ten kills each
    python benchmarks/kill_and_resume.py ppo --kills 3 --recipe examples/demo.toml --set KEY=VALUE

Each kill has a run folder of its own, a copy of one in which the stages before are done. The
moments are uniform over the time that the stage takes uninterrupted, from where its state says
`running` to where it says `done`; in three of ten the kill waits for the next moment at which a
checkpoint is being written. Compared with the uninterrupted run, to the last bit: the model, the
newest checkpoint (weights, best weights, optimizers, counters), the figures and samples less
`wall_s`, and the stage's section of summary.json.

The uninterrupted run is `amenable run` in a process of its own. The killed ones and those that go
on are the same command in processes that are forked with the libraries imported: importing them
takes longer than the stages do.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amenable.artifacts import read_json, read_jsonl

ALGORITHMS = ("sft", "reward", "ppo", "grpo", "dpo")
BEFORE = {"sft": "data", "reward": "collect", "policy": "reward"}
MODEL = {"sft": "sft", "reward": "reward", "policy": "tuned"}

HEAVY = (
    "amenable.cli.run",
    "amenable.pipeline.local",
    "amenable.train.sft",
    "amenable.train.reward",
    "amenable.train.ppo",
    "amenable.train.policy_gradient",
    "amenable.train.off_policy",
    "amenable.evaluate.report",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)
"""Imported before the forks."""

SETTINGS = (
    "sft.max_steps=0",
    "sft.epochs=3",
    "reward.max_steps=0",
    "reward.epochs=3",
    "policy.updates=6",
    "policy.checkpoint_every=2",
    "policy.preference.epochs=4",
    "policy.preference.batch_size=8",
    "policy.kl.controller=adaptive",
    "checkpoint.every_minutes=0.001",
)
"""For the tiny recipe: a dozen steps, a checkpoint after nearly each."""


@dataclass(frozen=True)
class Kill:
    """One kill, and what came of it."""

    algorithm: str
    after_s: float
    """Since the stage's start."""
    in_write: bool
    """A checkpoint stood there half-written."""
    rows: int
    """Rows of metrics.jsonl at the kill."""
    went_on_from: str
    """What the second run said of its start."""
    differs: tuple[str, ...]
    """Parts that are not the uninterrupted run's."""


class Forked:
    """A command line of Amenable in a process that this one has forked."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.argv = ["amenable", *words]
            code: Any = 1
            try:
                importlib.import_module("amenable.cli.main").main()
            except SystemExit as leaves:
                code = leaves.code
            sys.stderr.flush()
            os._exit(code or 0)

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """The exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        """With SIGKILL, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


Process = Forked | subprocess.Popen[bytes]


class Runner:
    """Starts `amenable run` on one recipe."""

    def __init__(self, recipe: Path, settings: list[str], algorithm: str) -> None:
        self.stage = algorithm if algorithm in BEFORE else "policy"
        if self.stage == "policy":
            settings = [*settings, f"policy.algorithm={algorithm}"]
        words = [word for setting in settings for word in ("--set", setting)]
        self._words = ["run", str(recipe), *words]

    def start(self, out: Path, until: str, *, forked: bool = True) -> Process:
        """The process; what it says goes to OUT.log."""
        words = [*self._words, "--out", str(out), "--until", until]
        if forked:
            return Forked(words, out.with_suffix(".log"))
        with out.with_suffix(".log").open("w") as log:
            command = [sys.executable, "-m", "amenable", *words]
            return subprocess.Popen(command, stderr=log, stdout=log)

    def finish(self, out: Path, until: str, *, forked: bool = True) -> str:
        """Run to the end; what was said."""
        process = self.start(out, until, forked=forked)
        said = out.with_suffix(".log")
        if process.wait() != 0:
            sys.exit(f"{out}: exit code {process.returncode}\n{said.read_text()}")
        return said.read_text()


def wait_for(path: Path, process: Process) -> float:
    """The moment at which `path` is there."""
    while not path.exists():
        if process.poll() is not None:
            sys.exit(f"ended without {path}")
        time.sleep(0.001)
    return time.monotonic()


def status(state: Path) -> str:
    """Of the stage."""
    return str(read_json(state)["status"])


def writes_checkpoint(folder: Path) -> bool:
    """Whether one stands there unfinished."""
    return any(folder.glob("checkpoints/.step-*.partial"))


def kill(process: Process, folder: Path, after_s: float, in_write: bool) -> bool:
    """Kills after so many seconds; says whether a checkpoint was being written."""
    end = time.monotonic() + after_s
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.001)
    while in_write and process.poll() is None and not writes_checkpoint(folder):
        pass
    process.kill()
    process.wait()
    return writes_checkpoint(folder)


def parts(out: Path, stage: str) -> dict[str, Any]:
    """What must be the same, by name."""
    folder = out / "stages" / stage
    checkpoint = max(folder.glob("checkpoints/step-*"))
    found: dict[str, Any] = {"newest checkpoint": checkpoint.name}
    for root, pattern in ((out / "models" / MODEL[stage], "**/*.safetensors"), (checkpoint, "*")):
        for path in sorted(root.glob(pattern)):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[f"{root.name}/{path.relative_to(root)}"] = digest
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            rows = read_jsonl(folder / name)
            found[name] = [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]
    found["summary"] = read_json(folder / "state.json")["summary"]
    return found


def measure(
    runner: Runner, algorithm: str, kills: int, root: Path, draw: random.Random
) -> list[Kill]:
    """All kills of an algorithm."""
    prepared, whole, stage = root / "prepared", root / "whole", runner.stage
    state = Path("stages") / stage / "state.json"
    prepared.parent.mkdir(parents=True, exist_ok=True)
    runner.finish(prepared, BEFORE[stage], forked=False)
    shutil.copytree(prepared, whole)
    process = runner.start(whole, stage, forked=False)
    start = wait_for(whole / state, process)
    while process.poll() is None and status(whole / state) != "done":
        time.sleep(0.01)
    lasts_s = time.monotonic() - start
    if process.wait() != 0:
        sys.exit(whole.with_suffix(".log").read_text())
    expected = parts(whole, stage)
    print(f"{algorithm}: the stage takes {lasts_s:.1f} s, {len(expected)} parts", flush=True)
    found: list[Kill] = []
    while len(found) < kills:
        out = root / f"killed-{len(found)}"
        shutil.copytree(prepared, out)
        process = runner.start(out, stage)
        start = wait_for(out / state, process)
        wanted = draw.uniform(0, lasts_s)
        in_write = kill(process, out / "stages" / stage, wanted, len(found) % 10 in (2, 5, 8))
        if status(out / state) == "done":
            shutil.rmtree(out)
            continue
        after_s = time.monotonic() - start
        log = out / "stages" / stage / "metrics.jsonl"
        rows = log.read_bytes().count(b"\n") if log.exists() else 0
        said = runner.finish(out, stage).splitlines()
        from_where = next((line for line in said if " restored: " in line), "the stage's start")
        own = parts(out, stage)
        names = expected.keys() | own.keys()
        differs = tuple(sorted(name for name in names if own.get(name) != expected.get(name)))
        found.append(
            Kill(algorithm, after_s, in_write, rows, from_where.split(" restored")[0], differs)
        )
        print(f"  {found[-1]}", flush=True)
        shutil.rmtree(out)
    shutil.rmtree(root)
    return found


def table(kills: list[Kill]) -> str:
    """Markdown, one row an algorithm."""
    lines = [
        "| stage | kills | in a checkpoint's write | went on from a checkpoint | bit-identical |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(kill.algorithm for kill in kills):
        own = [kill for kill in kills if kill.algorithm == name]
        in_write, resumed, same = (
            sum(kill.in_write for kill in own),
            sum(kill.went_on_from != "the stage's start" for kill in own),
            sum(not kill.differs for kill in own),
        )
        lines.append(f"| {name} | {len(own)} | {in_write} | {resumed} | {same} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table; exit code 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("algorithms", nargs="*", default=ALGORITHMS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--recipe", type=Path, default=Path("examples/tiny.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write every kill there")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for module in HEAVY:
        importlib.import_module(module)
    draw, kills = random.Random(args.seed), []
    settings = [*(SETTINGS if args.recipe.name == "tiny.toml" else ()), *args.set]
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as root:
        for algorithm in args.algorithms:
            runner = Runner(args.recipe, settings, algorithm)
            kills += measure(runner, algorithm, args.kills, Path(root) / algorithm, draw)
            if args.json:
                args.json.write_text(json.dumps([asdict(kill) for kill in kills], indent=2) + "\n")
    print(table(kills))
    sys.exit(any(kill.differs for kill in kills))


if __name__ == "__main__":
    main()
