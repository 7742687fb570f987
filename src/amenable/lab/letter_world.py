"""Worlds of eight letters: a random base model, a gold score that is known, prompts and choices.

What happens in them are the stages of `amenable run`; only models and language are tiny.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amenable.artifacts import MetricsLog, Observer, RunFolder, StageContext, write_jsonl
from amenable.config.load import load_recipe
from amenable.evaluate.statistics import Floats
from amenable.lab.problems import Problem, write_model
from amenable.progress import Deadline, Progress

if TYPE_CHECKING:
    from amenable.data.collate import PromptGroup
    from amenable.models.build import Foundation
    from amenable.rollout.types import Engine

LETTERS = "abcdefgh"
PROMPT_LETTERS, MAX_TOKENS = 4, 8
GOLD = "amenable.lab.letter_world:gold_scores"
TOKENS = 8192
"""Of a micro-batch."""
SHARPNESS = 2.0
"""Of a choice: log-odds of a difference of one standard deviation in gold."""

_WAVES = 256


class GoldNetwork:
    """A fixed random two-layer network on counts of letters and of pairs of neighbours.

    The counts are of the completion, and of the letters that it shares with the prompt, so that the
    best answer differs by prompt.
    """

    def __init__(self, seed: int, length_scale: float = 2.5) -> None:
        generator = np.random.default_rng([seed, 20221])
        letters = len(LETTERS)
        self._places = {letter: place for place, letter in enumerate(LETTERS)}
        width = 2 * letters + letters**2 + 1
        self._first = generator.normal(size=(_WAVES, width)) / length_scale
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


class LetterWorld:
    """Base model, gold and prompts of a seed.

    Args:
        seed: of everything.
        root: a folder for models and run folders.
        sizes: number of prompts by their use.
        length_scale: of gold, in counts; a large one is easy to learn.
    """

    def __init__(
        self, seed: int, root: Path, sizes: Mapping[str, int], length_scale: float = 2.5
    ) -> None:
        self.seed, self.root = seed, root
        self.gold = GoldNetwork(seed, length_scale)
        _present[:] = [self.gold]
        self.base = write_model(_problem(seed), root / "base")
        self.prompts = _prompt_rows(seed, sizes)

    def choices(self, sharpness: float = SHARPNESS) -> list[dict[str, Any]]:
        """Two samples of the base for each prompt of `pairs`, and noisy choices by gold."""
        rows = self.prompts["pairs"]
        texts = self.sample_base(rows, 2).texts
        asked = [row["input_text"] for row in rows for _ in range(2)]
        self.gold.standardise(asked, texts)
        noise = np.random.default_rng([self.seed, 7])
        pairs = []
        for row, first, other in zip(rows, texts[::2], texts[1::2], strict=True):
            if first == other:
                continue
            lead = self.gold(row["input_text"], other) - self.gold(row["input_text"], first)
            choice = int(noise.random() < 1 / (1 + math.exp(-sharpness * lead)))
            pairs.append({**row, "candidate_0": first, "candidate_1": other, "choice": choice})
        return pairs

    def write(self, name: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Put rows into the run folder of this name."""
        for split, rows in splits.items():
            write_jsonl(RunFolder(self.root / name).data / f"{split}.jsonl", rows)

    def context(
        self,
        name: str,
        stage: str,
        settings: Mapping[str, Any],
        watch: Observer | None = None,
        reward: str = "",
    ) -> StageContext:
        """A stage in the run folder of this name, its reward the run's own, gold only watched.

        Args:
            name: of the folder.
            stage: of the pipeline.
            settings: dotted recipe keys over those of all runs here.
            watch: hears the stage's figures.
            reward: `module:function` in place of the run's own.
        """
        values: dict[str, Any] = {
            "seed": self.seed,
            "model.base": str(self.base),
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
            "policy.prompts_per_update": 32,
            "policy.samples_per_prompt": 8,
            "policy.epochs": 2,
            "policy.minibatches": 2,
            "policy.learning_rate": 1e-3,
            "policy.micro_batch_tokens": 8192,
            "policy.missing_eos_penalty": 0.0,
            "policy.kl.coef": 0.005,
            "policy.gate": False,
            "policy.selection.by": "gold",
            "evaluate.temperature": 1.0,
            **settings,
        }
        if values["policy.algorithm"] == "ppo":
            values.setdefault("policy.ppo.critic_learning_rate", 1e-3)
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        source = reward or "own"
        parts = f'[{{source="{source}"}},{{source="{GOLD}",name="gold",weight=0.0}}]'
        folder = RunFolder(self.root / name)
        return StageContext(
            recipe=load_recipe(None, [*overrides, f"policy.rewards={parts}"]),
            folder=folder,
            stage=stage,
            log=MetricsLog(stage, folder.stage(stage), tensorboard=False, observer=watch),
            progress=Progress(stream=io.StringIO(), quiet=True),
            deadline=Deadline(None),
        )

    def sample_base(self, rows: Sequence[dict[str, str]], samples: int) -> Sampled:
        """Completions of the base model at temperature 1."""
        from amenable.models.build import Foundation
        from amenable.rollout.transformers_engine import engine_for

        recipe = self.context("base", "policy", {"policy.algorithm": "ppo"}).recipe
        foundation = Foundation.open(recipe)
        engine = engine_for(foundation.source, foundation)
        return sampled(engine, foundation, rows, samples, (self.seed, "base"))

    def golds(self, prompts: str, drawn: Sampled) -> Floats:
        """[completions] gold scores; of the first prompts, where it has fewer."""
        asked = [row["input_text"] for row in self.prompts[prompts] for _ in range(drawn.each)]
        pairs = zip(asked, drawn.texts, strict=False)  # of the first prompts
        return np.array([self.gold(prompt, text) for prompt, text in pairs])


@dataclass(frozen=True)
class Sampled:
    """Completions of prompts, `each` of every one side by side."""

    groups: list[PromptGroup]
    texts: list[str]
    each: int
    pad_id: int


def sampled(
    engine: Engine,
    foundation: Foundation,
    rows: Sequence[dict[str, str]],
    each: int,
    key: tuple[int | str, ...],
) -> Sampled:
    """Completions of prompts at temperature 1.

    Args:
        engine: who samples.
        foundation: its renderer.
        rows: prompts.
        each: completions of a prompt.
        key: of the noise, with the prompt and the number of the completion.
    """
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
    return Sampled(groups, texts, each, renderer.pad_id)


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


def _prompt_rows(seed: int, sizes: Mapping[str, int]) -> dict[str, list[dict[str, str]]]:
    """Different prompts of four letters for each use."""
    generator = np.random.default_rng([seed, 11])
    every = ["".join(word) for word in itertools.product(LETTERS, repeat=PROMPT_LETTERS)]
    generator.shuffle(every)
    assert sum(sizes.values()) <= len(every)
    words = iter(every)
    return {
        name: [{"id": w, "group": w, "input_text": w} for w in itertools.islice(words, size)]
        for name, size in sizes.items()
    }
