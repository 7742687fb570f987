"""Stages on a quantised base: they end, the gate holds, and a resumed one gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import StageContext, read_json, read_jsonl, write_jsonl
from amenable.train import ppo, sft

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make test-quantised")

Make = Callable[..., StageContext]


def same_model(one: StageContext, other: StageContext, name: str) -> bool:
    """Every file of the exported models is the same to the byte."""
    files = [
        {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        for root in (ctx.folder.models / name for ctx in (one, other))
    ]
    assert Path("adapter/adapter_model.safetensors") in files[0]
    return files[0] == files[1]


def test_sft_learns_and_resumes_bit_for_bit(
    make_context: Make, ten_rows: list[dict[str, str]], lively: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "base": lively,
        "model__quantise": "nf4",
        "sft__epochs": 3.0,
        "sft__evaluations": 6,
        "sft__learning_rate": 1e-2,
    }

    def context(folder: str, **more: Any) -> StageContext:
        ctx = make_context("sft", root=tmp_path / folder, **settings, **more)
        for split, rows in (("train", ten_rows), ("validation", ten_rows[:3])):
            numbered = [{"id": f"d{i}", "group": str(i), **row} for i, row in enumerate(rows)]
            write_jsonl(ctx.folder.data / f"demonstrations.{split}.jsonl", numbered)
        return ctx

    whole = context("whole")
    section = sft.run(whole)
    assert section["loss_last"] < section["loss_first"] - 0.1
    assert sft.run(context("part", stop_after=2))["steps"] == 2
    rest = context("part")
    assert sft.run(rest) == section
    assert same_model(whole, rest, "sft")


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "fp32"), ("int8", "bf16")])
def test_ppo_holds_the_gate_and_resumes_bit_for_bit(
    policy_context: Make, tmp_path: Path, kind: str, dtype: str
) -> None:
    """Four roles; roll-out log-probabilities and training's are those of one and the same base."""
    settings: dict[str, Any] = {
        "model__quantise": kind,
        "model__dtype": dtype,
        "reward_model": True,
        "sft_model": True,
        "policy__updates": 2,
        "policy__learning_rate": 1e-3,
    }
    whole = policy_context(root=tmp_path / "whole", **settings)
    section = ppo.run(whole)
    checks = read_json(whole.out / "gate.json")["checks"]
    assert {"roll-out", "reference", "reward", "critic", "gradient"} <= set(checks)
    assert all(check["holds"] for check in checks.values())
    first = next(iter(read_jsonl(whole.log.metrics_path)))
    assert (first["policy/kl_loss"], first["policy/passes"]) == (0.0, 2)
    assert ppo.run(policy_context(root=tmp_path / "part", stop_after=1, **settings))["updates"] == 1
    rest = policy_context(root=tmp_path / "part", **settings)
    assert ppo.run(rest) == section
    assert same_model(whole, rest, "tuned")
