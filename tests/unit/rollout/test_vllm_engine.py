"""What of vLLM's engine can be seen without it; with it: tests/integration/test_vllm_run.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from amenable.config.load import load_recipe
from amenable.errors import StageError, UsageError
from amenable.models.build import Foundation
from amenable.pipeline import preflight
from amenable.ranks.launch import Seat
from amenable.rollout.copies import open_copy
from amenable.rollout.transformers_engine import RolloutCopy
from amenable.rollout.types import Request, Sampling
from amenable.rollout.vllm_engine import VllmEngine, role_weights

from ..conftest import tiny_recipe  # noqa: TID252


@pytest.mark.parametrize("lora", [True, False])
def test_every_weight_is_handed_over_merged_under_its_own_name(tiny: Path, lora: bool) -> None:
    foundation = Foundation.open(tiny_recipe(tiny, lora__enabled=lora))
    role = foundation.role("policy")
    with torch.no_grad():
        for parameter in role.trainable_parameters():
            parameter.add_(0.1)
    given = dict(role_weights(role))
    copy = RolloutCopy(role)
    copy.sync()
    wanted = dict(copy.model.named_parameters())
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    start = dict(Foundation.open(tiny_recipe(tiny)).role("x", train=False).plain.named_parameters())
    moved = {name for name in wanted if not torch.equal(given[name], start[name])}
    assert "model.layers.1.mlp.down_proj.weight" in moved
    assert ("model.embed_tokens.weight" in moved) == (not lora)


def test_the_own_engine_unless_the_recipe_says_otherwise(tiny: Path) -> None:
    foundation = Foundation.open(tiny_recipe(tiny))
    assert isinstance(open_copy(foundation, foundation.role("policy")), RolloutCopy)


def test_a_prompt_without_room_is_told_before_vllm_is_asked() -> None:
    engine = VllmEngine(None, frozenset([2]), 10)
    with pytest.raises(
        StageError, match="a prompt of 8 tokens and a completion of 3 are more than"
    ):
        engine.generate([Request((5,) * 8, (0, "x"))], Sampling(max_new_tokens=3))


def test_what_vllm_raises_is_told_in_a_line() -> None:
    class Failing:
        def generate(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no kernel for this\nand much more")

    engine = VllmEngine(Failing(), frozenset([2]), 10)
    engine._parameters = lambda request, sampling: None  # type: ignore[method-assign]
    with pytest.raises(
        StageError, match=r'vLLM failed: no kernel for this; policy\.engine = "own" does'
    ):
        engine.generate([Request((5,), (0, "x"))], Sampling(max_new_tokens=3))


VLLM = ["data.task=docstrings", "collect.annotator=simulated", "policy.engine=vllm"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'needs the package vllm, .* pip install "amenable\[vllm'):
        preflight.check_inputs(load_recipe(None, VLLM))
    preflight.check_inputs(load_recipe(None, [*VLLM, "policy.enabled=false"]))


def test_it_runs_within_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    preflight.check_inputs(load_recipe(None, VLLM))
    monkeypatch.setattr(preflight, "seat", lambda: Seat(0, 2, 0, "127.0.0.1", 1))
    with pytest.raises(UsageError, match=r'policy\.engine: "vllm" runs within one process'):
        preflight.check_inputs(load_recipe(None, VLLM))
    preflight.check_inputs(load_recipe(None, VLLM), ["data", "sft"])
