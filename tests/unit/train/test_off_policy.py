from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.conftest import said
from torch import Tensor

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import StageContext, read_json, read_jsonl, write_jsonl
from amenable.data.collate import PromptGroup, collate
from amenable.errors import DataError, NumericsError
from amenable.models.build import Foundation
from amenable.models.roles import Role
from amenable.progress import Deadline
from amenable.train import off_policy, pair_reference
from amenable.train.checkpoints import load_checkpoint, save_checkpoint
from amenable.train.loop import planned_batches
from amenable.train.off_policy import PairLearner
from amenable.train.pair_losses import LOSSES
from amenable.train.pair_reference import (
    FrozenStart,
    PairReference,
    PairRows,
    mismatched,
    open_pairs,
    open_reference,
)

MakeContext = Callable[..., StageContext]
Rows = list[dict[str, Any]]
EVERY = list(LOSSES)


def test_every_algorithm_that_learns_from_pairs_has_a_loss() -> None:
    named = {name for name, row in ALGORITHMS.items() if row.learns_from == "preferences"}
    assert set(LOSSES) == named
    assert {ALGORITHMS[name].run for name in named} == {"amenable.train.off_policy:run"}


# Gradient -------------------------------------------------------------------------------------


def context(make_context: MakeContext, rows: Rows, root: Path, **changes: Any) -> StageContext:
    """Ten pairs in which the row's own answer beats the next row's, on either side."""
    settings = {
        "policy__algorithm": "dpo",
        "policy__gate": False,
        "preference__batch_size": 5,
        "preference__epochs": 2.0,
        "preference__learning_rate": 1e-2,
    }
    ties, prompts = changes.pop("ties", ()), changes.pop("prompts", False)
    ctx = make_context("policy", root=root, **{**settings, **changes})
    texts = [row["output_text"] for row in rows]
    pairs = []
    for i, row in enumerate(rows):
        sides = [texts[i], texts[i - 1]]
        choice: Any = i % 2
        sides = sides[::-1] if choice else sides
        pairs.append(
            {
                "id": f"pair{i}",
                "group": str(i),
                "input_text": row["input_text"],
                "candidate_0": sides[0],
                "candidate_1": sides[1],
                "choice": "tie" if i in ties else choice,
                "weight": 1.0 + i % 3,
            }
        )
    for split, part in (("train", pairs), ("validation", pairs[:4])):
        write_jsonl(ctx.folder.data / f"preferences.{split}.jsonl", part)
    if prompts:
        asked = [{"id": f"p{i}", "group": str(i), **row} for i, row in enumerate(rows)]
        write_jsonl(ctx.folder.data / "prompts.train.jsonl", asked)
    return ctx


