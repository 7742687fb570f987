"""Logs of other trainers as rows of ours: what each tag means here.

Known by themselves are Amenable's run folders and TRL's (`trainer_state.json` of a checkpoint, or
its rows as JSON Lines). Any other log is read through a map of tags, TensorBoard or JSON Lines.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amenable.artifacts import whole_rows
from amenable.errors import DataError, UsageError

Json = dict[str, Any]

_COMPLEMENT = "1 - "
"""Before our name: theirs is what is left to 1."""

STAGES = ("sft", "reward", "policy")

TRL_PPO = {
    "objective/scores": "reward",
    "objective/kl": "kl_loss",
    "policy/entropy_avg": "entropy",
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "clip_fraction",
}
"""TRL's PPOTrainer (1.12 and before)."""

TRL_GROUPS = {
    "reward": "reward",
    "kl": "kl_loss",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "completions/mean_length": "completion_tokens",
    "frac_reward_zero_std": "without_spread",
    "clip_ratio/region_mean": "clip_fraction",
    "completions/clipped_ratio": "1 - eos_rate",
}
"""TRL's GRPOTrainer and RLOOTrainer."""

TRL_DPO = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "grad_norm": "grad_norm",
    "rewards/accuracies": "accuracy",
    "eval_rewards/accuracies": "eval_accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
}
"""TRL's DPOTrainer."""

TRL_REWARD = {
    "loss": "rank_loss",
    "eval_loss": "eval_rank_loss",
    "accuracy": "accuracy",
    "eval_accuracy": "eval_accuracy",
    "margin": "margin",
    "grad_norm": "grad_norm",
}
"""TRL's RewardTrainer."""

TRL_SFT = {"loss": "loss", "eval_loss": "eval_loss", "grad_norm": "grad_norm"}
"""TRL's SFTTrainer, and any other Trainer of transformers."""


@dataclass(frozen=True)
class Log:
    """Rows under our names, and whose they are."""

    stage: str
    rows: list[Json]
    source: str


def open_logs(path: Path, tags: Path | None = None) -> list[Log]:
    """Everything that can be checked under a path.

    Args:
        path: a run folder; a folder of TensorBoard events; `trainer_state.json` or a folder with
            it; or JSON Lines.
        tags: TOML with `stage` and a table `tags` of THEIRS = "OURS".

    Raises:
        UsageError: there is nothing that is known.
        DataError: a file is broken.
    """
    if tags is not None:
        stage, names = _read_tags(tags)
        return [Log(stage, [_renamed(row, names) for row in _rows(path)], str(path))]
    if (path / "stages").is_dir():
        found = [
            Log(stage, whole_rows(file), str(file))  # a run that goes on may be writing a line
            for stage in STAGES
            if (file := path / "stages" / stage / "metrics.jsonl").is_file()
        ]
        if found:
            return found
        raise UsageError(f"{path}: the run has no figures yet")
    rows = _rows(path)
    stage, names = _of_trl({key for row in rows for key in row}, path)
    return [Log(stage, [_renamed(row, names) for row in rows], str(path))]


def _of_trl(keys: set[str], path: Path) -> tuple[str, Mapping[str, str]]:
    """By the tags that only one trainer writes."""
    if "objective/kl" in keys:
        return "policy", TRL_PPO
    if "frac_reward_zero_std" in keys or "completions/mean_length" in keys:
        return "policy", TRL_GROUPS
    if "rewards/chosen" in keys:
        return "policy", TRL_DPO
    if "margin" in keys and "accuracy" in keys:
        return "reward", TRL_REWARD
    if "loss" in keys:
        return "sft", TRL_SFT
    raise UsageError(
        f"{path}: whose log this is cannot be told from its tags ({', '.join(sorted(keys)[:8])}); "
        "name them with --tags FILE (docs/health.md)"
    )


def _read_tags(path: Path) -> tuple[str, Mapping[str, str]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}; it must be TOML") from error
    stage, names = table.get("stage"), table.get("tags")
    if stage not in STAGES:
        raise DataError(f"{path}: stage: found {stage!r}; expected one of {', '.join(STAGES)}")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f'{path}: tags: expected a table of "THEIR TAG" = "our_name"')
    return stage, names


def _renamed(row: Json, names: Mapping[str, str]) -> Json:
    step = row.get("step")
    found: Json = {"step": step} if step is not None else {}
    for theirs, ours in names.items():
        value = row.get(theirs)
        if isinstance(value, int | float):
            name = ours.removeprefix(_COMPLEMENT)
            found[name] = value if name == ours else 1 - value
    return found


def _rows(path: Path) -> list[Json]:
    """Of a file or folder in any of the shapes."""
    if path.is_dir() and (path / "trainer_state.json").is_file():
        path = path / "trainer_state.json"
    if path.is_dir():
        return _tensorboard(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    rows = _trainer_state(path) if path.suffix == ".json" else list(_json_lines(path))
    if not rows:
        raise UsageError(f"{path}: the log has no rows yet")
    return rows


def _trainer_state(path: Path) -> list[Json]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no trainer state: `log_history` is missing") from error
    return [row for row in rows if isinstance(row, dict)]


def _json_lines(path: Path) -> Iterator[Json]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected an object")
            yield row


def _tensorboard(path: Path) -> list[Json]:
    """The scalars of all event files under a folder, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted({file.parent for file in path.rglob("events.out.tfevents.*")})
    if not folders:
        raise UsageError(f"{path}: no run folder, no trainer_state.json and no TensorBoard events")
    by_step: dict[int, Json] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                if math.isfinite(event.value):
                    name = tag.removeprefix("train/")
                    by_step.setdefault(event.step, {"step": event.step})[name] = event.value
    return [by_step[step] for step in sorted(by_step)]
