from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amenable.artifacts import StageContext
from amenable.config.policy import PolicyConfig
from amenable.data.collate import GroupBatch, PromptGroup, collate
from amenable.errors import StageError
from amenable.models.build import Foundation
from amenable.models.export import export_reward
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role
from amenable.rollout.rewards import Normaliser, OwnReward, open_rewards, score_groups

from .samples import PROMPTS, TEXTS

MakeContext = Callable[..., StageContext]
LIMITS = {"max_prompt_tokens": 64, "max_completion_tokens": 32}


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
    ours = role.scores(batch).detach() - 0.75
    texts, own = open_rewards(PolicyConfig(reward=str(out)), **LIMITS)
    assert texts is not None
    assert own is None
    theirs = texts.judge(PROMPTS, TEXTS)
    torch.testing.assert_close(theirs.scores, ours, rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.01, "the texts must be told apart"


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


def test_own_part_normalises_and_remembers() -> None:
    own = OwnReward("reward_model", 0.5, Normaliser(running=True))
    assert own.apply(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]
    again = OwnReward("reward_model", 0.5, Normaliser(running=True))
    again.load_state(own.state())
    assert again.apply(torch.tensor([2.0])).tolist() == [0.0]
