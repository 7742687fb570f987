from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from amenable.artifacts import StageContext, read_json, write_jsonl
from amenable.data.collate import PromptGroup
from amenable.rollout.types import Request, Rollout, Sampling
from amenable.train.headroom import report_headroom

MakeContext = Callable[..., StageContext]


class NumberEngine:
    """Answers a number: 5 when greedy, else the sample's number (0 to 3) plus ten for prompt b."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: Any = None
    ) -> list[Rollout]:
        self.keys = [request.key for request in requests]
        assert sampling.temperature in (0.0, 0.7), "greedy, or as the policy's roll-outs"
        return [
            Rollout(
                request.prompt_ids, (5 if sampling.temperature == 0 else self.value(request),), True
            )
            for request in requests
        ]

    def value(self, request: Request) -> int:
        *_, prompt, sample = request.key
        return int(sample) + (10 if prompt == "b" else 0)


class NumberRenderer:
    def prompt_ids(self, prompt: Any) -> list[int]:
        return [1]

    def completion_text(self, ids: Sequence[int]) -> str:
        return str(ids[0])


class NumberAnnotator:
    def score(self, prompt: Any, text: str) -> float:
        return float(text)


def test_means_by_hand(make_context: MakeContext) -> None:
    """Prompt a gets 0 1 2 3, prompt b 10 11 12 13: mean 6.5, mean of the best (3 + 13) / 2 = 8.

    The third prompt is beyond `best_of_prompts`.
    """
    ctx = make_context(
        "policy", evaluate__best_of=4, evaluate__best_of_prompts=2, policy__temperature=0.7
    )
    rows = [{"id": name, "group": name, "input_text": name} for name in "abc"]
    write_jsonl(ctx.folder.data / "prompts.train.jsonl", rows)
    engine: Any = NumberEngine()
    renderer: Any = NumberRenderer()
    annotator: Any = NumberAnnotator()
    found = report_headroom(ctx, engine, renderer, annotator)
    assert found == {
        "prompts": 2,
        "best_of": 4,
        "temperature": 0.7,
        "sft_greedy": pytest.approx(5.0),
        "sft_sampled": pytest.approx(6.5),
        "best_of_n": pytest.approx(8.0),
    }
    assert read_json(ctx.out / "headroom.json") == found
    assert len(set(engine.keys)) == 8


def test_best_of_n_by_the_reward_model_is_the_mean_over_all_subsets(
    make_context: MakeContext,
) -> None:
    """The proxy likes 2 best, then 0, 3, 1: gold by it rises from n = 1 to 2 and stays below 3."""
    ctx = make_context(
        "policy", evaluate__best_of=4, evaluate__best_of_prompts=2, policy__temperature=0.7
    )
    rows = [{"id": name, "group": name, "input_text": name} for name in "ab"]
    write_jsonl(ctx.folder.data / "prompts.train.jsonl", rows)
    liking = {0: 0.5, 1: -1.0, 2: 2.0, 3: 0.25}

    def proxy(groups: Sequence[PromptGroup]) -> torch.Tensor:
        return torch.tensor([liking[ids[0] % 10] for group in groups for ids in group.completions])

    parts: list[Any] = [NumberEngine(), NumberRenderer(), NumberAnnotator()]
    found = report_headroom(ctx, *parts, proxy)["by_reward_model"]
    assert [row["n"] for row in found] == [1, 2, 4]
    for row in found:
        chosen = [max(some, key=lambda k: liking[k]) for some in combinations(range(4), row["n"])]
        assert row["gold"] == pytest.approx(np.mean(chosen) + 5, abs=1e-9)
        assert row["proxy"] == pytest.approx(np.mean([liking[k] for k in chosen]), abs=1e-9)
    assert found[2]["kl"] == pytest.approx(math.log(4) - 0.75)
