"""Run folders from which the policy stage can start."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from amenable.artifacts import StageContext, write_jsonl
from amenable.models.build import Foundation
from amenable.models.export import export_policy, export_reward
from amenable.models.heads import ScalarHead

MakeContext = Callable[..., StageContext]
SCORE = "policy_reward:score"


def vowel_share(prompts: Sequence[str], completions: Sequence[str], rows: Any) -> list[float]:
    """Share of the characters that are vowels."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


@pytest.fixture(autouse=True)
def policy_reward(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module that SCORE names; a test may put another function there."""
    module = types.ModuleType("policy_reward")
    module.score = vowel_share  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "policy_reward", module)
    return module


PolicyContext = Callable[..., StageContext]


@pytest.fixture
def policy_context(
    make_context: MakeContext, ten_rows: list[dict[str, str]], tmp_path: Path
) -> PolicyContext:
    """Contexts of the policy stage with ten training prompts.

    `reward_model=True` adds models/reward and takes the reward from it, `sft_model=True` adds
    models/sft.
    """

    def make(
        *,
        root: Path | None = None,
        reward_model: bool = False,
        sft_model: bool = False,
        **changes: Any,
    ) -> StageContext:
        settings = {
            "policy__reward": "" if reward_model else SCORE,
            "policy__checkpoint_every": 1,
            "data__max_completion_tokens": 6,
        }
        ctx = make_context("policy", root=root or tmp_path / "run", **{**settings, **changes})
        rows = [{"id": f"p{i}", "group": str(i), **row} for i, row in enumerate(ten_rows)]
        write_jsonl(ctx.folder.data / "prompts.train.jsonl", rows)
        if sft_model and not (ctx.folder.models / "sft").exists():
            write_sft(ctx)
        if reward_model and not (ctx.folder.models / "reward").exists():
            write_reward(ctx)
        return ctx

    return make


def shake(parameters: Sequence[torch.nn.Parameter], seed: int, size: float = 0.05) -> None:
    """Small seeded changes, so that a model is not the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def write_sft(ctx: StageContext) -> None:
    foundation = Foundation.open(ctx.recipe)
    role = foundation.role("sft")
    shake(role.trainable_parameters(), seed=1, size=0.02)
    export_policy(role.model, foundation.tokenizer, ctx.folder.models / "sft", role.adapter)


def write_reward(ctx: StageContext) -> None:
    foundation = Foundation.open(ctx.recipe)
    role = foundation.role("reward", head=ScalarHead(64, seed=3))
    shake(role.trainable_parameters(), seed=2, size=0.02)
    out = ctx.folder.models / "reward"
    export_reward(role.model, role.scalar_head, foundation.tokenizer, out, role.adapter, 0.25)
