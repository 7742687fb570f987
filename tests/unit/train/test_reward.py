from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from amenable.artifacts import StageContext, read_json, read_jsonl, write_jsonl
from amenable.config.reward import RewardConfig
from amenable.data.collate import PromptGroup, collate
from amenable.data.reading.readers import read_preferences
from amenable.data.row_file import open_preferences
from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker
from amenable.data.tokens.cache import TokenGroups
from amenable.models.build import Foundation
from amenable.models.export import load_reward_head
from amenable.models.heads import HeadEnsemble, ScalarHead
from amenable.models.roles import Role
from amenable.train import reward
from amenable.train.rank_loss import PLAIN
from amenable.train.reward import (
    pair_losses,
    pair_margins,
    preference_group,
    reward_gradient,
)

MakeContext = Callable[..., StageContext]
Rows = list[dict[str, Any]]
PROMPT = Prompt(messages=(Message(Speaker.USER, "Is it wet?"),), id="p", group="p")


def pair(choice: Choice = Choice.FIRST, **changes: Any) -> Preference:
    texts = {"candidate_0": "Yes.", "candidate_1": "It is not."}
    return Preference(prompt=PROMPT, choice=choice, **{**texts, **changes})


def test_rank_losses_by_hand() -> None:
    """log(1 + e^-gap), gap less the margin, times the weight; a tie is 0.5 of both signs.

    Gaps 2, 0 and 1: 0.12693, log 2 and, with margin 1, log 2 again; weight 3 triples; a tie with
    gap 2 costs (0.12693 + 2.12693) / 2 = 1.12693.
    """
    scores = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0], [2.0, 0.0], [1.0, -1.0]])
    rows = [
        pair(),
        pair(),
        pair(margin=1.0),
        pair(weight=3.0),
        pair(Choice.TIE),
    ]
    small = math.log1p(math.exp(-2.0))
    expected = [small, math.log(2), math.log(2), 3 * small, small + 1.0]
    assert PLAIN(scores, rows).tolist() == pytest.approx(expected, abs=1e-5)


def context(make_context: MakeContext, rows: Rows, root: Path, **changes: Any) -> StageContext:
    """Ten pairs in which the row's own answer beats the next row's, on either side."""
    ctx = make_context("reward", root=root, **{"reward__epochs": 20.0, **changes})
    texts = [row["output_text"] for row in rows]
    pairs = []
    for i, row in enumerate(rows):
        sides = [texts[i], texts[i - 1]]
        choice = i % 2
        sides = sides[::-1] if choice else sides
        pairs.append(
            {
                "id": f"pair{i}",
                "group": str(i),
                "input_text": row["input_text"],
                "candidate_0": sides[0],
                "candidate_1": sides[1],
                "choice": choice,
            }
        )
    for split, part in (("train", pairs), ("validation", pairs[:4]), ("test", pairs[4:])):
        write_jsonl(ctx.folder.data / f"preferences.{split}.jsonl", part)
    return ctx


def opened(ctx: StageContext) -> tuple[Foundation, Role, list[Preference], list[PromptGroup]]:
    foundation = Foundation.open(ctx.recipe)
    rows = read_preferences([ctx.folder.data / "preferences.train.jsonl"])
    groups = [preference_group(foundation.renderer, row) for row in rows]
    return foundation, foundation.role("reward", head=ScalarHead(64, seed=2)), rows, groups


