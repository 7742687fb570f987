"""Over-optimisation where the truth is known: proxy and gold along a run that goes too far.

As in Gao et al. 2022 (arXiv:2210.10760), a fixed network stands for what people want (gold). A
reward model (proxy) learns it from noisy choices, and the policy is tuned on the proxy alone, with
hardly any KL penalty. The stages are those of `amenable run`; only the models are tiny. It measures
what the run does not show: the gold score of every checkpoint on prompts of its own, and how much
of the possible gain each way of choosing a checkpoint keeps.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amenable.artifacts import StageContext
from amenable.evaluate.overoptimization import best_of_n, best_of_n_kl, fit_gold
from amenable.evaluate.statistics import Floats
from amenable.lab.letter_world import TOKENS, LetterWorld, Sampled, sampled
from amenable.lab.rows import on_one_thread
from amenable.train.checkpoints import newest_folder

if TYPE_CHECKING:
    from amenable.models.roles import Role

NS = (1, 2, 4, 8, 16, 32, 64)
"""Samples of a prompt among which the proxy chooses the best."""

_BEST_OF_PROMPTS = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is learnt from, and for how long.

    Args:
        algorithm: of the policy stage.
        pairs: choices that the proxy learns from; as many others train the second reward model.
        updates: of the policy.
        every: updates between checkpoints.
        selection_prompts: on which a checkpoint is chosen.
        test_prompts: on which the choice is judged; disjoint from all others.
    """

    algorithm: str = "ppo"
    pairs: int = 120
    updates: int = 64
    every: int = 2
    selection_prompts: int = 512
    test_prompts: int = 1024


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The policy after some updates, on the test prompts; scores in gold's spread at the start."""

    updates: int
    kl: float
    """From the start, nats a sequence."""
    proxy: float
    gold: float
    second: float
    """By a reward model of other pairs."""
    selection_gold: float
    """On the selection prompts, all that the choice by gold sees."""
    selection_second: float
    """The same by the reward model of other pairs, all that the choice without gold sees."""


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One world: its own gold network, models, choices and run."""

    seed: int
    proxy_accuracy: float
    """Of the proxy's choices on held-out pairs, against the noisy ones."""
    checkpoints: list[Checkpoint]
    best_of_n: list[dict[str, float]]
    """n, KL (nats), proxy and gold of the best of n of the start's samples by proxy."""
    turning_point: float | None
    """sqrt(KL) of the fitted curve's maximum; None where it lies beyond what was measured."""
    chosen: dict[str, int]
    """Updates of the checkpoint that each way chooses."""
    regret: dict[str, float]
    """Share of the possible gain that each choice gives away, on the test prompts."""
    wall_s: float

    @property
    def falls(self) -> bool:
        """The last checkpoint has a higher proxy than the one of most gold, and less of the gain.

        A tenth less, at the least.
        """
        golds = [row.gold for row in self.checkpoints]
        proxies = [row.proxy for row in self.checkpoints]
        best = golds.index(max(golds))
        fallen = golds[-1] < golds[best] - 0.1 * (golds[best] - golds[0])
        return fallen and proxies[-1] > proxies[best]


def run(settings: Settings, seeds: Sequence[int], workers: int) -> Iterator[SeedResult]:
    """A result for each seed as it ends.

    Args:
        settings: of all seeds.
        seeds: each is a world of its own.
        workers: processes of one thread each; with 1 all run here.
    """
    if workers <= 1 or len(seeds) <= 1:
        for seed in seeds:
            yield run_seed(settings, seed)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(seeds)), mp_context=context, initializer=on_one_thread
    ) as pool:
        for done in as_completed([pool.submit(run_seed, settings, seed) for seed in seeds]):
            yield done.result()


def run_seed(settings: Settings, seed: int) -> SeedResult:
    """Base model, choices, reward models, policy, and what became of them."""
    from amenable.pipeline.preflight import silence_libraries

    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        return _Run(settings, seed, Path(folder)).run()


