"""A believable run folder without a model: what the stages would have written, from a seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amenable.evaluate.side_by_side import compare
from amenable.evaluate.statistics import (
    calibration_bins,
    calibration_error_null,
    distinct_n,
    duplicate_share,
    expected_calibration_error,
    win_rate_interval,
)

RECIPE = """\
schema_version = 1
name = "{name}"
seed = {seed}

[model]
base = "smollm2-135m"

[data]
task = "docstrings"
instruction = "Write the one-line summary of this explanation."

[collect]
annotator = "{annotator}"
pairs = 800
noise = 0.1

[policy]
algorithm = "ppo"
updates = 60
"""

ANNOTATOR = (
    "The annotator is a SIMULATION, not people: it prefers the answer with the higher 1 x word F1 "
    "with the author's own line + 0.5 x share of content words found in the input - 0.05 a word "
    "beyond 8, and picks the other one in 10% of its choices."
)

HOSTILE = (
    "<script>alert('x')</script> <img src=x onerror=alert(1)> \u202egnp.exe\x1b[31m &amp; \ud800"
)
"""Text that must come out as text."""

SLICES = (
    *("prompt length: shortest", "prompt length: second", "prompt length: third"),
    *("prompt length: longest", f"tag: {HOSTILE}"),
)

_WORDS = (  # noqa: SIM905 - a text is easier to read than a list
    "return the given path after symbolic links are resolved list of open files under a folder "
    "parse value header read next record from stream and raise if it is closed convert name "
    "between two encodings cache result until key expires compute checksum for every block "
    "start worker thread wait lock release split string into tokens merge settings with defaults"
).split()


def _json(path: Path, obj: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj), encoding="utf-8")


def _jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _sentence(rng: np.random.Generator, low: int, high: int) -> str:
    text = " ".join(rng.choice(_WORDS, size=int(rng.integers(low, high))))
    return text[0].upper() + text[1:] + "."


def _metrics(stage: str, columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    steps = len(next(iter(columns.values())))
    return [
        {"step": k, "wall_s": 4.0 * k}
        | {
            f"{stage}/{name}": (None if math.isnan(v[k]) else float(v[k]))
            for name, v in columns.items()
        }
        for k in range(steps)
    ]


def _write_training(root: Path, rng: np.random.Generator, updates: int) -> None:
    t = np.arange(60)
    loss = 2.1 + 1.6 * np.exp(-t / 9) + rng.normal(0, 0.06, 60)
    rows = _metrics(
        "sft", {"loss": loss, "learning_rate": 3e-4 * (1 - t / 60), "grad_norm": 1 + 0 * t}
    )
    rows += [
        {"step": k, "wall_s": 240.0, "sft/eval_loss": 2.2 + math.exp(-k / 9)} for k in (20, 40, 59)
    ]
    _jsonl(root / "stages/sft/metrics.jsonl", rows)
    t = np.arange(50)
    rank = 0.52 + 0.2 * np.exp(-t / 10) + rng.normal(0, 0.04, 50)
    accuracy = np.clip(0.76 - 0.26 * np.exp(-t / 9) + rng.normal(0, 0.07, 50), 0, 1)
    rows = _metrics(
        "reward", {"rank_loss": rank, "accuracy": accuracy, "margin": 1.4 - np.exp(-t / 10)}
    )
    rows += [
        {
            "step": k,
            "wall_s": 200.0,
            "reward/eval_rank_loss": 0.53 + 0.18 * math.exp(-k / 9),
            "reward/eval_accuracy": 0.72 + k / 2000,
        }
        for k in (16, 33, 49)
    ]
    _jsonl(root / "stages/reward/metrics.jsonl", rows)
    _write_policy(root, rng, updates)


def _write_policy(root: Path, rng: np.random.Generator, updates: int) -> None:
    t = np.arange(updates)
    rise = 1 - np.exp(-t / 16)
    kl = 4.2 * rise + rng.normal(0, 0.18, updates) * rise
    columns = {
        "reward": -0.05 + 1.25 * rise + rng.normal(0, 0.1, updates),
        "reward_se": np.full(updates, 0.09),
        "gold": 0.52 + 0.14 * rise - 0.0006 * t + rng.normal(0, 0.012, updates),
        "kl_loss": kl,
        "kl_coef": np.full(updates, 0.05),
        "entropy": 2.4 - 0.9 * rise + rng.normal(0, 0.04, updates),
        "approx_kl": np.abs(rng.normal(0.012, 0.004, updates)),
        "clip_fraction": np.abs(rng.normal(0.09, 0.02, updates)),
        "explained_variance": 0.55 * (1 - np.exp(-t / 6)) + rng.normal(0, 0.06, updates) - 0.1,
        "eos_rate": np.clip(0.9 + 0.09 * rise + rng.normal(0, 0.015, updates), 0, 1),
        "completion_tokens": 12.5 - 1.5 * rise + rng.normal(0, 0.3, updates),
    }
    columns["objective"] = columns["reward"] - 0.05 * kl
    _jsonl(root / "stages/policy/metrics.jsonl", _metrics("policy", columns))
    rows = [
        {
            "step": int(k),
            "prompt": _sentence(rng, 18, 40),
            "completion": _sentence(rng, 5, 12),
            "score": float(rng.normal(k / 60, 0.5)),
            "kl": float(k / 15),
            "reward_total": 0.0,
            "gold": float(rng.random()),
        }
        for k in t
        for _ in range(2)
    ]
    _jsonl(root / "stages/policy/samples.jsonl", rows)
    headroom = {
        "prompts": 32,
        "best_of": 16,
        "sft_greedy": 0.538,
        "sft_sampled": 0.461,
        "best_of_n": 0.792,
        "by_reward_model": [
            {"n": 2**k, "kl": 0.7 * k, "proxy": 0.4 * k, "gold": 0.461 + 0.05 * k} for k in range(5)
        ],
    }
    _json(root / "stages/policy/headroom.json", headroom)


def _completions(rng: np.random.Generator, prompts: int) -> list[dict[str, Any]]:
    rows = []
    for k in range(prompts):
        base, sft = _sentence(rng, 14, 30), _sentence(rng, 6, 12)
        tuned = sft if rng.random() < 0.15 else _sentence(rng, 6, 11)
        skill = rng.normal(0.5, 0.12)
        gold = {
            "base": skill - 0.28,
            "sft": skill,
            "tuned": skill if tuned == sft else skill + rng.normal(0.035, 0.14),
        }
        texts = {"base": base, "sft": sft, "tuned": tuned}
        rows.append(
            {
                "id": f"package:module:object_{k}",
                "input_text": _sentence(rng, 25, 70),
                "reference": _sentence(rng, 6, 10),
                "completions": texts,
                "tokens": {name: len(text.split()) + 2 for name, text in texts.items()},
                "ended": {"base": bool(rng.random() < 0.8), "sft": True, "tuned": True},
                "scores": {
                    "annotator": gold,
                    "reward_model": {
                        n: 4 * (g - 0.4) + rng.normal(0, 0.5) for n, g in gold.items()
                    },
                },
            }
        )
    rows[0]["completions"]["tuned"] = HOSTILE
    rows[0]["input_text"] = HOSTILE + " " + rows[0]["input_text"]
    return rows


def _comparisons(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    found = []
    for judge in ("annotator", "reward_model"):
        for a, b in (("base", "sft"), ("base", "tuned"), ("sft", "tuned")):
            scores = [[row["scores"][judge][name] for row in rows] for name in (a, b)]
            lengths = [[row["tokens"][name] for row in rows] for name in (a, b)]
            same = [row["completions"][a] == row["completions"][b] for row in rows]
            found.append(
                compare(
                    a, b, judge, *scores, *lengths, seed=seed, bootstrap_samples=200, identical=same
                )
            )
    return found


def _reward_section(rng: np.random.Generator) -> dict[str, Any]:
    margins = rng.normal(0.95, 1.2, 400)
    confidence, correct = 1 / (1 + np.exp(-np.abs(margins))), (margins > 0) * 1.0
    return {
        "pairs_train": 736,
        "pairs_eval": 400,
        "ties_eval": 6,
        "accuracy": float(correct.mean()),
        "accuracy_ci95": win_rate_interval(correct).as_list(),
        "accuracy_p_value": 3e-9,
        "length_matched_pairs": 61,
        "length_matched_accuracy": 0.7213,
        "length_matched_ci95": [0.5982, 0.8181],
        "longer_better_pairs": 165,
        "longer_better_accuracy": 0.6848,
        "longer_better_ci95": [0.6106, 0.7509],
        "shorter_better_pairs": 235,
        "shorter_better_accuracy": 0.8383,
        "shorter_better_ci95": [0.7858, 0.8799],
        "length_balanced_accuracy": 0.7616,
        "length_balanced_ci95": [0.7163, 0.8018],
        "slices": [
            {
                "slice": name,
                "pairs": 100,
                "prompts": 90,
                "accuracy": 0.7 + n / 50,
                "accuracy_ci95": [0.61 + n / 50, 0.79 + n / 50],
                "p_value": 0.0004,
                "p_holm": 0.0016,
            }
            for n, name in enumerate(SLICES)
        ],
        "longest_wins_accuracy": 0.4125,
        "shortest_wins_accuracy": 0.5875,
        "bag_of_words_accuracy": 0.6475,
        "ece": expected_calibration_error(confidence, correct),
        "ece_null95": calibration_error_null(confidence, seed=0, samples=100),
        "temperature": 1.13,
        "brier": 0.171,
        "log_loss": 0.522,
        "length_correlation": -0.31,
        "by_margin": [
            {"margin_low": k / 4, "margin_high": (k + 1) / 4, "accuracy": 0.55 + k / 25, "n": 40}
            for k in range(10)
        ],
        "calibration": [
            {"confidence": b.confidence, "accuracy": b.accuracy, "n": b.n}
            for b in calibration_bins(confidence, correct)
        ],
    }


def build(
    root: Path,
    *,
    seed: int = 0,
    prompts: int = 120,
    updates: int = 60,
    until: str = "evaluate",
    annotator: str = "simulated",
) -> Path:
    """Writes the folder of a run that got as far as the stage `until`."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.toml").write_text(
        RECIPE.format(name=root.name, seed=seed, annotator=annotator), encoding="utf-8"
    )
    _write_training(root, rng, updates)
    rows = _completions(rng, prompts)
    reward = _reward_section(rng)
    done = ["data", "sft", "collect", "reward", "policy", "evaluate"]
    done = done[: done.index(until) + 1]
    summary = _summary(root.name, seed, annotator, reward, done, updates)
    if "evaluate" in done:
        summary["evaluate"] = _comparisons(rows, seed)
        _jsonl(root / "stages/evaluate/completions.jsonl", rows)
        texts = {name: [row["completions"][name] for row in rows[1:]] for name in ("sft", "tuned")}
        systems = {
            name: {f"distinct_{n}": distinct_n(t, n) for n in (1, 2, 3)}
            | {"duplicates": duplicate_share(t)}
            for name, t in texts.items()
        }
        _json(
            root / "stages/evaluate/diversity.json",
            {"temperature": 1.0, "prompts": 64, "systems": systems},
        )
    _json(root / "summary.json", summary)
    _json(root / "manifest.json", MANIFEST)
    for name in ("sft", "reward", "tuned"):
        (root / "models" / name).mkdir(parents=True, exist_ok=True)
    return root


