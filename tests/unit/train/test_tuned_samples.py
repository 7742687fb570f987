from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amenable.artifacts import StageContext, read_jsonl, write_jsonl
from amenable.data.collate import PromptGroup, collate
from amenable.data.row_file import open_prompts
from amenable.models.build import Foundation
from amenable.models.roles import Role
from amenable.train import tuned_samples
from amenable.train.pair_reference import FrozenStart
from amenable.train.tuned_samples import sample_tuned

MakeContext = Callable[..., StageContext]
Rows = list[dict[str, Any]]


def opened(
    make_context: MakeContext, rows: Rows, root: Path, **changes: Any
) -> tuple[StageContext, Foundation, Role]:
    ctx = make_context("policy", root=root, **changes)
    asked = [{"id": f"p{i}", "group": str(i), **row} for i, row in enumerate(rows)]
    write_jsonl(ctx.folder.data / "prompts.train.jsonl", asked)
    foundation = Foundation.open(ctx.recipe)
    return ctx, foundation, foundation.role("policy")


def shake(role: Role) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("lora", [True, False])
def test_kl_is_the_mean_log_ratio_of_the_samples(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path, lora: bool
) -> None:
    """Of an untouched policy it is 0; else it is that of the sampled tokens, one by one."""
    ctx, foundation, role = opened(make_context, ten_rows, tmp_path, lora__enabled=lora)
    assert sample_tuned(ctx, foundation, role, FrozenStart(ctx, foundation), 1)["kl_last"] == 0.0
    ctx, foundation, role = opened(make_context, ten_rows, tmp_path / "moved", lora__enabled=lora)
    shake(role)
    found = sample_tuned(ctx, foundation, role, FrozenStart(ctx, foundation), 7)
    start = Foundation.open(ctx.recipe).role("reference", train=False)
    asked = open_prompts(ctx.folder.data / "prompts.train.jsonl")
    rollouts = tuned_samples._rollouts(ctx, foundation, role, asked)
    expected = []
    for rollout in rollouts:
        batch = collate([PromptGroup(rollout.prompt_ids, [rollout.completion_ids])], 0)
        with torch.no_grad():
            ratio = role.logprobs(batch).logprobs.sum() - start.logprobs(batch).logprobs.sum()
        expected.append(float(ratio))
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    assert max(map(abs, expected)) > 0.01
    assert found["kl_last"] == pytest.approx(sum(expected) / 10, abs=1e-4)
    assert found["completion_tokens_mean"] == tokens / 10
    rows = list(read_jsonl(ctx.log.samples_path))
    assert [row["kl"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert {row["step"] for row in rows} == {7}
    assert [row["prompt"] for row in rows] == [row["input_text"] for row in ten_rows]


def test_without_prompts_or_time_nothing_is_sampled(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    none = {"kl_last": None, "completion_tokens_mean": None}
    ctx, foundation, role = opened(make_context, ten_rows, tmp_path, stop_after=1)
    assert sample_tuned(ctx, foundation, role, FrozenStart(ctx, foundation), 1) == none
    ctx, foundation, role = opened(make_context, ten_rows, tmp_path)
    (ctx.folder.data / "prompts.train.jsonl").unlink()
    assert sample_tuned(ctx, foundation, role, FrozenStart(ctx, foundation), 1) == none
    assert not ctx.log.samples_path.exists()
