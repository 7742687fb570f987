from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from amenable.artifacts import StageContext, read_json, read_jsonl, write_jsonl
from amenable.config.collect import CollectConfig
from amenable.data.annotator import SimulatedAnnotator
from amenable.data.reading.readers import read_prompts
from amenable.evaluate import stage
from amenable.models.build import Foundation
from amenable.models.export import export_policy, export_reward
from amenable.models.heads import ScalarHead

MakeContext = Callable[..., StageContext]


def shaken(foundation: Foundation, name: str, seed: int, head: ScalarHead | None = None) -> Any:
    role = foundation.role(name, head=head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return role


@pytest.fixture
def ctx(make_context: MakeContext, ten_rows: list[dict[str, str]]) -> StageContext:
    made = make_context(
        "evaluate",
        collect__annotator="simulated",
        data__instruction="Say.",
        evaluate__diversity_prompts=4,
        evaluate__batch_size=4,
    )
    rows = [{"id": f"t{i}", "group": str(i), **row} for i, row in enumerate(ten_rows)]
    write_jsonl(made.folder.data / "prompts.test.jsonl", rows)
    return made


def export(ctx: StageContext, name: str, seed: int) -> None:
    foundation = Foundation.open(ctx.recipe)
    role = shaken(foundation, name, seed)
    export_policy(role.model, foundation.tokenizer, ctx.folder.models / name, role.adapter)


def add_reward(ctx: StageContext) -> None:
    foundation = Foundation.open(ctx.recipe)
    role = shaken(foundation, "reward", 5, ScalarHead(64, seed=1))
    out = ctx.folder.models / "reward"
    export_reward(role.model, role.scalar_head, foundation.tokenizer, out, role.adapter, 0.5)


def test_completions_are_those_of_the_exported_folders(ctx: StageContext) -> None:
    """Plain transformers at batch size 1 says the same, greedily."""
    export(ctx, "tuned", 2)
    stage.run(ctx)
    rows = list(read_jsonl(ctx.out / "completions.jsonl"))
    renderer = Foundation.open(ctx.recipe).renderer
    model = AutoModelForCausalLM.from_pretrained(ctx.folder.models / "tuned").eval()
    prompts = read_prompts([ctx.folder.data / "prompts.test.jsonl"])
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([renderer.prompt_ids(prompt)])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        answer = output[0, ids.shape[1] :].tolist()
        assert row["completions"]["tuned"] == renderer.completion_text(answer)
        assert row["tokens"]["tuned"] == len(answer)
        assert row["ended"]["tuned"] == (answer[-1] == 2)
        assert set(row["completions"]) == {"base", "tuned"}, "no SFT model, so no SFT answers"
        assert row["reference"] == prompt.meta["output_text"]
    assert any(row["completions"]["base"] != row["completions"]["tuned"] for row in rows)


def test_scores_are_the_annotators_formula_and_the_centred_reward(ctx: StageContext) -> None:
    export(ctx, "sft", 1)
    export(ctx, "tuned", 2)
    add_reward(ctx)
    section = stage.run(ctx)
    judged = [(row["a"], row["b"], row["judge"]) for row in section]
    pairs = [("base", "sft"), ("base", "tuned"), ("sft", "tuned")]
    assert judged == [(*pair, judge) for judge in ("annotator", "reward_model") for pair in pairs]
    rows = list(read_jsonl(ctx.out / "completions.jsonl"))
    annotator = SimulatedAnnotator(CollectConfig(), seed=0)
    prompts = read_prompts([ctx.folder.data / "prompts.test.jsonl"])
    model = AutoModelForSequenceClassification.from_pretrained(ctx.folder.models / "reward").eval()
    foundation = Foundation.open(ctx.recipe)
    renderer, base = foundation.renderer, AutoModelForCausalLM.from_pretrained(foundation.source)
    for prompt, row in zip(prompts, rows, strict=True):
        for name in ("base", "sft", "tuned"):
            text = row["completions"][name]
            assert row["scores"]["annotator"][name] == annotator.score(prompt, text)
        ids = renderer.prompt_ids(prompt)
        whole = base.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=8,
            do_sample=False,
        )
        with torch.no_grad():
            raw = model(whole, attention_mask=torch.ones_like(whole)).logits.item()
        assert row["scores"]["reward_model"]["base"] == pytest.approx(raw - 0.5, abs=1e-4)
    for entry in section:
        a, b = ([row["scores"][entry["judge"]][entry[side]] for row in rows] for side in ("a", "b"))
        texts = [[row["completions"][entry[side]] for row in rows] for side in ("a", "b")]
        wins = sum(y > x and s != t for x, y, s, t in zip(a, b, *texts, strict=True))
        assert (entry["wins"], entry["prompts"]) == (wins, 10)
    diversity = read_json(ctx.out / "diversity.json")
    assert set(diversity["systems"]) == {"sft", "tuned"}
    assert diversity["prompts"] == 4


def test_equal_models_tie_everywhere(ctx: StageContext) -> None:
    export(ctx, "sft", 3)
    export(ctx, "tuned", 3)
    add_reward(ctx)
    entries = [e for e in stage.run(ctx) if (e["a"], e["b"]) == ("sft", "tuned")]
    assert len(entries) == 2
    for entry in entries:
        assert (entry["ties"], entry["win_rate"]) == (10, 0.5)


def test_without_annotator_and_reward_there_is_no_judge(
    make_context: MakeContext, ctx: StageContext
) -> None:
    export(ctx, "tuned", 2)
    assert stage.run(make_context("evaluate")) == []
    (row, *_) = read_jsonl(ctx.out / "completions.jsonl")
    assert row["scores"] == {}


def test_a_short_time_budget_leaves_prompts_out_for_every_system(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time at all: one batch of four is answered, by both systems, and this is said."""
    export(ctx, "tuned", 2)
    monkeypatch.setattr(ctx.deadline, "remaining_s", lambda: 0.0)
    section = stage.run(ctx)
    assert {entry["prompts"] for entry in section} == {4}
    rows = list(read_jsonl(ctx.out / "completions.jsonl"))
    assert [set(row["completions"]) for row in rows] == [{"base", "tuned"}] * 4
    assert "time allows 4 of 10 prompts" in ctx.progress._stream.getvalue()  # type: ignore[union-attr]
