from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from amenable.artifacts import StageContext
from amenable.data.collate import GroupBatch, PromptGroup, collate
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import ModelError, RecipeError, StageError
from amenable.models.build import Foundation
from amenable.models.export import export_reward
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role
from amenable.rollout.rewards import (
    FolderReward,
    FunctionReward,
    RoleReward,
    ready_reward,
    score_groups,
)

MakeContext = Callable[..., StageContext]
TEXTS = ["Yes.", "The river", "It is wet, very wet.", "No"]
PROMPTS = [
    Prompt(messages=(Message(Speaker.USER, text),), id=text, group=text, meta={"length": len(text)})
    for text in ("Is it?", "Is it?", "What of the rain?", "Open the file.")
]
BATCH = collate([PromptGroup([1], [[2]])], pad_id=0)
LIMITS = {"max_prompt_tokens": 64, "max_completion_tokens": 32}


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], FunctionReward]:
    """A reward from a function, put on the Python path as `my_reward:score`."""

    def make(score: Callable[..., Any]) -> FunctionReward:
        module = types.ModuleType("my_reward")
        module.score = score  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_reward", module)
        return FunctionReward("my_reward:score")

    return make


def scored(reward: FunctionReward, count: int = 4) -> torch.Tensor:
    return reward.score(BATCH, PROMPTS[:count], TEXTS[:count]).scores


def test_function_is_given_texts_and_extra_keys(function: Callable[..., FunctionReward]) -> None:
    seen: dict[str, Any] = {}

    def score(**given: Any) -> Sequence[float]:
        seen.update(given)
        return [0.5, -1, 2, 3.25]

    scores = scored(function(score))
    assert scores.tolist() == [0.5, -1.0, 2.0, 3.25]
    assert scores.dtype is torch.float32
    assert seen == {
        "prompts": ["Is it?", "Is it?", "What of the rain?", "Open the file."],
        "completions": TEXTS,
        "rows": [{"length": 6}, {"length": 6}, {"length": 17}, {"length": 14}],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], r"each of the 4 completions; it returned 2 with 0 not finite"),
        ([1.0, float("nan"), 2.0, float("inf")], "it returned 4 with 2 not finite"),
        (None, "must return a list of numbers; it returned NoneType"),
        (["a", "b", "c", "d"], "must return a list of numbers; it returned list"),
    ],
)
def test_wrong_answers_of_a_function_are_refused(
    function: Callable[..., FunctionReward], given: Any, message: str
) -> None:
    with pytest.raises(StageError, match=message):
        scored(function(lambda **_: given))


@pytest.mark.parametrize("path", ["no_such_module:score", "math:no_such_function"])
def test_a_function_that_cannot_be_imported_is_refused(path: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be imported .* must name module:function"):
        ready_reward(path, **LIMITS)


def trained_role(foundation: Foundation) -> Role:
    """A reward model whose adapter says something."""
    role = foundation.role("reward", head=ScalarHead(64, seed=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in role.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return role


def groups_of(foundation: Foundation) -> list[PromptGroup]:
    ids = foundation.renderer.completion_ids
    return [
        PromptGroup(foundation.renderer.prompt_ids(PROMPTS[0]), [ids(TEXTS[0]), ids(TEXTS[1])]),
        PromptGroup(foundation.renderer.prompt_ids(PROMPTS[2]), [ids(TEXTS[2])]),
        PromptGroup(foundation.renderer.prompt_ids(PROMPTS[3]), [ids(TEXTS[3])]),
    ]


@pytest.fixture
def foundation(make_context: MakeContext) -> Foundation:
    return Foundation.open(make_context("policy", data__max_completion_tokens=32).recipe)


def test_exported_folder_scores_like_the_role(foundation: Foundation, tmp_path: Path) -> None:
    role = trained_role(foundation)
    out = tmp_path / "reward"
    export_reward(role.model, role.scalar_head, foundation.tokenizer, out, role.adapter, 0.75)
    batch: GroupBatch = collate(groups_of(foundation), foundation.renderer.pad_id)
    ours = RoleReward(role, 0.75).score(batch, PROMPTS, TEXTS)
    folder = ready_reward(str(out), **LIMITS)
    theirs = folder.score(batch, PROMPTS, TEXTS)
    assert isinstance(folder, FolderReward)
    torch.testing.assert_close(theirs.scores, ours.scores, rtol=1e-4, atol=1e-4)
    assert theirs.states is None
    assert ours.states is not None
    assert ours.scores.std() > 0.01, "the texts must be told apart"
    raw = RoleReward(role, 0.0).score(batch, PROMPTS, TEXTS).scores
    torch.testing.assert_close(ours.scores, raw - 0.75)


def test_states_are_those_the_score_was_read_from(foundation: Foundation) -> None:
    role = trained_role(foundation)
    batch = collate(groups_of(foundation), foundation.renderer.pad_id)
    found = RoleReward(role, 0.0).score(batch, PROMPTS, TEXTS)
    assert found.states is not None
    expected = (found.states.last * role.scalar_head.weight.detach()[0]).sum(-1)
    torch.testing.assert_close(found.scores, expected)
    assert len(found.states.before) == int(batch.mask.sum())


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"no reward model that loads as a sequence classifier"):
        ready_reward(str(tmp_path), **LIMITS)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path, tiny: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gives 3 numbers a text; a reward model gives one"):
        ready_reward(str(tmp_path), **LIMITS)


def test_scores_come_in_the_order_of_the_groups(foundation: Foundation) -> None:
    """Whatever the micro-batches, which put the longest rows first."""
    role = trained_role(foundation)
    groups = groups_of(foundation)
    alone = [
        role.scores(collate([PromptGroup(group.prompt_ids, [ids])], 0)).item()
        for group in groups
        for ids in group.completions
    ]
    for budget in (1, 60, 10_000):
        found = score_groups(role, groups, 0, micro_batch_tokens=budget)
        torch.testing.assert_close(found, torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_finite_stop_the_run(foundation: Foundation) -> None:
    role = trained_role(foundation)
    role.scalar_head.weight.data[0, 0] = float("nan")
    with pytest.raises(StageError, match="not finite; train it again"):
        score_groups(role, groups_of(foundation), 0, micro_batch_tokens=100)
