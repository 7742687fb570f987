"""Over-optimisation where the truth is known: proxy and gold along a run that goes too far.

As in Gao et al. 2022 (arXiv:2210.10760), a fixed network stands for what people want (gold). A
reward model (proxy) learns it from noisy choices, and the policy is tuned on the proxy alone, with
hardly any KL penalty. The stages are those of `amenable run`; only the models are tiny. It measures
what the run does not show: the gold score of every checkpoint on prompts of its own, and how much
of the possible gain each way of choosing a checkpoint keeps.
"""

from __future__ import annotations

import io
import itertools
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

from amenable.artifacts import MetricsLog, RunFolder, StageContext, write_jsonl
from amenable.config.load import load_recipe
from amenable.evaluate.overoptimization import best_of_n, best_of_n_kl, fit_gold
from amenable.evaluate.statistics import Floats
from amenable.lab.problems import Problem, write_model
from amenable.lab.rows import on_one_thread
from amenable.progress import Deadline, Progress

if TYPE_CHECKING:
    from amenable.data.collate import PromptGroup
    from amenable.models.build import Foundation
    from amenable.models.roles import Role
    from amenable.rollout.types import Engine

LETTERS = "abcdefgh"
PROMPT_LETTERS, MAX_TOKENS = 4, 8
GOLD = "amenable.lab.overoptimization:gold_scores"
NS = (1, 2, 4, 8, 16, 32, 64)
"""Samples of a prompt among which the proxy chooses the best."""

_BEST_OF_PROMPTS = 128
_TOKENS = 8192  # of a micro-batch
_WAVES = 256
_LENGTH_SCALE = 2.5  # of gold, in counts: nearer answers score alike
SHARPNESS = 2.0  # of a choice: log-odds of a difference of one standard deviation in gold


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


