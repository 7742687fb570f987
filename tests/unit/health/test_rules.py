"""Every rule speaks of what it is for, and of nothing else; none speaks of a healthy run."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from amenable.health.rules import RULES
from amenable.health.watch import Watch, check_rows

Rows = list[dict[str, Any]]


def noisy(level: float, spread: float, seed: int) -> float:
    return level + random.Random(seed).uniform(-spread, spread)


def sft(n: int = 60, **other: Callable[[int], float]) -> Rows:
    return [
        {
            "step": i,
            "loss": noisy(3.0 - 0.02 * i, 0.2, i),
            "grad_norm": noisy(1.0, 0.3, i),
            "undone_steps": 0.0,
            **({"eval_loss": 2.8 - 0.01 * i} if i % 20 == 19 else {}),
            **{key: made(i) for key, made in other.items()},
        }
        for i in range(n)
    ]


def reward(n: int = 60, **other: Callable[[int], float]) -> Rows:
    return [
        {
            "step": i,
            "rank_loss": noisy(0.7 - 0.004 * i, 0.1, i),
            "accuracy": min(1.0, noisy(0.55 + 0.003 * i, 0.2, i)),
            "grad_norm": noisy(2.0, 1.0, i),
            "undone_steps": 0.0,
            **({"eval_rank_loss": 0.65, "eval_accuracy": 0.66} if i % 20 == 19 else {}),
            **{key: made(i) for key, made in other.items()},
        }
        for i in range(n)
    ]


def policy(n: int = 30, **other: Callable[[int], float]) -> Rows:
    return [
        {
            "step": i,
            "reward": noisy(0.05 * i, 0.1, i),
            "reward_se": 0.1,
            "gold": noisy(0.03 * i, 0.1, i + 99),
            "kl_loss": 0.1 * i,
            "kl_se": 0.05,
            "completion_tokens": noisy(8.0, 0.5, i),
            "entropy": noisy(1.5 - 0.01 * i, 0.05, i),
            "approx_kl": 0.01,
            "ratio_max": 1.8,
            "clip_fraction": 0.1,
            "explained_variance": min(0.5, -0.4 + 0.1 * i),
            "eos_rate": 0.95,
            "repeated": 0.1,
            "without_spread": 0.1,
            "reward_failures": 0.0,
            "grad_norm": noisy(1.0, 0.3, i),
            "undone_steps": 0.0,
            **{key: made(i) for key, made in other.items()},
        }
        for i in range(n)
    ]


def pairs(n: int = 60, **other: Callable[[int], float]) -> Rows:
    return [
        {
            "step": i,
            "loss": noisy(0.69 - 0.003 * i, 0.05, i),
            "accuracy": noisy(0.6, 0.2, i),
            "chosen_reward": 0.01 * i,
            "rejected_reward": -0.01 * i,
            "chosen_nll": 1.5,
            "grad_norm": noisy(1.0, 0.3, i),
            "undone_steps": 0.0,
            **({"eval_loss": 0.66, "eval_accuracy": 0.62} if i % 20 == 19 else {}),
            **{key: made(i) for key, made in other.items()},
        }
        for i in range(n)
    ]


HEALTHY = {"sft": sft(), "reward": reward(), "policy": policy(), "pairs": pairs()}

FAULTS: dict[str, tuple[str, Rows]] = {
    "not-finite": ("sft", sft(undone_steps=lambda i: float(i > 5))),
    "gradient-spike": ("policy", policy(grad_norm=lambda i: 40.0 if i == 20 else 1.0)),
    "loss-rises": ("sft", sft(25, loss=lambda i: 3.0 + 0.1 * i)),  # too short to be called flat
    "loss-flat": (
        "sft",
        sft(loss=lambda i: noisy(3.0, 0.2, i % 7), eval_loss=lambda i: 2.8),
    ),
    "held-out-rises": ("sft", sft(eval_loss=lambda i: 2.0 + 0.02 * i)),
    "by-heart": ("reward", reward(accuracy=lambda i: 0.99)),
    "coin": (
        "reward",
        reward(accuracy=lambda i: noisy(0.5, 0.05, i), eval_accuracy=lambda i: 0.5),
    ),
    "kl-negative": ("policy", policy(kl_loss=lambda i: -0.05 * i)),
    "kl-far": ("policy", policy(kl_loss=lambda i: 1.0 * i)),
    "step-too-far": ("policy", policy(approx_kl=lambda i: 0.08)),
    "ratio": ("policy", policy(ratio_max=lambda i: 15.0)),
    "clipped": ("policy", policy(clip_fraction=lambda i: 0.4)),
    "entropy-collapses": ("policy", policy(entropy=lambda i: 1.5 * 0.8**i)),
    "entropy-explodes": ("policy", policy(entropy=lambda i: 1.5 + 0.2 * i)),
    "critic-harms": ("policy", policy(explained_variance=lambda i: -1.0)),
    "cut-off": ("policy", policy(eos_rate=lambda i: 0.3)),
    "length-drifts": ("policy", policy(completion_tokens=lambda i: 8.0 + 0.5 * i)),
    "no-spread": ("policy", policy(without_spread=lambda i: 1.0)),
    "rewards-fail": ("policy", policy(reward_failures=lambda i: 0.3)),
    "same-answers": ("policy", policy(repeated=lambda i: min(1.0, 0.1 + 0.05 * i))),
    "over-optimised": (
        "policy",
        policy(gold=lambda i: noisy(0.1 * min(i, 10) - 0.1 * max(0, i - 10), 0.05, i)),
    ),
    "likelihood-falls": (
        "policy",
        pairs(
            chosen_reward=lambda i: -0.05 * i,
            rejected_reward=lambda i: -0.1 * i,
            chosen_nll=lambda i: 1.5 + 0.02 * i,
        ),
    ),
}


def test_there_is_a_case_for_every_rule() -> None:
    assert set(FAULTS) == {rule.id for rule in RULES}
    assert len(RULES) >= 14


@pytest.mark.parametrize("kind", HEALTHY)
def test_no_rule_speaks_of_a_healthy_stage(kind: str) -> None:
    assert check_rows("policy" if kind == "pairs" else kind, HEALTHY[kind]) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_speaks_once_of_what_it_is_for(name: str) -> None:
    stage, rows = FAULTS[name]
    found = check_rows(stage, rows)
    assert [finding.rule for finding in found] == [name]
    (rule,) = [rule for rule in RULES if rule.id == name]
    assert found[0].level == rule.level
    assert found[0].message.endswith(f"{rule.means} {rule.remedy}")


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_can_be_switched_off(name: str) -> None:
    stage, rows = FAULTS[name]
    watch = Watch(stage, off=[name])
    for row in rows:
        watch.see(row["step"], row)
    assert watch.findings == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_is_silent_without_its_figures(rule: Any) -> None:
    _, rows = FAULTS[rule.id]
    for need in rule.needs:
        left_out = need.split("|")
        without = [{k: v for k, v in row.items() if k not in left_out} for row in rows]
        said = [found.rule for stage in rule.stages for found in check_rows(stage, without)]
        assert rule.id not in said, need


def test_figures_that_are_no_numbers_are_passed_over() -> None:
    rows = policy(reward=lambda i: float("nan"))
    rows = [{**row, "kl_loss": None} if row["step"] % 2 else row for row in rows]
    assert check_rows("policy", rows) == []


def test_a_prefix_is_taken_off() -> None:
    stage, rows = FAULTS["kl-far"]
    named = [
        {"step": row.pop("step"), **{f"policy/{k}": v for k, v in row.items()}} for row in rows
    ]
    assert [finding.rule for finding in check_rows(stage, named)] == ["kl-far"]
