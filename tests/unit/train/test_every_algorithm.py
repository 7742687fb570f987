"""What must hold of every row of the algorithm table, and so of a new one from its first day."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import StageContext, read_json, read_jsonl, write_jsonl
from amenable.models.logprobs import TokenLogprobs
from amenable.train.checkpoints import newest_folder
from amenable.train.experience import Episode, Minibatches, flat
from amenable.train.passes import minibatch_order
from amenable.train.registry import run_policy

from .conftest import vowel_share
from .first_update import ON_POLICY, Floor, figures, off_by, said

PolicyContext = Callable[..., StageContext]
EVERY = list(ALGORITHMS)
ONE_STEP = {"policy__minibatches": 1, "policy__epochs": 1}

# Every row that has a loop ----------------------------------------------------------------------


@pytest.fixture
def any_context(policy_context: PolicyContext, ten_rows: list[dict[str, str]]) -> PolicyContext:
    """A run folder with prompts and with preferences; two updates, or as many steps on pairs."""

    def make(name: str, **changes: Any) -> StageContext:
        settings = {
            "policy__algorithm": name,
            "policy__updates": 2,
            "policy__learning_rate": 1e-3,
            "policy__gate": False,
            "preference__batch_size": 5,
            "preference__max_steps": 2,
            "preference__learning_rate": 1e-3,
            "preference__evaluations": 2,
        }
        ctx = policy_context(**{**settings, **changes})
        answers = [row["output_text"] for row in ten_rows]
        pairs = [
            {
                "id": f"pair{i}",
                "group": str(i),
                "input_text": row["input_text"],
                "candidate_0": answers[i],
                "candidate_1": answers[i - 1],
                "choice": i % 2,
            }
            for i, row in enumerate(ten_rows)
        ]
        for split, part in (("train", pairs), ("validation", pairs[:4])):
            write_jsonl(ctx.folder.data / f"preferences.{split}.jsonl", part)
        return ctx

    return make


def checkpoint(ctx: StageContext) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    folder = newest_folder(ctx.out / "checkpoints")
    assert folder is not None
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return read_json(folder / "numbers.json"), tensors


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_gives_the_same_bits(
    any_context: PolicyContext, tmp_path: Path, name: str
) -> None:
    """Two updates at once, and one after the other in two processes' worth of objects; the weight
    of the KL is steered, so its controller must come back as well: at update 0 the KL is 0, and
    the weight falls by 8 / 100 of itself.
    """
    steered = {"kl__controller": "target", "kl__target": 0.5, "kl__horizon": 100}
    whole = any_context(name, root=tmp_path / "whole", **steered)
    section = run_policy(whole)
    cut = any_context(name, root=tmp_path / "part", stop_after=1, **steered)
    run_policy(cut)
    steps = len(figures(cut))
    rest = any_context(name, root=tmp_path / "part", **steered)
    assert run_policy(rest) == section
    assert len(figures(rest)) > steps, "the cut must have left something to do"
    tuned = [ctx.folder.models / "tuned" / "model.safetensors" for ctx in (rest, whole)]
    assert tuned[0].read_bytes() == tuned[1].read_bytes()
    (numbers, tensors), (others, ours) = checkpoint(rest), checkpoint(whole)
    assert len(tensors) >= 2
    assert tensors.keys() == ours.keys()
    for group, own in tensors.items():
        assert own
        assert all(torch.equal(value, ours[group][key]) for key, value in own.items()), group
    assert numbers == others
    if ALGORITHMS[name].learns_from == "prompts":
        assert figures(rest)[1]["kl_coef"] == pytest.approx(0.05 * 0.92)
        assert numbers["kl_coef"] != pytest.approx(0.05 * 0.92)


@pytest.mark.parametrize("name", EVERY)
def test_two_updates_move_the_policy_and_leave_a_model(
    any_context: PolicyContext, tiny: Path, name: str
) -> None:
    ctx = any_context(
        name,
        lora__enabled=False,
        policy__prompts_per_update=6,
        policy__samples_per_prompt=3,
    )
    section = run_policy(ctx)
    assert section["algorithm"] == name
    assert section["updates"] == 2
    assert all(math.isfinite(v) for row in figures(ctx) for v in row.values() if v is not None)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny, ctx.folder.models / "tuned")
    )
    assert before.keys() == after.keys()
    moved = [float((after[key] - before[key]).abs().max()) for key in before]
    assert max(moved) > 5e-4, "two steps at a rate of 1e-3"
    assert max(moved) < 2e-2
    if ALGORITHMS[name].learns_from == "prompts":
        assert (
            f"policy: {name}: 2 updates of 6 prompts × 3 samples = 18 episodes; 2 passes × 2 "
            "minibatches of 9 episodes = 4 steps an update; micro-batches of up to 1024 tokens"
        ) in said(ctx)
        rows = list(read_jsonl(ctx.log.samples_path))
        assert [row["step"] for row in rows] == [0] * 10 + [1] * 10, "ten completions an update"


# Every row that samples -------------------------------------------------------------------------

on_policy = pytest.mark.parametrize("name", ON_POLICY)


@on_policy
def test_it_learns_a_tiny_task(policy_context: PolicyContext, lively: Path, name: str) -> None:
    """The share of vowels starts at 0.15; turned round, the reward of none of them rises."""
    ctx = policy_context(
        base=lively,
        lora__enabled=False,
        policy__algorithm=name,
        policy__updates=6,
        policy__prompts_per_update=10,
        policy__samples_per_prompt=4,
        policy__learning_rate=5e-3,
        policy__final_learning_rate_fraction=1.0,
        policy__checkpoint_every=100,
        policy__gate=False,
        policy__missing_eos_penalty=0.0,
        kl__coef=0.01,
    )
    run_policy(ctx)
    rewards = [row["reward"] for row in figures(ctx)]
    assert rewards[0] < 0.17
    assert sum(rewards[-3:]) / 3 > 0.22


def ragged(episodes: Sequence[Episode]) -> list[Episode]:
    """Completions of one to six tokens; all but the whole ones have ended. The first prompt has one
    less than the others, so that a mean of means is another than the mean.
    """
    cut = []
    for index, episode in enumerate(episodes):
        ids = episode.rollout.completion_ids[: 1 + 5 * index % 6]
        rollout = dataclasses.replace(episode.rollout, completion_ids=ids, ended=len(ids) < 6)
        text = episode.text[: len(ids)]
        cut.append(dataclasses.replace(episode, rollout=rollout, text=text))
    return cut[1:]


@on_policy
def test_neither_micro_batches_nor_order_change_a_step(
    policy_context: PolicyContext, name: str
) -> None:
    """One step on 15 ragged completions of 4 prompts: all at once; a prompt at a time, which has no
    padding (8 × 1 = 1 × 8); and with the prompts in another order.
    """
    steps = []
    for budget, turned in ((100_000, False), (1, False), (100_000, True)):
        ctx = policy_context(
            policy__algorithm=name,
            policy__micro_batch_tokens=budget,
            policy__samples_per_prompt=4,
            **ONE_STEP,
        )
        floor = Floor.of(ctx)
        episodes = ragged(floor.loop._sample(0))
        if turned:
            episodes.sort(key=lambda episode: -episode.group)
        minibatches = floor.measured(episodes)
        assert [len(part) for part in minibatches] == ([4] if budget == 1 else [1])
        found = floor.learn(minibatches)
        steps.append((found, floor.gradient()))
    (found, gradient), *others = steps
    assert gradient.norm() > 1e-4
    assert gradient.norm() == pytest.approx(min(1.0, found["grad_norm"]), rel=1e-3)
    for other, own in others:
        assert other == pytest.approx(found, rel=1e-3, abs=1e-5)
        assert off_by(gradient, own) < 1e-3
    assert found.get("ratio_max", 1.0) == 1.0
    assert found.get("approx_kl", 0.0) == 0.0
    assert found.get("clip_fraction", 0.0) == 0.0


LEAVE_OUT = {0, 1, 2, 5, 9, 13}
"""Of 16: the first prompt keeps one completion, the others three."""


def marked(episodes: Sequence[Episode]) -> list[Episode]:
    """Each text says which completion it is; those to leave out are the ones that did not end."""
    return [
        dataclasses.replace(
            episode,
            text=f"{index:02d}" + "ae bcd"[index % 5 :],
            rollout=dataclasses.replace(episode.rollout, ended=index not in LEAVE_OUT),
        )
        for index, episode in enumerate(episodes)
    ]


@on_policy
def test_failed_and_filtered_completions_leave_batch_and_denominator(
    policy_context: PolicyContext, policy_reward: types.ModuleType, name: str
) -> None:
    """The same step as if they had never been sampled; another than with a score of 0."""

    def failing(to: float | None) -> Callable[..., list[float | None]]:
        def score(prompts: Any, completions: Sequence[str], rows: Any) -> list[float | None]:
            given = vowel_share(prompts, completions, rows)
            names = [int(text[:2]) for text in completions]
            return [to if n in LEAVE_OUT else s for n, s in zip(names, given, strict=True)]

        return score

    def step(
        score: Callable[..., Any], leave_out: bool = False, rule: str = "subtract"
    ) -> tuple[torch.Tensor, dict[str, float]]:
        policy_reward.score = score  # type: ignore[attr-defined]
        ctx = policy_context(
            policy__algorithm=name,
            policy__samples_per_prompt=4,
            policy__missing_eos=rule,
            policy__missing_eos_penalty=0.0,
            **ONE_STEP,
        )
        floor = Floor.of(ctx)
        episodes = marked(floor.loop._sample(0))
        if leave_out:
            episodes = [e for n, e in enumerate(episodes) if n not in LEAVE_OUT]
        found = floor.learn(floor.measured(episodes))
        return floor.gradient(), found

    wanted, figures_wanted = step(vowel_share, leave_out=True)
    for own, found in (step(failing(None)), step(vowel_share, rule="filter")):
        assert off_by(wanted, own) < 1e-5
        assert found == pytest.approx(figures_wanted, rel=1e-4, abs=1e-6)
    assert off_by(wanted, step(failing(0.0))[0]) > 0.05


@on_policy
def test_a_prompt_that_comes_twice_is_sampled_anew(
    policy_context: PolicyContext, name: str
) -> None:
    """Ten prompts, twenty in an update: each comes twice, as a group of its own."""
    ctx = policy_context(policy__algorithm=name, policy__prompts_per_update=20, **ONE_STEP)
    floor = Floor.of(ctx)
    minibatches = floor.measured()
    texts: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for micro in flat(minibatches):
        for own in micro.groups():
            members = micro.episodes[own]
            assert len(members) == 2
            assert len({episode.group for episode in members}) == 1
        for episode in micro.episodes:
            key = (episode.group, episode.rollout.completion_ids)
            texts.setdefault(episode.prompt.id, []).append(key)
    assert len(texts) == 10
    for found in texts.values():
        assert len({group for group, _ in found}) == 2
        assert len({ids for _, ids in found}) == 4, "no completion is sampled twice"
    floor.learn(minibatches)


def poison(floor: Floor, minibatches: Minibatches, update: int = 0) -> Episode:
    """Makes the log-probabilities of one completion NaN in the second step; returns it."""
    second = minibatch_order(2, floor.ctx.recipe.seed, update, 0)[1]
    victim = minibatches[second][0]
    row = int(victim.scores.argmax())
    logprobs = floor.roles.policy.logprobs

    def broken(batch: Any, **options: Any) -> TokenLogprobs:
        output = logprobs(batch, **options)
        if batch is not victim.batch:
            return output
        factor = torch.ones_like(output.logprobs)
        factor[row, 0] = float("nan")
        return output._replace(logprobs=output.logprobs * factor)

    floor.roles.policy.logprobs = broken
    return victim.episodes[row]


@on_policy
def test_a_loss_that_is_not_finite_is_named_and_its_step_undone(
    policy_context: PolicyContext, name: str
) -> None:
    """Two steps; the second must leave weights and moments as the first did."""

    def after(broken: bool) -> tuple[Floor, dict[str, torch.Tensor], dict[str, float], str]:
        ctx = policy_context(
            policy__algorithm=name, policy__epochs=1, policy__learning_rate=1e-3, kl__coef=0.05
        )
        floor = Floor.of(ctx)
        minibatches = floor.measured()
        episode = poison(floor, minibatches) if broken else None
        found = floor.learn(minibatches)
        return floor, floor.roles.policy.state(), found, str(episode)

    floor, broken, found, victim = after(True)
    _, whole, right, _ = after(False)
    lines = [line for line in said(floor.ctx).splitlines() if "not finite" in line]
    assert any(victim in line for line in lines)
    assert len(lines) <= 2, "no more than the completion, and the one that it is paired with"
    assert (found["undone_steps"], right["undone_steps"]) == (1.0, 0.0)
    assert all(bool(value.isfinite().all()) for value in broken.values())
    steps = [
        int(value)
        for key, value in floor.learner.state()[0]["policy_optimizer"].items()
        if key.endswith(".step")
    ]
    assert set(steps) == {1}
    assert any(not torch.equal(value, whole[key]) for key, value in broken.items())