MANIFEST = {
    "versions": {
        "amenable": "0.1.0",
        "python": "3.11.2",
        "torch": "2.13.0",
        "transformers": "5.23.0",
    },
    "hardware": {"cpu": "x86_64, 2 cores", "memory_gb": 15.6},
    "inputs": {"data/prompts.train.jsonl": "sha256:" + "ab12" * 16},
    "artifacts": {"models/tuned/model.safetensors": "sha256:" + "cd34" * 16},
}


def _summary(
    name: str, seed: int, annotator: str, reward: dict[str, Any], done: list[str], updates: int
) -> dict[str, Any]:
    policy = {
        "algorithm": "ppo", "episodes": 64 * updates, "updates": updates, "reward_first": -0.05,
        "reward_last": 1.19, "kl_last": 4.11, "completion_tokens_mean": 11.2,
    }  # fmt: skip
    times = {
        "data": 6.2,
        "sft": 141.0,
        "collect": 66.4,
        "reward": 118.9,
        "policy": 511.3,
        "evaluate": 96.0,
    }
    health = {
        "rule": "value-explained-variance",
        "stage": "policy",
        "step": 4,
        "level": "warning",
        "message": "The critic explains less than the mean return did (−0.03). Usual in the "
        "first updates; raise the critic's rate if it stays.",
    }
    sections = {
        "data": {"demonstrations": 2100, "preferences": 1264, "prompts": 1500, "dropped": 41},
        "sft": {"steps": 60, "loss_first": 3.66, "loss_last": 2.12},
        "collect": {
            "pairs": {"train": 736, "validation": 64, "test": 406},
            "simulated": annotator == "simulated",
            "annotator": ANNOTATOR if annotator == "simulated" else "",
        },
        "reward": reward,
        "policy": policy,
    }
    return {
        "schema_version": 1,
        "name": name,
        "seed": seed,
        "base_model": "smollm2-135m",
        "device": "cpu",
        "wall_s": sum(times[s] for s in done),
        "peak_rss_gb": 3.4,
        **{key: value if key in done else None for key, value in sections.items()},
        "evaluate": None,
        "health": [health],
        "stages": {
            s: {"status": "done", "wall_s": times[s], "peak_rss_gb": 2.0 + 0.2 * k}
            for k, s in enumerate(done)
        },
    }
