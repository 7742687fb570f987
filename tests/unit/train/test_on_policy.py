"""The on-policy loop with a learner that does next to nothing."""

from __future__ import annotations

import dataclasses
import io
import math
import random
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amenable.artifacts import StageContext, read_jsonl
from amenable.config.rewards import RewardPart
from amenable.errors import NumericsError, RecipeError, StageError
from amenable.models.roles import Role
from amenable.progress import Deadline
from amenable.rollout.types import Rollout
from amenable.train import on_policy
from amenable.train.checkpoints import Checkpoints
from amenable.train.experience import Minibatches
from amenable.train.on_policy import run_on_policy
from amenable.train.policy_roles import PolicyRoles
from amenable.train.scoring import Scorer

from .other_engine import OtherCopy

PolicyContext = Callable[..., StageContext]


class Nudger:
    """A learner that moves every weight of the policy by the same small step."""

    sampler = "policy"
    critic_role: Role | None = None

    def __init__(self, ctx: StageContext, roles: PolicyRoles, size: float = 0.01) -> None:
        self.roles, self.size = roles, size
        self.seen: list[Minibatches] = []

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> dict[str, float]:
        self.seen.append(minibatches)
        with torch.no_grad():
            for parameter in self.roles.policy.trainable_parameters():
                parameter.add_(self.size)
        return {"objective": 0.0}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        return None


def nudge(ctx: StageContext, size: float = 0.01) -> tuple[Nudger, dict[str, Any]]:
    learners: list[Nudger] = []

    def make(ctx: StageContext, roles: PolicyRoles) -> Nudger:
        learners.append(Nudger(ctx, roles, size))
        return learners[0]

    section = run_on_policy(ctx, make)
    return learners[0], section


def metrics(ctx: StageContext) -> list[dict[str, float]]:
    return [
        {key.removeprefix("policy/"): value for key, value in row.items()}
        for row in read_jsonl(ctx.log.metrics_path)
    ]


def said(ctx: StageContext) -> str:
    stream = ctx.progress._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