class _Run:
    def __init__(self, settings: Settings, seed: int, root: Path) -> None:
        self._settings, self._seed = settings, seed
        sizes = {
            "test": settings.test_prompts,
            "selection": settings.selection_prompts,
            "pairs": 2 * settings.pairs + 600,
            "train": 1024,
        }
        self._world = LetterWorld(seed, root, sizes)

    def _context(self, name: str, stage: str) -> StageContext:
        settings = self._settings
        return self._world.context(
            name,
            stage,
            {
                "policy.algorithm": settings.algorithm,
                "policy.updates": settings.updates,
                "policy.checkpoint_every": settings.every,
                "checkpoint.every_minutes": 0,  # every checkpoint is a candidate
            },
        )

    def _collect(self) -> None:
        pairs, count = self._world.choices(), self._settings.pairs
        held = len(pairs) - 2 * count
        parts = {"proxy": pairs[:count], "second": pairs[count : 2 * count]}
        for name, own in parts.items():
            self._world.write(
                name,
                {
                    "preferences.train": own,
                    "preferences.validation": pairs[-held : -held // 2],
                    "preferences.test": pairs[-held // 2 :],
                    "prompts.train": self._world.prompts["train"],
                    "prompts.validation": self._world.prompts["selection"],
                },
            )

    def run(self) -> SeedResult:
        from amenable.train import reward
        from amenable.train.registry import run_policy

        start = time.monotonic()
        self._collect()
        proxy, second = (self._context(name, "reward") for name in ("proxy", "second"))
        accuracy = float(reward.run(proxy)["accuracy"])
        reward.run(second)
        policy = self._context("proxy", "policy")
        kept = _KeptCheckpoints(policy)
        run_policy(replace(policy, refresh_report=kept.look))
        rows = self._measure(kept.weights, second.folder.models / "reward", policy)
        distances = [math.sqrt(max(0.0, row.kl)) for row in rows]
        fitted = fit_gold(distances, [row.gold for row in rows])
        turn = None if fitted is None else fitted.turning_point
        by_second = max(rows, key=lambda row: row.selection_second).updates
        by_gold = _selection(policy)["chosen"]
        chosen = {"gold": by_gold, "second": by_second, "last": rows[-1].updates}
        return SeedResult(
            seed=self._seed,
            proxy_accuracy=accuracy,
            checkpoints=rows,
            best_of_n=self._best_of_n(policy),
            turning_point=turn if turn is not None and turn <= max(distances) else None,
            chosen=chosen,
            regret={way: _regret(rows, updates) for way, updates in chosen.items()},
            wall_s=time.monotonic() - start,
        )

    def _measure(
        self, kept: Sequence[tuple[int, Path]], second: Path, policy: StageContext
    ) -> list[Checkpoint]:
        """The start and every kept checkpoint."""
        from safetensors.torch import load_file

        from amenable.models.export import load_reward_head
        from amenable.rollout.transformers_engine import RolloutCopy
        from amenable.train.policy_roles import open_roles

        roles = open_roles(policy)
        foundation, proxy = roles.foundation, roles.reward_role
        assert proxy is not None
        judge = foundation.role("second", second, head=load_reward_head(second)[0], train=False)
        engine = RolloutCopy(roles.policy, merged=False).engine(foundation.renderer)
        chosen_by = _selection(policy)["checkpoints"]
        rows = []
        for (updates, file), selection in zip([(0, None), *kept], chosen_by, strict=True):
            assert updates == selection["updates"]
            if file is not None:
                roles.policy.load_state(load_file(file))
            test, other = (
                sampled(engine, foundation, self._world.prompts[name], 1, (self._seed, name))
                for name in ("test", "selection")
            )
            rows.append(
                Checkpoint(
                    updates=updates,
                    kl=_kl(roles.policy, roles.reference, test),
                    proxy=float(_scores(proxy, test).mean()),
                    gold=float(np.mean(self._world.golds("test", test))),
                    second=float(_scores(judge, test).mean()),
                    selection_gold=selection["score"],
                    selection_second=float(_scores(judge, other).mean()),
                )
            )
        return rows

    def _best_of_n(self, policy: StageContext) -> list[dict[str, float]]:
        """Of the start's samples on test prompts."""
        from amenable.rollout.transformers_engine import RolloutCopy
        from amenable.train.policy_roles import open_roles

        roles = open_roles(policy)
        engine = RolloutCopy(roles.reference, merged=False).engine(roles.foundation.renderer)
        prompts, most = self._world.prompts["test"][:_BEST_OF_PROMPTS], NS[-1]
        drawn = sampled(engine, roles.foundation, prompts, most, (self._seed, "best of n"))
        assert roles.reward_role is not None
        proxy = _scores(roles.reward_role, drawn).reshape(-1, most)
        gold = self._world.golds("test", drawn).reshape(-1, most)
        return [
            {
                "n": n,
                "kl": best_of_n_kl(n),
                "proxy": best_of_n(proxy, proxy, n),
                "gold": best_of_n(proxy, gold, n),
            }
            for n in NS
        ]


def _scores(judge: Role, sampled: Sampled) -> Floats:
    """[completions] raw scores of a reward model."""
    from amenable.rollout.rewards import score_groups

    scores: Floats = score_groups(judge, sampled.groups, sampled.pad_id, TOKENS).double().numpy()
    return scores


def _kl(policy: Role, reference: Role, sampled: Sampled) -> float:
    """Mean log-ratio of the policy's own completions, nats a sequence."""
    import torch

    from amenable.data.collate import collate
    from amenable.losses.kl import k1, sequence_kl

    batch = collate(sampled.groups, sampled.pad_id)
    with torch.no_grad():
        own = policy.logprobs(batch, temperature=1.0).logprobs
        other = reference.logprobs(batch, temperature=1.0).logprobs
    return float(sequence_kl(k1(own, other), batch.mask).mean())


def _selection(policy: StageContext) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((policy.out / "selection.json").read_text())
    return found


def _regret(rows: Sequence[Checkpoint], updates: int) -> float:
    """Share of the gain from the start to the best checkpoint that this one gives away."""
    golds = {row.updates: row.gold for row in rows}
    best = max(golds.values())
    return (best - golds[updates]) / (best - golds[0]) if best > golds[0] else 0.0


class _KeptCheckpoints:
    """Copies the policy's weights whenever the stage has written a checkpoint."""

    def __init__(self, ctx: StageContext) -> None:
        self._ctx = ctx
        self.weights: list[tuple[int, Path]] = []
        """Updates, and the file."""

    def look(self) -> None:
        """Called after every update."""
        last = newest_folder(self._ctx.out / "checkpoints")
        if last is None:
            return
        updates = int(json.loads((last / "numbers.json").read_text())["updates"])
        if self.weights and self.weights[-1][0] == updates:
            return
        kept = self._ctx.out / f"kept-{updates}.safetensors"
        shutil.copyfile(last / "policy.safetensors", kept)
        self.weights.append((updates, kept))