def shake(role: Role, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def opened(
    ctx: StageContext,
) -> tuple[Role, dict[str, PairRows], PairReference, Callable[[], PairLearner]]:
    """A policy away from its reference, and what makes a learner of it."""
    row = LOSSES[ctx.recipe.policy.algorithm]
    foundation = Foundation.open(ctx.recipe)
    data = {
        split: open_pairs(ctx, foundation.renderer, split, ties=row.ties)
        for split in ("train", "validation")
    }
    reference = open_reference(
        ctx,
        FrozenStart(ctx, foundation),
        foundation.renderer.pad_id,
        data,
        wanted=row.reference,
        mismatched_too=row.mismatched,
    )
    role = foundation.role("policy")
    shake(role)
    pad = foundation.renderer.pad_id
    return role, data, reference, lambda: PairLearner(ctx, row, role, pad, data, reference)


def gradients(
    role: Role, learner: PairLearner, rows: Sequence[int]
) -> tuple[dict[str, float], list[Tensor]]:
    for parameter in role.trainable_parameters():
        parameter.grad = None
    metrics = learner.gradient(rows)
    return metrics, [p.grad.clone() for p in role.trainable_parameters() if p.grad is not None]


@pytest.mark.parametrize("name", EVERY)
def test_eight_times_one_equals_one_times_eight(
    name: str, make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """With weights, and ties where they are learnt from, over batches of eight."""
    found = []
    for budget in (100_000, 1):
        settings = {
            "policy__algorithm": name,
            "preference__micro_batch_tokens": budget,
            "preference__batch_size": 8,
            "preference__sft_coef": 0.2,
            "ties": (3, 4) if LOSSES[name].ties else (),
        }
        ctx = context(make_context, ten_rows, tmp_path / str(budget), **settings)
        role, data, _, learner = opened(ctx)
        rows = planned_batches(len(data["train"]), ctx.recipe.policy.preference, 0)[0]
        assert len(rows) == 8
        found.append((*gradients(role, learner(), rows), learner().evaluate()))
    (whole, one, evaluated), (single, many, alone) = found
    assert whole == pytest.approx(single, abs=2e-5)
    assert evaluated == pytest.approx(alone, abs=2e-5)
    assert len(one) == len(many) > 1
    assert max(float(g.abs().max()) for g in one) > 1e-4
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def alone(role: Role, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Log-probability of one completion in a forward pass of its own."""
    with torch.no_grad():
        return float(role.logprobs(collate([PromptGroup(prompt, [completion])], 0)).logprobs.sum())


def test_metrics_by_hand(make_context: MakeContext, ten_rows: Rows, tmp_path: Path) -> None:
    """Weighted DPO loss, accuracy and means of five pairs, each completion by itself."""
    ctx = context(make_context, ten_rows, tmp_path, preference__beta=0.5)
    role, data, _, learner = opened(ctx)
    reference = Foundation.open(ctx.recipe).role("reference", train=False)
    rows = [7, 1, 2, 9, 4]
    policy, ref = (
        torch.tensor(
            [
                [alone(model, data["train"].groups[i].prompt_ids, ids) for ids in own]
                for i in rows
                for own in [data["train"].groups[i].completions]
            ]
        )
        for model in (role, reference)
    )
    rewards = 0.5 * (policy - ref)
    margin = rewards[:, 0] - rewards[:, 1]
    weights = torch.tensor([1.0 + i % 3 for i in rows])
    expected = {
        "loss": float((torch.log1p(torch.exp(-margin)) * weights).sum() / weights.sum()),
        "accuracy": float((margin > 0).float().mean()),
        "margin": float(margin.mean()),
        "chosen_reward": float(rewards[:, 0].mean()),
        "rejected_reward": float(rewards[:, 1].mean()),
        "chosen_logprob": float(policy[:, 0].mean()),
        "rejected_logprob": float(policy[:, 1].mean()),
        "log_ratio": float((policy - ref)[:, 0].mean()),
    }
    found = learner().gradient(rows)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["tokens"] == sum(
        len(ids) for i in rows for ids in data["train"].groups[i].completions
    )
    assert abs(expected["margin"]) > 1e-3


def test_ties_change_neither_accuracy_nor_means(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    ctx = context(make_context, ten_rows, tmp_path, ties=(0, 1))
    _, _, _, learner = opened(ctx)
    mixed, decided = learner().gradient([0, 5, 1, 6, 7]), learner().gradient([5, 6, 7])
    pairwise = ("accuracy", "margin", "chosen_logprob", "rejected_reward", "log_ratio")
    assert {k: mixed[k] for k in pairwise} == pytest.approx(
        {k: decided[k] for k in pairwise}, abs=1e-5
    )
    assert mixed["loss"] != pytest.approx(decided["loss"], abs=1e-5)
    assert set(learner().gradient([0, 1])) == {"loss", "tokens"}


# KTO ------------------------------------------------------------------------------------------


def test_mismatched_completions_go_round_the_batch() -> None:
    groups = [PromptGroup([i], [[10 + i], [20 + i]]) for i in range(3)]
    found = [(group.prompt_ids, group.completions) for group in mismatched(groups)]
    assert found == [([0], [[11], [21]]), ([1], [[12], [22]]), ([2], [[10], [20]])]
    assert mismatched(groups[:1]) == []


@pytest.mark.parametrize("budget", [1, 100_000])
def test_kto_reference_point_is_that_of_the_whole_batch(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path, budget: int
) -> None:
    """z = max(0, mean log-ratio of the ten completions behind the prompt before their own)."""
    settings = {
        "policy__algorithm": "kto",
        "preference__micro_batch_tokens": budget,
        "preference__beta": 1.0,
        "preference__desirable_weight": 2.0,
    }
    ctx = context(make_context, ten_rows, tmp_path, **settings)
    role, data, reference, learner = opened(ctx)
    frozen = Foundation.open(ctx.recipe).role("reference", train=False)
    rows = planned_batches(10, ctx.recipe.policy.preference, 0)[0]
    ratios = []
    for place, row in enumerate(rows):
        prompt = data["train"].groups[row].prompt_ids
        for ids in data["train"].groups[rows[(place + 1) % 5]].completions:
            ratios.append(alone(role, prompt, ids) - alone(frozen, prompt, ids))
    mean = sum(ratios) / 10
    assert abs(mean) > 1e-2
    assert learner().gradient(rows)["reference_point"] == pytest.approx(max(0.0, mean), abs=1e-4)
    # The reference moved down by more than the mean, z must be positive.
    moved = {key: part - 2 * abs(mean) for key, part in reference.mismatched.items()}
    low = PairReference(reference.train, reference.validation, moved)
    lower = PairLearner(ctx, LOSSES["kto"], role, 0, data, low).gradient(rows)
    assert lower["reference_point"] == pytest.approx(mean + 2 * abs(mean), abs=1e-4)
    without = PairLearner(
        ctx, LOSSES["kto"], role, 0, data, PairReference(reference.train, reference.validation)
    ).gradient(rows)
    assert without["reference_point"] == 0.0
    assert lower["loss"] != pytest.approx(without["loss"], abs=1e-4)


# Runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "dtype"), [(True, "fp32"), (True, "bf16"), (False, "fp32")])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_first_step_sees_policy_and_reference_alike(
    name: str, lora: bool, dtype: str, make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """DPO's loss is log 2 then, KTO's (with weights 1) is 1/2."""
    settings = {"policy__algorithm": name, "lora__enabled": lora, "model__dtype": dtype}
    ctx = context(make_context, ten_rows, tmp_path, **settings)
    section = off_policy.run(ctx)
    first = next(iter(read_jsonl(ctx.log.metrics_path)))
    expected = math.log(2) if name == "dpo" else 0.5
    assert first["policy/loss"] == pytest.approx(expected, abs=1e-6)
    assert first["policy/log_ratio"] == 0.0
    assert first["policy/accuracy"] == 0.5
    assert section["updates"] == 4
    assert section["kl_last"] is None


@pytest.mark.parametrize("error", [1e-4, -1e-4, math.inf])
def test_a_reference_of_other_weights_is_refused(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path, error: float
) -> None:
    ctx = context(make_context, ten_rows, tmp_path)
    _, _, reference, _ = opened(ctx)
    tensors = {"train": reference.train + error, "validation": reference.validation}
    save_checkpoint(ctx.out / "checkpoints" / "reference", {"logprobs": tensors}, {})
    with pytest.raises(NumericsError, match="before the first step"):
        off_policy.run(ctx)


@pytest.mark.parametrize("name", EVERY)
def test_ten_pairs_are_learnt(
    name: str, make_context: MakeContext, ten_rows: Rows, lively: Path, tmp_path: Path
) -> None:
    """Every training pair ends up on its right side; about half of them were by chance."""
    settings = {
        "policy__algorithm": name,
        "base": lively,
        "lora__enabled": False,
        "preference__epochs": 20.0,
        "preference__learning_rate": 5e-3,
        "preference__beta": 1.0,
        "prompts": name in ("dpo", "simpo"),
    }
    ctx = context(make_context, ten_rows, tmp_path, **settings)
    section = off_policy.run(ctx)
    assert section["accuracy_first"] < 0.9
    assert section["accuracy_last"] == 1.0
    assert section["loss_last"] < section["loss_first"]
    assert section["episodes"] is None
    assert (ctx.folder.models / "tuned" / "model.safetensors").is_file()
    if settings["prompts"]:
        assert section["kl_last"] > 0.01
        assert 1 <= section["completion_tokens_mean"] <= 8
        assert len(list(read_jsonl(ctx.log.samples_path))) == 10


def test_lora_learns_too_and_the_exported_model_is_the_policy(
    make_context: MakeContext, ten_rows: Rows, lively: Path, tmp_path: Path
) -> None:
    settings = {
        "base": lively,
        "lora__rank": 16,
        "preference__epochs": 30.0,
        "preference__learning_rate": 3e-2,
    }
    ctx = context(make_context, ten_rows, tmp_path, prompts=True, **settings)
    section = off_policy.run(ctx)
    assert section["accuracy_last"] == 1.0
    assert (ctx.folder.models / "tuned" / "adapter").is_dir()
    full = context(
        make_context,
        ten_rows,
        tmp_path,
        base=ctx.folder.models / "tuned",
        lora__enabled=False,
    )
    tuned = Foundation.open(full.recipe).role("policy")
    start = Foundation.open(ctx.recipe).role("reference", train=False)
    data = open_pairs(ctx, Foundation.open(ctx.recipe).renderer, "train", ties=True)
    margins = []
    for group in data.groups:
        ratios = [
            alone(tuned, group.prompt_ids, ids) - alone(start, group.prompt_ids, ids)
            for ids in group.completions
        ]
        margins.append(ratios[0] - ratios[1])
    assert min(margins) > 0


@pytest.mark.parametrize(("name", "lora"), [("dpo", True), ("dpo", False), ("kto", True)])
def test_a_resumed_stage_gives_the_same_bytes(
    name: str,
    lora: bool,
    make_context: MakeContext,
    ten_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the second pass; the reference's log-probabilities are not computed again."""
    settings = {
        "policy__algorithm": name,
        "lora__enabled": lora,
        "preference__epochs": 3.0,
        "preference__evaluations": 4,
        "preference__batch_size": 4,
        "prompts": True,
    }
    whole = context(make_context, ten_rows, tmp_path / "whole", **settings)
    section = off_policy.run(whole)
    part = context(make_context, ten_rows, tmp_path / "part", stop_after=4, **settings)
    assert off_policy.run(part)["updates"] == 4

    def never(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(pair_reference, "_measure", never)
    rest = context(make_context, ten_rows, tmp_path / "part", **settings)
    assert off_policy.run(rest) == section
    files = [ctx.folder.models / "tuned" / "model.safetensors" for ctx in (whole, rest)]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [
        [
            {k: v for k, v in row.items() if k != "wall_s"}
            for row in read_jsonl(ctx.log.metrics_path)
        ]
        for ctx in (whole, rest)
    ]
    assert metrics[0] == metrics[1]


def test_reference_is_of_the_sft_model(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    from amenable.models.export import export_policy

    ctx = context(make_context, ten_rows, tmp_path)
    foundation = Foundation.open(ctx.recipe)
    sft = foundation.role("sft")
    shake(sft)
    export_policy(sft.model, foundation.tokenizer, ctx.folder.models / "sft", sft.adapter)
    off_policy.run(ctx)
    first = next(iter(read_jsonl(ctx.log.metrics_path)))
    assert first["policy/log_ratio"] == 0.0
    saved = load_checkpoint(ctx.out / "checkpoints" / "reference", print)
    assert saved is not None
    data = open_pairs(ctx, foundation.renderer, "train", ties=True)
    expected = [alone(sft, data.groups[3].prompt_ids, ids) for ids in data.groups[3].completions]
    assert saved[0]["logprobs"]["train"][3].tolist() == pytest.approx(expected, abs=1e-4)


def test_swapped_files_train_the_same_model(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """Candidates in the other order with the other choice; ties among them."""
    sections = []
    for side in ("as", "swapped"):
        ctx = context(make_context, ten_rows, tmp_path / side, ties=(2, 5))
        for split in ("train", "validation"):
            path = ctx.folder.data / f"preferences.{split}.jsonl"
            rows = list(read_jsonl(path))
            if side == "swapped":
                rows = [
                    {
                        **row,
                        "candidate_0": row["candidate_1"],
                        "candidate_1": row["candidate_0"],
                        "choice": {0: 1, 1: 0}.get(row["choice"], "tie"),
                    }
                    for row in rows
                ]
            write_jsonl(path, rows)
        sections.append(off_policy.run(ctx))
    for key in ("loss_first", "loss_last", "accuracy_last"):
        assert sections[0][key] == pytest.approx(sections[1][key], abs=1e-4)


@pytest.mark.parametrize("name", ["kto", "simpo", "orpo"])
def test_ties_are_left_out_and_counted(
    name: str, make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    settings = {"policy__algorithm": name, "ties": (0, 4, 7)}
    ctx = context(make_context, ten_rows, tmp_path, **settings)
    section = off_policy.run(ctx)
    assert (section["pairs"], section["ties_left_out"]) == (7, 3)
    stream = ctx.progress._stream
    assert isinstance(stream, io.StringIO)
    assert f"3 ties left out: {name}" in stream.getvalue()
    none = context(make_context, ten_rows, tmp_path / "none", **{**settings, "ties": range(10)})
    with pytest.raises(DataError, match="every pair is a tie"):
        off_policy.run(none)


@pytest.mark.parametrize(("name", "lora"), [("dpo", True), ("dpo", False), ("orpo", True)])
def test_the_numerics_gate_comes_first(
    name: str, lora: bool, make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """It leaves no trace in what is trained, and is not run again when a run goes on."""
    settings = {"policy__algorithm": name, "lora__enabled": lora, "prompts": True}
    plain = context(make_context, ten_rows, tmp_path / "plain", **settings)
    section = off_policy.run(plain)
    assert not (plain.out / "gate.json").exists()
    gated = context(make_context, ten_rows, tmp_path / "gated", policy__gate=True, **settings)
    assert off_policy.run(gated) == section
    found = read_json(gated.out / "gate.json")["checks"]
    assert found["reference"]["holds"]
    assert all(check["holds"] for check in found.values())
    (gated.out / "gate.json").unlink()
    off_policy.run(gated)
    assert not (gated.out / "gate.json").exists()


class Hurried(Deadline):
    """Little time is left, and never none."""

    def remaining_s(self) -> float:
        return 0.0

    def exceeded(self) -> bool:
        return False


@pytest.mark.parametrize(("name", "lora"), [("dpo", True), ("kto", True), ("kto", False)])
def test_without_time_the_reference_is_measured_along_the_way(
    name: str, lora: bool, make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """The figures are the same: a pair is measured where it is first trained on, in any case."""
    settings = {"policy__algorithm": name, "lora__enabled": lora, "preference__beta": 1.0}
    before = context(make_context, ten_rows, tmp_path / "before", **settings)
    along = context(make_context, ten_rows, tmp_path / "along", **settings)
    along = dataclasses.replace(along, deadline=Hurried())
    assert off_policy.run(before) == off_policy.run(along)
    saved = load_checkpoint(along.out / "checkpoints" / "reference", print)
    assert saved is not None
    assert bool(saved[0]["logprobs"]["train"].isnan().all())
    if name == "kto":
        assert bool(saved[0]["logprobs"]["mismatched"].isnan().all())
    first, second = (list(read_jsonl(ctx.log.metrics_path)) for ctx in (before, along))
    for row in (*first, *second):
        del row["wall_s"]
    assert first == second


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_damaged_reference_is_measured_again(
    name: str, make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    settings = {"policy__algorithm": name, "preference__beta": 1.0}
    whole = context(make_context, ten_rows, tmp_path / "whole", **settings)
    section = off_policy.run(whole)
    part = context(make_context, ten_rows, tmp_path / "part", stop_after=2, **settings)
    off_policy.run(part)
    file = part.out / "checkpoints" / "reference" / "logprobs.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    rest = context(make_context, ten_rows, tmp_path / "part", **settings)
    assert off_policy.run(rest) == section
    assert "reference is damaged and is not used: logprobs.safetensors has" in said(rest)
    saved = [load_checkpoint(ctx.out / "checkpoints" / "reference", print) for ctx in (rest, whole)]
    assert all(one is not None for one in saved)
    found, expected = (one[0]["logprobs"] for one in saved if one is not None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_rows_that_no_step_sees_are_not_measured(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    ctx = context(make_context, ten_rows, tmp_path, preference__max_steps=1)
    section = off_policy.run(ctx)
    assert section["updates"] == 1
    saved = load_checkpoint(ctx.out / "checkpoints" / "reference", print)
    assert saved is not None
    assert int(saved[0]["logprobs"]["train"].isnan().all(1).sum()) == 5