def test_the_chosen_candidate_comes_first(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    foundation, _, rows, groups = opened(context(make_context, ten_rows, tmp_path))
    assert {row.choice for row in rows} == {Choice.FIRST, Choice.SECOND}
    for row, group in zip(ten_rows, groups, strict=True):
        assert foundation.renderer.completion_text(group.completions[0]) == row["output_text"]


def gradients(
    role: Role, groups: list[PromptGroup], rows: list[Preference], budget: int
) -> tuple[dict[str, float], list[torch.Tensor]]:
    for parameter in role.trainable_parameters():
        parameter.grad = None
    metrics = reward_gradient(role, groups, rows, 0, budget)
    return metrics, [p.grad.clone() for p in role.trainable_parameters() if p.grad is not None]


def test_eight_times_one_equals_one_times_eight(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """With weights and a tie, which change the denominators of the mean and of the accuracy."""
    ctx = context(make_context, ten_rows, tmp_path)
    _, role, rows, groups = opened(ctx)
    rows = [
        *rows[:5],
        *(pair(weight=2.5) for _ in range(2)),
        pair(Choice.TIE),
    ]
    whole, one = gradients(role, groups[:8], rows, 100_000)
    single, many = gradients(role, groups[:8], rows, 1)
    assert whole == pytest.approx(single, abs=1e-5)
    assert len(one) == len(many) > 1
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_metrics_by_hand(make_context: MakeContext, ten_rows: Rows, tmp_path: Path) -> None:
    ctx = context(make_context, ten_rows, tmp_path)
    _, role, rows, groups = opened(ctx)
    gaps = []
    for group in groups:
        alone = [
            role.scores(collate([PromptGroup(group.prompt_ids, [ids])], 0)).item()
            for ids in group.completions
        ]
        gaps.append(alone[0] - alone[1])
    losses = [math.log1p(math.exp(-gap)) for gap in gaps]
    metrics = reward_gradient(role, groups, rows, 0, 500)
    assert metrics["rank_loss"] == pytest.approx(sum(losses) / 10, abs=1e-4)
    assert metrics["margin"] == pytest.approx(sum(gaps) / 10, abs=1e-4)
    assert metrics["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 10)
    renderer = Foundation.open(ctx.recipe).renderer
    assert pair_losses(role, renderer, rows, 500) == pytest.approx(
        (metrics["rank_loss"], metrics["accuracy"]), abs=1e-4
    )
    assert pair_margins(role, renderer, rows, 500).tolist() == pytest.approx(gaps, abs=1e-4)


def test_groups_that_are_given_are_those_that_are_scored(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """No groups are not groups that are not known: nothing is tokenized in their place."""
    _, role, rows, groups = opened(context(make_context, ten_rows, tmp_path))
    renderer = Foundation.open(context(make_context, ten_rows, tmp_path).recipe).renderer
    none = TokenGroups(np.zeros(0, np.int32), np.zeros(1, np.int64), 3)
    assert pair_margins(role, renderer, rows, 500, none).shape == (0,)
    known = pair_margins(role, renderer, rows, 500, groups[:2])
    assert known.tolist() == pair_margins(role, renderer, rows[:2], 500).tolist()


@pytest.mark.parametrize("lora", [True, False])
def test_ten_pairs_are_learnt_and_scores_are_centred(
    make_context: MakeContext, ten_rows: Rows, lively: Path, tmp_path: Path, lora: bool
) -> None:
    """Loss from about log 2 to less than 0.1, every held-out pair (seen in training) right; and
    the mean score of the demonstrations, by plain transformers, is the offset."""
    rate = 2e-2 if lora else 3e-3
    settings = {"base": lively, "lora__enabled": lora, "reward__learning_rate": rate}
    ctx = context(make_context, ten_rows, tmp_path, **settings)
    demonstrations = [{"id": f"d{i}", "group": str(i), **row} for i, row in enumerate(ten_rows[:6])]
    write_jsonl(ctx.folder.data / "demonstrations.train.jsonl", demonstrations)
    section = reward.run(ctx)
    losses = [
        row["reward/rank_loss"]
        for row in read_jsonl(ctx.log.metrics_path)
        if "reward/rank_loss" in row
    ]
    assert losses[0] > 0.4
    assert losses[-1] < 0.1
    assert section["accuracy"] == 1.0
    out = ctx.folder.models / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    renderer = Foundation.open(ctx.recipe).renderer
    scores = []
    for row in demonstrations:
        prompt = Prompt(
            messages=(Message(Speaker.USER, str(row["input_text"])),), id="d", group="d"
        )
        ids = renderer.prompt_ids(prompt) + renderer.completion_ids(str(row["output_text"]))
        with torch.no_grad():
            scores.append(model(torch.tensor([ids])).logits.item())
    assert section["reward_offset"] == pytest.approx(sum(scores) / 6, abs=1e-3)
    assert model.config.reward_offset == section["reward_offset"]
    assert not hasattr(model.config, "reward_temperature"), "none fits where every pair is right"
    assert read_json(ctx.out / "report.json")["reward_offset"] == section["reward_offset"]
    assert (out / "adapter").is_dir() == lora


def test_a_rows_weight_weighs_its_loss_and_its_gradient(
    make_context: MakeContext, ten_rows: Rows, lively: Path, tmp_path: Path
) -> None:
    """Mean of 0.6 and 0.2 shares: (0.6 l_0 + 0.2 l_1) / 0.8, and so with the gradients."""
    ctx = context(make_context, ten_rows, tmp_path, base=lively)
    path = ctx.folder.data / "preferences.train.jsonl"
    plain = list(read_jsonl(path))
    weights = {"pair0": 0.6, "pair1": 0.2}
    write_jsonl(path, [row | {"weight": weights.get(row["id"], 1.0)} for row in plain])
    foundation, role, _, groups = opened(ctx)
    rows = open_preferences(path)[:2]
    alone = [gradients(role, groups[n : n + 1], [pair()], 500) for n in range(2)]
    both, found = gradients(role, groups[:2], list(rows), 500)
    losses = [metrics["rank_loss"] for metrics, _ in alone]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    expected = (0.6 * losses[0] + 0.2 * losses[1]) / 0.8
    assert both["rank_loss"] == pytest.approx(expected, rel=1e-5)
    for got, first, second in zip(found, alone[0][1], alone[1][1], strict=True):
        torch.testing.assert_close(got, (0.6 * first + 0.2 * second) / 0.8, rtol=1e-4, atol=1e-6)
    loss, _ = pair_losses(role, foundation.renderer, rows, 500, groups[:2])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_without_demonstrations_chosen_candidates_are_the_zero(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    """Without an optimizer step that moves anything the scores are those of the fresh head."""
    ctx = context(make_context, ten_rows, tmp_path, reward__learning_rate=0.0, reward__epochs=1.0)
    section = reward.run(ctx)
    foundation = Foundation.open(ctx.recipe)
    _, _, _, groups = opened(ctx)
    role = foundation.role("reward", head=ScalarHead(64, seed=0))
    scores = [
        role.scores(collate([PromptGroup(group.prompt_ids, [group.completions[0]])], 0)).item()
        for group in groups
    ]
    assert section["reward_offset"] == pytest.approx(sum(scores) / 10, abs=1e-4)
    assert section["accuracy"] < 1
    config = read_json(ctx.folder.models / "reward" / "config.json")
    assert config["reward_temperature"] == section["temperature"]


def test_a_resumed_stage_gives_the_same_bytes(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    settings = {"reward__epochs": 2.0, "reward__evaluations": 4}
    whole = context(make_context, ten_rows, tmp_path / "whole", **settings)
    section = reward.run(whole)
    reward.run(context(make_context, ten_rows, tmp_path / "part", stop_after=3, **settings))
    rest = context(make_context, ten_rows, tmp_path / "part", **settings)
    assert reward.run(rest) == section
    for name in ("model.safetensors", "head.safetensors"):
        files = [ctx.folder.models / "reward" / name for ctx in (whole, rest)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_reward_model_starts_from_the_sft_model(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    from amenable.models.export import export_policy

    ctx = context(make_context, ten_rows, tmp_path)
    foundation = Foundation.open(ctx.recipe)
    sft = foundation.role("sft")
    with torch.no_grad():
        for parameter in sft.trainable_parameters():
            parameter.add_(0.05)
    _, _, _, groups = opened(ctx)
    batch = collate(groups[:2], 0)
    fresh = reward.reward_role(ctx, Foundation.open(ctx.recipe))
    export_policy(sft.model, foundation.tokenizer, ctx.folder.models / "sft", sft.adapter)
    started = reward.reward_role(ctx, Foundation.open(ctx.recipe))
    with torch.no_grad():
        torch.testing.assert_close(started.states(batch).last, sft.states(batch).last)
        assert (fresh.states(batch).last - sft.states(batch).last).abs().max() > 1e-3


@pytest.mark.parametrize("ties", ["rao-kupper", "davidson"])
def test_ten_pairs_are_learnt_by_an_ensemble(
    make_context: MakeContext, ten_rows: Rows, lively: Path, tmp_path: Path, ties: str
) -> None:
    """Three heads, each on a bootstrap, with a model of ties, smoothing and centring."""
    ctx = context(
        make_context,
        ten_rows,
        tmp_path / "run",
        base=lively,
        reward__heads=3,
        reward__ties=ties,
        reward__label_smoothing=0.05,
        reward__centring_coef=0.01,
        reward__learning_rate=2e-2,
    )
    report = reward.run(ctx)
    losses = [
        row["reward/rank_loss"]
        for row in read_jsonl(ctx.log.metrics_path)
        if "reward/rank_loss" in row
    ]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert report["disagreement"] > 0
    head, _ = load_reward_head(ctx.folder.models / "reward")
    assert isinstance(head, HeadEnsemble)
    assert head.weight.shape[0] == 3
    plain = AutoModelForSequenceClassification.from_pretrained(ctx.folder.models / "reward")
    torch.testing.assert_close(plain.score.weight, head.mean_weight.detach())


def test_the_rate_falls_to_nothing_within_one_epoch_by_default(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    ctx = context(make_context, ten_rows, tmp_path / "run", reward__epochs=RewardConfig().epochs)
    reward.run(ctx)
    rates = [
        row["reward/learning_rate"]
        for row in read_jsonl(ctx.log.metrics_path)
        if "reward/learning_rate" in row
    ]
    assert len(rates) == 2, "ten pairs, five a step"
    assert rates[-1] == pytest.approx(RewardConfig().learning_rate / 2)
    modules = Foundation.open(ctx.recipe).role("reward", head=ScalarHead(64)).model.modules()
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in modules)


def test_a_row_whose_loss_is_not_finite_is_named(
    make_context: MakeContext, ten_rows: Rows, tmp_path: Path
) -> None:
    _, role, rows, groups = opened(context(make_context, ten_rows, tmp_path))
    role.scalar_head.weight.data[0, 0] = math.nan
    said: list[str] = []
    reward_gradient(role, groups[:1], rows[:1], 0, 500, say=said.append)
    assert said == [f"reward: loss is not finite: row {rows[0].prompt.id!r}"]