class GoldNetwork:
    """A fixed random two-layer network on counts of letters and of pairs of neighbours.

    The counts are of the completion, and of the letters that it shares with the prompt, so that the
    best answer differs by prompt.
    """

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng([seed, 20221])
        letters = len(LETTERS)
        self._places = {letter: place for place, letter in enumerate(LETTERS)}
        width = 2 * letters + letters**2 + 1
        self._first = generator.normal(size=(_WAVES, width)) / _LENGTH_SCALE
        self._phase = generator.uniform(0.0, 2 * math.pi, size=_WAVES)
        self._last = generator.normal(size=_WAVES)
        self.shift, self.scale = 0.0, 1.0

    def raw(self, prompt: str, text: str) -> float:
        """Score before it is standardised."""
        letters = len(LETTERS)
        counts = np.zeros(self._first.shape[1])
        for letter in text:
            counts[self._places[letter]] += 1
            counts[letters + self._places[letter]] += prompt.count(letter)
        for one, other in itertools.pairwise(text):
            counts[2 * letters + letters * self._places[one] + self._places[other]] += 1
        counts[-1] = len(text) / 2
        return float(self._last @ np.cos(self._first @ counts + self._phase))

    def standardise(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Mean 0 and spread 1 over these."""
        raw = [self.raw(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        self.shift, self.scale = float(np.mean(raw)), float(np.std(raw))

    def __call__(self, prompt: str, text: str) -> float:
        """The gold score."""
        return (self.raw(prompt, text) - self.shift) / self.scale


_present: list[GoldNetwork] = []


def gold_scores(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """Scores by the network of the seed that runs in this process: what the recipe watches."""
    (gold,) = _present
    return [gold(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


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
        return _World(settings, seed, Path(folder)).run()


class _World:
    def __init__(self, settings: Settings, seed: int, root: Path) -> None:
        self._settings, self._seed, self._root = settings, seed, root
        self._gold = GoldNetwork(seed)
        _present[:] = [self._gold]
        self._base = write_model(_problem(seed), root / "base")
        self._prompts = _prompt_rows(settings, seed)

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

    def _collect(self) -> None:
        """Samples of the base, two a prompt, and noisy choices by gold."""
        rows = self._prompts["pairs"]
        texts = self._sample_base(rows, 2)
        asked = [row["input_text"] for row in rows for _ in range(2)]
        self._gold.standardise(asked, texts)
        noise = np.random.default_rng([self._seed, 7])
        pairs = []
        for row, first, other in zip(rows, texts[::2], texts[1::2], strict=True):
            if first == other:
                continue
            lead = self._gold(row["input_text"], other) - self._gold(row["input_text"], first)
            choice = int(noise.random() < 1 / (1 + math.exp(-SHARPNESS * lead)))
            pairs.append({**row, "candidate_0": first, "candidate_1": other, "choice": choice})
        count, held = self._settings.pairs, len(pairs) - 2 * self._settings.pairs
        parts = {"proxy": pairs[:count], "second": pairs[count : 2 * count]}
        for name, own in parts.items():
            data = RunFolder(self._root / name).data
            write_jsonl(data / "preferences.train.jsonl", own)
            write_jsonl(data / "preferences.validation.jsonl", pairs[-held : -held // 2])
            write_jsonl(data / "preferences.test.jsonl", pairs[-held // 2 :])
            write_jsonl(data / "prompts.train.jsonl", self._prompts["train"])
            write_jsonl(data / "prompts.validation.jsonl", self._prompts["selection"])

    def _context(self, name: str, stage: str) -> StageContext:
        settings = self._settings
        values: dict[str, Any] = {
            "seed": self._seed,
            "model.base": str(self._base),
            "model.dtype": "fp32",
            "model.lora.enabled": False,
            "data.prompts": ["enumerated"],
            "data.preferences": ["chosen"],
            "data.max_prompt_tokens": 8,
            "data.max_completion_tokens": MAX_TOKENS,
            "reward.epochs": 4,
            "reward.batch_size": 32,
            "reward.learning_rate": 1e-3,
            "reward.micro_batch_tokens": 8192,
            "policy.algorithm": settings.algorithm,
            "policy.updates": settings.updates,
            "policy.prompts_per_update": 32,
            "policy.samples_per_prompt": 8,
            "policy.epochs": 2,
            "policy.minibatches": 2,
            "policy.learning_rate": 1e-3,
            "policy.micro_batch_tokens": 8192,
            "policy.missing_eos_penalty": 0.0,
            "policy.kl.coef": 0.005,
            "policy.gate": False,
            "policy.checkpoint_every": settings.every,
            "policy.selection.by": "gold",
            "evaluate.temperature": 1.0,
        }
        if settings.algorithm == "ppo":
            values["policy.ppo.critic_learning_rate"] = 1e-3
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        parts = f'[{{source="own"}},{{source="{GOLD}",name="gold",weight=0.0}}]'
        folder = RunFolder(self._root / name)
        return StageContext(
            recipe=load_recipe(None, [*overrides, f"policy.rewards={parts}"]),
            folder=folder,
            stage=stage,
            log=MetricsLog(stage, folder.stage(stage), tensorboard=False),
            progress=Progress(stream=io.StringIO(), quiet=True),
            deadline=Deadline(None),
        )

    def _sample_base(self, rows: Sequence[dict[str, str]], samples: int) -> list[str]:
        from amenable.models.build import Foundation
        from amenable.rollout.transformers_engine import engine_for

        foundation = Foundation.open(self._context("proxy", "policy").recipe)
        engine = engine_for(foundation.source, foundation)
        return _sampled(engine, foundation, rows, samples, (self._seed, "base")).texts

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
                _sampled(engine, foundation, self._prompts[name], 1, (self._seed, name))
                for name in ("test", "selection")
            )
            rows.append(
                Checkpoint(
                    updates=updates,
                    kl=_kl(roles.policy, roles.reference, test),
                    proxy=float(_scores(proxy, test).mean()),
                    gold=float(np.mean(self._golds("test", test))),
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
        prompts, most = self._prompts["test"][:_BEST_OF_PROMPTS], NS[-1]
        sampled = _sampled(engine, roles.foundation, prompts, most, (self._seed, "best of n"))
        assert roles.reward_role is not None
        proxy = _scores(roles.reward_role, sampled).reshape(-1, most)
        gold = self._golds("test", sampled).reshape(-1, most)
        return [
            {
                "n": n,
                "kl": best_of_n_kl(n),
                "proxy": best_of_n(proxy, proxy, n),
                "gold": best_of_n(proxy, gold, n),
            }
            for n in NS
        ]

    def _golds(self, prompts: str, sampled: _Sampled) -> Floats:
        asked = [row["input_text"] for row in self._prompts[prompts] for _ in range(sampled.each)]
        pairs = zip(asked, sampled.texts, strict=False)  # of the first prompts
        return np.array([self._gold(prompt, text) for prompt, text in pairs])


@dataclass(frozen=True)
class _Sampled:
    """Completions of prompts, `each` of every one side by side."""

    groups: list[PromptGroup]
    texts: list[str]
    each: int
    pad_id: int


def _sampled(
    engine: Engine,
    foundation: Foundation,
    rows: Sequence[dict[str, str]],
    each: int,
    key: tuple[int | str, ...],
) -> _Sampled:
    from amenable.data.collate import PromptGroup
    from amenable.data.row_file import parse_prompt
    from amenable.rollout.types import Request, Sampling

    renderer = foundation.renderer
    prompts = [parse_prompt(row) for row in rows]
    requests = [
        Request(tuple(renderer.prompt_ids(prompt)), (*key, prompt.id, k))
        for prompt in prompts
        for k in range(each)
    ]
    rollouts = engine.generate(requests, Sampling(max_new_tokens=MAX_TOKENS, temperature=1.0))
    groups = [
        PromptGroup(own[0].prompt_ids, [rollout.completion_ids for rollout in own])
        for own in (rollouts[i : i + each] for i in range(0, len(rollouts), each))
    ]
    texts = [renderer.completion_text(rollout.completion_ids) for rollout in rollouts]
    return _Sampled(groups, texts, each, renderer.pad_id)


def _scores(judge: Role, sampled: _Sampled) -> Floats:
    """[completions] raw scores of a reward model."""
    from amenable.rollout.rewards import score_groups

    scores: Floats = score_groups(judge, sampled.groups, sampled.pad_id, _TOKENS).double().numpy()
    return scores


def _kl(policy: Role, reference: Role, sampled: _Sampled) -> float:
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
        last = self._ctx.out / "checkpoints" / "last"
        if not (last / "numbers.json").is_file():
            return
        updates = int(json.loads((last / "numbers.json").read_text())["updates"])
        if self.weights and self.weights[-1][0] == updates:
            return
        kept = self._ctx.out / f"kept-{updates}.safetensors"
        shutil.copyfile(last / "policy.safetensors", kept)
        self.weights.append((updates, kept))


def _problem(seed: int) -> Problem:
    """The random base model of a world."""
    return Problem(
        name="over-optimisation",
        letters=LETTERS,
        prompts=(LETTERS[:PROMPT_LETTERS],),
        max_tokens=MAX_TOKENS,
        model="llama",
        reward="random",
        beta=0.0,
        kl=0.0,
        seed=1000 + seed,
    )


def _prompt_rows(settings: Settings, seed: int) -> dict[str, list[dict[str, str]]]:
    """Different prompts of four letters for each use."""
    generator = np.random.default_rng([seed, 11])
    every = ["".join(word) for word in itertools.product(LETTERS, repeat=PROMPT_LETTERS)]
    generator.shuffle(every)
    sizes = {
        "test": settings.test_prompts,
        "selection": settings.selection_prompts,
        "pairs": 2 * settings.pairs + 600,
        "train": 1024,
    }
    assert sum(sizes.values()) <= len(every)
    words = iter(every)
    return {
        name: [{"id": w, "group": w, "input_text": w} for w in itertools.islice(words, size)]
        for name, size in sizes.items()
    }
