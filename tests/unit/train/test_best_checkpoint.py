"""The checkpoint that stays is the one that the chooser scores highest, also after a stop."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train.conftest import PolicyContext, vowel_share

from amenable.artifacts import StageContext, read_json, write_jsonl
from amenable.config.rewards import RewardPart
from amenable.train import ppo
from amenable.train.checkpoints import Checkpoints

REWARDS = (
    RewardPart(source="policy_reward:score", name="vowels"),
    RewardPart(source="policy_reward:watched", name="gold", weight=0.0),
)
SETTINGS: dict[str, Any] = {
    "policy__rewards": REWARDS,
    "policy__reward": "",
    "policy__updates": 4,
    "policy__learning_rate": 1e-2,
    "selection__by": "gold",
}


@pytest.fixture
def chooser(policy_reward: types.ModuleType) -> list[float]:
    """What the watched reward gives to the answers of the checkpoints, in turn."""
    plan: list[float] = []
    asked: list[str] = []
    module: Any = policy_reward

    def watched(prompts: list[str], completions: list[str], rows: Any) -> list[float]:
        if prompts[0].startswith("chosen by"):
            asked.append(prompts[0])
            return [plan[len(asked) - 1]] * len(prompts)
        return vowel_share(prompts, completions, rows)

    module.watched = watched
    module.asked = asked
    return plan


def with_prompts(ctx: StageContext) -> StageContext:
    rows = [{"id": f"v{i}", "group": f"v{i}", "input_text": f"chosen by {i}"} for i in range(3)]
    write_jsonl(ctx.folder.data / "prompts.validation.jsonl", rows)
    return ctx


def weights(ctx: StageContext, name: str) -> dict[str, torch.Tensor]:
    saved = Checkpoints(ctx).read()
    assert saved is not None
    return saved[0][name]


def tuned(ctx: StageContext) -> bytes:
    return (ctx.folder.models / "tuned" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.3, 0.9, 0.2, 0.1], 2),
        ([0.5, 0.3, 0.2, 0.2, 0.1], 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4),
        ([0.1, 0.5, 0.2, 0.5, 0.1], 3),
        ([0.1, float("nan"), 0.2, float("nan"), 0.1], 2),
    ],
)
def test_the_best_of_start_and_checkpoints_stays(
    policy_context: PolicyContext, chooser: list[float], scores: list[float], best: int
) -> None:
    """The exported weights are those that a run of so many updates ends with."""
    chooser += scores
    ctx = with_prompts(policy_context(**SETTINGS))
    section = ppo.run(ctx)
    assert section["chosen_update"] == best
    found = read_json(ctx.out / "selection.json")
    assert (found["by"], found["chosen"]) == ("gold", best)
    assert [row["score"] for row in found["checkpoints"]] == pytest.approx(
        [score for score in scores if score == score]
    )
    last, chosen = weights(ctx, "policy"), weights(ctx, "best")
    assert all(torch.equal(last[key], chosen[key]) for key in last) == (best == 4)


def test_a_stopped_stage_chooses_as_a_whole_one_does(
    policy_context: PolicyContext, chooser: list[float], policy_reward: Any, tmp_path: Path
) -> None:
    chooser += [0.1, 0.9, 0.2, 0.3, 0.1]
    whole = with_prompts(policy_context(root=tmp_path / "whole", **SETTINGS))
    section = ppo.run(whole)
    policy_reward.asked.clear()
    ppo.run(with_prompts(policy_context(root=tmp_path / "part", stop_after=2, **SETTINGS)))
    assert len(policy_reward.asked) == 3
    rest = with_prompts(policy_context(root=tmp_path / "part", **SETTINGS))
    assert ppo.run(rest) == section
    assert section["chosen_update"] == 1
    assert tuned(rest) == tuned(whole)
    files = [read_json(ctx.out / "selection.json") for ctx in (rest, whole)]
    assert files[0] == files[1]


def test_a_candidate_that_a_stop_has_cut_off_is_measured_by_the_run_that_goes_on(
    policy_context: PolicyContext, chooser: list[float], policy_reward: Any, tmp_path: Path
) -> None:
    """A stop leaves at once after its update; checkpoints between two candidates measure none."""
    chooser += [0.1, 0.9, 0.2]
    settings = {**SETTINGS, "policy__checkpoint_every": 2, "checkpoint__every_minutes": 1e-9}
    whole = with_prompts(policy_context(root=tmp_path / "whole", **settings))
    section = ppo.run(whole)
    assert section["chosen_update"] == 2
    assert len(policy_reward.asked) == 3
    policy_reward.asked.clear()
    part = with_prompts(policy_context(root=tmp_path / "part", **settings))
    write = part.log.write

    def stopping(step: int, **figures: float) -> None:
        write(step, **figures)
        if step == 1:
            part.stop.ask(15)

    part.log.write = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ppo.run(part)
    assert len(policy_reward.asked) == 1
    rest = with_prompts(policy_context(root=tmp_path / "part", **settings))
    assert ppo.run(rest) == section
    assert len(policy_reward.asked) == 3
    assert tuned(rest) == tuned(whole)
    files = [read_json(ctx.out / "selection.json") for ctx in (rest, whole)]
    assert files[0] == files[1]


def test_without_prompts_of_its_own_the_last_one_stays(
    policy_context: PolicyContext, chooser: list[float]
) -> None:
    ctx = policy_context(**SETTINGS)
    assert ppo.run(ctx)["chosen_update"] == 4
    assert not (ctx.out / "selection.json").exists()


def test_a_policy_is_measured_although_the_reference_samples(
    policy_context: PolicyContext, chooser: list[float]
) -> None:
    from amenable.train import best_of_n

    chooser += [0.1, 0.3, 0.2, 0.2, 0.1]
    ctx = with_prompts(
        policy_context(
            **SETTINGS,
            policy__algorithm="best-of-n",
            best_of_n__sampler="reference",
            policy__samples_per_prompt=2,
        )
    )
    assert best_of_n.run(ctx)["chosen_update"] == 1