@pytest.mark.parametrize("sft", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_policy_starts_at_the_reference_exactly(
    policy_context: PolicyContext, lora: bool, sft: bool
) -> None:
    ctx = policy_context(lora__enabled=lora, sft_model=sft, policy__updates=2)
    nudge(ctx)
    first, second = metrics(ctx)
    assert first["kl_loss"] == 0.0
    assert abs(second["kl_loss"]) > 1e-4, "the second update has a policy that has moved"


@pytest.mark.parametrize(
    ("gate", "words"),
    [(True, "gate stops before training.*policy against reference"), (False, "by up to .*same we")],
)
def test_a_wrong_reference_is_noticed_before_anything_is_learnt(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch, gate: bool, words: str
) -> None:
    opened = on_policy.open_roles

    def wrong(ctx: StageContext) -> PolicyRoles:
        roles = opened(ctx)
        with torch.no_grad():
            for parameter in roles.reference.trainable_parameters():
                parameter.mul_(1.1)
        return roles

    monkeypatch.setattr(on_policy, "open_roles", wrong)
    ctx = policy_context(sft_model=True, policy__gate=gate)
    with pytest.raises(NumericsError, match=f"(?s){words}"):
        nudge(ctx)
    assert not (ctx.folder.models / "tuned").exists()


def test_the_loop_samples_the_stated_prompts(policy_context: PolicyContext) -> None:
    """Three updates of four prompts with two samples each; ten prompts, so two come again."""
    ctx = policy_context(policy__updates=3)
    learner, section = nudge(ctx)
    groups = []
    for minibatches in learner.seen:
        assert len(minibatches) == 2
        episodes = [e for part in minibatches for micro in part for e in micro.episodes]
        assert len(episodes) == 8
        ids = [episode.prompt.id for episode in episodes]
        assert all(ids.count(name) == 2 for name in ids)
        assert len({(e.prompt.id, e.rollout.completion_ids) for e in episodes}) > 4
        groups += sorted(set(ids))
    assert len(groups) == 12
    assert len(set(groups)) == 10
    assert (section["updates"], section["episodes"]) == (3, 24)


def test_metrics_are_means_over_the_episodes(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__updates=1, policy__missing_eos_penalty=0.5)
    learner, section = nudge(ctx)
    micros = [micro for part in learner.seen[0] for micro in part]
    episodes = [episode for micro in micros for episode in micro.episodes]
    vowels = [sum(c in "aeiou" for c in e.text) / max(1, len(e.text)) for e in episodes]
    scores = [v - 0.5 * (not e.rollout.ended) for v, e in zip(vowels, episodes, strict=True)]
    mean = sum(scores) / 8
    names = [episode.prompt.id for episode in episodes]
    of_prompt = [
        sum(s for s, name in zip(scores, names, strict=True) if name == own) / 2
        for own in sorted(set(names))
    ]
    variance = sum((score - mean) ** 2 for score in of_prompt) / 3
    (row,) = metrics(ctx)
    assert row["reward"] == pytest.approx(mean, abs=1e-5)
    assert row["reward_se"] == pytest.approx(math.sqrt(variance / 4), abs=1e-5)
    assert row["eos_rate"] == sum(e.rollout.ended for e in episodes) / 8
    lengths = [len(e.rollout.completion_ids) for e in episodes]
    assert row["completion_tokens"] == pytest.approx(sum(lengths) / 8)
    assert section["reward_first"] == section["reward_last"] == row["reward"]


def test_scores_are_clipped_then_charged_for_a_missing_end(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__missing_eos_penalty=0.5, policy__score_clip=2.0)
    scorer: Any = types.SimpleNamespace(_config=ctx.recipe.policy)
    episodes: Any = [
        types.SimpleNamespace(rollout=Rollout((1,), (2,), ended))
        for ended in (True, False, True, False)
    ]
    shaped, _ = Scorer._shaped(scorer, torch.tensor([1.0, 1.0, 5.0, -5.0]), episodes)
    assert shaped.tolist() == [1.0, 0.5, 2.0, -2.5]


def test_the_stage_stops_when_the_policy_has_gone_too_far(policy_context: PolicyContext) -> None:
    """Update 0 has no KL yet; the nudge before update 1 makes it large."""
    ctx = policy_context(policy__updates=6, policy__stop_at_kl=0.05)
    _, section = nudge(ctx, size=0.2)
    assert section["updates"] == 2
    assert metrics(ctx)[-1]["kl_loss"] > 0.05
    assert "stopped after update 2: sequence KL is above policy.stop_at_kl = 0.05" in said(ctx)
    assert (ctx.folder.models / "tuned" / "model.safetensors").is_file()


def test_time_that_is_up_leaves_a_whole_result(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__updates=5, stop_after=2)
    _, section = nudge(ctx)
    assert section["updates"] == 2
    assert "time is up after 2 of 5 updates" in said(ctx)
    assert (ctx.folder.models / "tuned" / "model.safetensors").is_file()
    assert Checkpoints(ctx).step == 2


def test_time_that_is_up_with_the_last_update_cuts_nothing(policy_context: PolicyContext) -> None:
    ctx = dataclasses.replace(policy_context(policy__updates=1), deadline=Deadline(0.0))
    nudge(ctx)
    assert not ctx.deadline.cut


def test_a_killed_update_is_done_again(policy_context: PolicyContext, tmp_path: Path) -> None:
    """Checkpoints every second update; the process dies in the fourth: two are repeated."""
    whole = policy_context(root=tmp_path / "whole", policy__updates=5, policy__checkpoint_every=2)
    nudge(whole)
    settings = {"policy__updates": 5, "policy__checkpoint_every": 2}
    killed = policy_context(root=tmp_path / "part", **settings)

    def die() -> None:
        if len(metrics(killed)) == 4:
            raise KeyboardInterrupt

    refresh = dataclasses.replace(killed, refresh_report=die)
    with pytest.raises(KeyboardInterrupt):
        nudge(refresh)
    rest = policy_context(root=tmp_path / "part", **settings)
    nudge(rest)
    assert [row["step"] for row in metrics(rest)] == [0, 1, 2, 3, 4]
    for one, other in zip(metrics(rest), metrics(whole), strict=True):
        assert {**one, "wall_s": 0} == {**other, "wall_s": 0}
    samples = [list(read_jsonl(ctx.log.samples_path)) for ctx in (rest, whole)]
    assert samples[0] == samples[1]


def test_a_stop_saves_after_its_update(policy_context: PolicyContext, tmp_path: Path) -> None:
    """Checkpoints every third update, the stop comes in the second: no update is done twice."""
    settings = {"policy__updates": 4, "policy__checkpoint_every": 3}
    whole = policy_context(root=tmp_path / "whole", **settings)
    _, section = nudge(whole)
    stopped = policy_context(root=tmp_path / "part", **settings)
    log, write = stopped.log, stopped.log.write

    def stopping(step: int, **figures: float) -> None:
        write(step, **figures)
        if step == 1:
            stopped.stop.ask(15)

    log.write = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        nudge(stopped)
    assert Checkpoints(stopped).step == 2
    rest = policy_context(root=tmp_path / "part", **settings)
    learner, own = nudge(rest)
    assert own == section
    assert len(learner.seen) == 2
    others = "KL weight, running statistics, figures, logs"
    assert f"policy: update 2 of 4 restored: policy, {others}\n" in said(rest)
    for one, other in zip(metrics(rest), metrics(whole), strict=True):
        assert {**one, "wall_s": 0} == {**other, "wall_s": 0}


def test_a_stop_in_the_preparation_ends_at_once(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = policy_context()
    monkeypatch.setattr(on_policy, "run_gate", lambda *_, **__: ctx.stop.ask(15))
    with pytest.raises(KeyboardInterrupt):
        nudge(ctx)
    assert Checkpoints(ctx).step is None


def test_the_clock_writes_checkpoints_that_are_no_candidates(
    policy_context: PolicyContext, tmp_path: Path
) -> None:
    """One after the preparation and after each update; none of them changes what is chosen."""
    settings = {"policy__updates": 4, "policy__checkpoint_every": 2}
    whole = policy_context(root=tmp_path / "whole", **settings)
    _, section = nudge(whole)
    often = policy_context(
        root=tmp_path / "often",
        checkpoint__every_minutes=1e-9,
        checkpoint__keep_last=9,
        **settings,
    )
    assert nudge(often)[1] == section
    kept = sorted(path.name for path in (often.out / "checkpoints").iterdir())
    assert kept == [f"step-{done:06d}" for done in range(5)]
    for done in (4, 3, 2, 1):
        for step in range(done, 5):  # candidates were written again by the run before
            shutil.rmtree(often.out / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
        rest = policy_context(root=tmp_path / "often", checkpoint__keep_last=9, **settings)
        learner, own = nudge(rest)
        assert own == section
        assert len(learner.seen) == 5 - done
        assert ("numerics gate" in said(rest)) is False


def test_figures_that_are_no_numbers_come_back(policy_context: PolicyContext) -> None:
    """One completion an update has no standard error; JSON has no NaN."""
    settings = {
        "policy__prompts_per_update": 1,
        "policy__samples_per_prompt": 1,
        "policy__minibatches": 1,
        "policy__updates": 3,
    }
    cut = policy_context(stop_after=2, **settings)
    nudge(cut)
    rest = policy_context(**settings)
    _, section = nudge(rest)
    assert section["updates"] == 3


def test_a_reward_that_draws_numbers_draws_the_same_after_a_resume(
    policy_context: PolicyContext, policy_reward: types.ModuleType, tmp_path: Path
) -> None:
    def lots(prompts: Any, completions: Any, rows: Any) -> list[float]:
        return [
            random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
            for _ in completions
        ]

    policy_reward.score = lots  # type: ignore[attr-defined]
    whole = policy_context(root=tmp_path / "whole", policy__updates=3)
    nudge(whole)
    nudge(policy_context(root=tmp_path / "part", policy__updates=3, stop_after=1))
    random.seed(1)
    torch.rand(7)
    rest = policy_context(root=tmp_path / "part", policy__updates=3)
    nudge(rest)
    rewards = [[row["reward"] for row in metrics(ctx)] for ctx in (rest, whole)]
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) == 3


def test_running_statistics_and_a_steered_weight_come_back(
    policy_context: PolicyContext, tmp_path: Path
) -> None:
    """Of the normaliser and of the adaptive controller: the figures go on as if nothing was."""
    settings: dict[str, Any] = {
        "policy__reward": "",
        "policy__rewards": (
            RewardPart(source="policy_reward:score", name="vowels", normalise="running"),
        ),
        "policy__updates": 4,
        "kl__controller": "adaptive",
        "kl__target": 0.5,
        "kl__horizon": 100,
    }
    whole = policy_context(root=tmp_path / "whole", **settings)
    nudge(whole)
    nudge(policy_context(root=tmp_path / "part", stop_after=2, **settings))
    rest = policy_context(root=tmp_path / "part", **settings)
    nudge(rest)
    rows, expected = ([{**row, "wall_s": 0} for row in metrics(ctx)] for ctx in (rest, whole))
    assert rows == expected
    assert len({row["kl_coef"] for row in rows}) == 4


def test_samples_tell_prompt_text_score_and_kl(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__updates=1, policy__missing_eos_penalty=0.0)
    nudge(ctx)
    rows = list(read_jsonl(ctx.log.samples_path))
    assert len(rows) == 8
    for row in rows:
        text = row["completion"]
        vowels = sum(c in "aeiou" for c in text) / max(1, len(text))
        assert row["score"] == pytest.approx(vowels, abs=1e-6)
        assert row["kl"] == 0.0


def test_training_refuses_a_truncated_sampler(policy_context: PolicyContext) -> None:
    with pytest.raises(RecipeError, match="training roll-outs must be pure samples"):
        nudge(policy_context(policy__top_p=0.9))


def test_a_missing_reward_model_is_named(policy_context: PolicyContext) -> None:
    ctx = policy_context(policy__reward="")
    with pytest.raises(StageError, match=r"models/reward is missing: run the reward stage first"):
        nudge(ctx)


def test_rise_in_standard_errors_by_hand() -> None:
    """Means 2 and 7. The variance of a mean of two with error 0.5 each is 0.5 / 4 = 0.125; of the
    difference 0.25, so its error is 0.5, and 5 / 0.5 = 10."""
    rows = [{"reward": reward, "reward_se": 0.5} for reward in (1.0, 3.0, 6.0, 8.0)]
    assert on_policy._rise(rows[:2], rows[2:]) == pytest.approx(10.0)
    exact = [{"reward": 1.0, "reward_se": 0.0}]
    assert on_policy._rise(exact, exact) is None


def test_a_negative_mean_kl_is_an_alarm(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is made to like the samples better than the policy that drew them."""
    opened = on_policy.open_roles

    def biased(ctx: StageContext) -> PolicyRoles:
        roles = opened(ctx)
        logprobs = roles.reference.logprobs

        def higher(*args: Any, **kwargs: Any) -> Any:
            found = logprobs(*args, **kwargs)
            return found._replace(logprobs=found.logprobs + 0.1)

        roles.reference.logprobs = higher  # type: ignore[method-assign]
        return roles

    ctx = policy_context(policy__gate=False, policy__gate_skip=("reference",))
    nudge(ctx, size=0.0)
    assert "warning" not in said(ctx)
    monkeypatch.setattr(on_policy, "open_roles", biased)
    other = policy_context(
        root=ctx.folder.root.parent / "other", policy__gate=False, policy__gate_skip=("reference",)
    )
    nudge(other, size=1e-4)
    assert said(other).count("cannot be negative but by chance") == 1


def sampled_by_another(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch, **fault: Any
) -> tuple[Nudger, StageContext]:
    monkeypatch.setattr(on_policy, "open_copy", lambda _, role: OtherCopy(role, **fault))
    ctx = policy_context(policy__gate=not fault)
    learner, _ = nudge(ctx)
    return learner, ctx


def test_another_engine_follows_the_policy(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding alone is between what it tells and what the trainer says, at every update."""
    learner, ctx = sampled_by_another(policy_context, monkeypatch)
    rows = [*read_jsonl(ctx.out / "metrics.jsonl")]
    assert all(row["policy/engine_gap"] < 1e-5 for row in rows)
    assert len({row["policy/kl_loss"] for row in rows}) == len(rows) == 3, "the policy moves"
    for minibatches in learner.seen:
        for micro in (micro for part in minibatches for micro in part):
            assert micro.sampler_logprobs is not None
            assert bool((micro.sampler_logprobs[~micro.batch.mask] == 0).all())


def test_an_engine_with_other_weights_ends_the_stage(
    policy_context: PolicyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"update 0: the trainer's log-probabilities .* are 0\.6 nats from those of the engine"
    with pytest.raises(NumericsError, match=words):
        sampled_by_another(policy_context, monkeypatch, off=0.6)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_allowed_gap_grows_as_log_probabilities_do(temperature: float) -> None:
    on_policy._check_engine(3, {"engine_gap": 0.49 / temperature}, temperature)
    with pytest.raises(NumericsError, match="update 3"):
        on_policy._check_engine(3, {"engine_gap": 0.51 / temperature}, temperature)
