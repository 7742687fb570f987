"""What PPO's usual extras gain on the parity task: the ones that the policy stage leaves out.

    .venv/bin/python benchmarks/parity/left_out.py TASK OUT [--only NAME ...] [--seeds 0 1 2 3 4]

trains plain PPO and each extra from the same seeds, then prints a table: reward at equal KL against
plain PPO, as a difference of runs of the same seed. TASK is made by `task.py` (`make parity` leaves
one in runs/parity/task). Extras:

    dual-clip C     the loss of a negative advantage is bounded at C times it (Ye et al. 2020)
    ptx W           W x the cross-entropy of 32 demonstrations in every step (Ouyang et al. 2022)
    average D       the saved policy is a moving average over updates, of decay D
    refresh N       the reference becomes the policy after every N updates; KL is still measured
                    against the start model
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure
import ours
import table
import task
import torch
from transformers import AutoTokenizer

from amenable.artifacts import StageContext
from amenable.data.docstrings import harvest
from amenable.train.experience import Minibatches
from amenable.train.loop import Metrics
from amenable.train.on_policy import Learner, run_on_policy
from amenable.train.policy_roles import PolicyRoles
from amenable.train.ppo import PPOLearner

DEMONSTRATIONS = 32
"""A step's."""

EXTRAS: dict[str, Sequence[float]] = {
    "plain": (0,),
    "dual-clip": (1.5, 3),
    "ptx": (0.03, 0.3),
    "average": (0.7, 0.9),
    "refresh": (5, 10),
}


class Mixing(PPOLearner):
    """Cross-entropy of demonstrations beside the policy's loss."""

    def __init__(
        self, ctx: StageContext, roles: PolicyRoles, *, weight: float, rows: list[Any]
    ) -> None:
        super().__init__(ctx, roles)
        draw, model, step = random.Random(ctx.recipe.seed), roles.policy.plain, self._passes._step

        def with_demonstrations(*arguments: Any) -> None:
            ids, labels = task.padded(draw.sample(rows, DEMONSTRATIONS))
            (weight * model(input_ids=ids, labels=labels).loss).backward()
            step(*arguments)

        self._passes._step = with_demonstrations  # type: ignore[method-assign]


class Averaging(PPOLearner):
    """The checkpoint's policy is the average; the one that is trained is not touched."""

    def __init__(self, ctx: StageContext, roles: PolicyRoles, *, decay: float) -> None:
        super().__init__(ctx, roles)
        self._decay, self._average = decay, roles.policy.state()
        roles.policy.state = lambda: self._average  # type: ignore[method-assign]

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """One step of the average after each update."""
        metrics = super().learn(minibatches, update, kl_coef)
        present = dict(self._policy.plain.named_parameters())
        for name, value in self._average.items():
            value.lerp_(present[name].detach(), 1 - self._decay)
        return metrics


class Refreshing(PPOLearner):
    """The reference follows the policy in jumps."""

    def __init__(self, ctx: StageContext, roles: PolicyRoles, *, every: int) -> None:
        super().__init__(ctx, roles)
        self._every, self._reference = every, roles.reference

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """A jump after every so many updates."""
        metrics = super().learn(minibatches, update, kl_coef)
        if (update + 1) % self._every == 0:
            self._reference.load_state(self._policy.state())
        return metrics


def demonstrations(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and answers that neither the task's prompts nor its test hold."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    used = {
        row["input_text"]
        for name in ("train", "eval")
        for row in task.read_rows(folder / f"prompts.{name}.jsonl")
    }
    rows = []
    for pair in harvest(max_words=40):
        if pair.prompt.text not in used:
            prompt = tokenizer(task.render(pair.prompt.text))["input_ids"]
            answer = [*tokenizer(pair.output_text)["input_ids"], tokenizer.eos_token_id]
            rows.append((prompt, answer))
    return rows


def learner(folder: Path, name: str, value: float) -> Callable[..., Learner]:
    if name == "ptx":
        return partial(Mixing, weight=value, rows=demonstrations(folder))
    if name == "average":
        return partial(Averaging, decay=value)
    if name == "refresh":
        return partial(Refreshing, every=int(value))
    return PPOLearner


def run(folder: Path, out: Path, name: str, value: float, seeds: Sequence[int]) -> None:
    """Train and measure what is not there yet."""
    make = learner(folder, name, value)
    settings = [f"policy.dual_clip={value}"] if name == "dual-clip" else []
    opened = None
    for seed in seeds:
        own = out / f"{name}-{value:g}-{seed}"
        if (own / "points.json").exists():
            continue
        shutil.rmtree(own, ignore_errors=True)
        ours.train(folder, own, "ppo", seed, settings, lambda ctx: run_on_policy(ctx, make))
        opened = opened or measure.open_start(folder)
        measure.measure(folder, own, opened)


def curve(out: Path, name: str, value: float, seed: int) -> table.Curve:
    points = json.loads((out / f"{name}-{value:g}-{seed}" / "points.json").read_text("utf-8"))
    return [(point["kl"], point["reward"]) for point in points]


def line(out: Path, name: str, value: float, seeds: Sequence[int]) -> str:
    """One extra against plain PPO, at the smallest KL that any of their runs ends with."""
    pairs = [(curve(out, name, value, seed), curve(out, "plain", 0, seed)) for seed in seeds]
    kl = min(one[-1][0] for pair in pairs for one in pair)
    rewards = [[table.reward_at(one, kl) for one in pair] for pair in pairs]
    mean, error = table.mean_and_error([own - plain for own, plain in rewards])
    ends = [pair[0][-1] for pair in pairs]
    return (
        f"| {name} {value:g} | {kl:.2f} | {statistics.mean(own for own, _ in rewards):.4f} | "
        f"{mean:+.4f} ± {error:.4f} | {statistics.mean(reward for _, reward in ends):.4f} at "
        f"{statistics.mean(kl for kl, _ in ends):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(EXTRAS), default=list(EXTRAS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| extra | KL (nats) | reward there | against plain PPO | final reward at final KL |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in ["plain", *(name for name in options.only if name != "plain")]:
        for value in EXTRAS[name]:
            run(options.task, options.out, name, value, options.seeds)
            print(line(options.out, name, value, options.seeds), flush=True)


if __name__ == "__main__":
    main()
