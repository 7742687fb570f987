"""What is looked at before a run folder is touched or a weight is loaded."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from amenable.config.collect import CollectConfig
from amenable.config.data import SourceConfig
from amenable.config.recipe import Recipe
from amenable.config.rewards import is_folder, kind_of, outside_sources, reward_parts
from amenable.data.reading.sources import Source, find_sources, hub_name
from amenable.errors import DataError, ModelError, RecipeError, UsageError
from amenable.ranks.launch import seat
from amenable.trackers import check_trackers

if TYPE_CHECKING:
    from amenable.plan.forecast import Forecast

_DATA_KEYS = ("demonstrations", "preferences", "prompts", "evaluation_prompts")
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_CHATTY = r"(torch|transformers|peft|huggingface_hub|tensorboard|google|vllm)\."


def check_inputs(recipe: Recipe, stages: Collection[str] = ("policy",)) -> None:
    """Returns when every file and folder that the recipe names is there.

    Args:
        recipe: the run.
        stages: that will run, by name; only `policy` makes a difference.

    Raises:
        DataError: a data file is missing or empty.
        RecipeError: `format`, `reader`, a reward or the judge names nothing that exists, or a token
            is not set.
        UsageError: the package of a tracker, or of `policy.engine`, is not installed; or several
            processes would have to share that engine.
        ModelError: `policy.reward` looks like a path and is no model folder, or the package that
            `model.quantise` needs is not installed.
    """
    from amenable.data.reading.custom import load_function
    from amenable.models.check import check_quantiser

    check_trackers(recipe.trackers)
    check_quantiser(recipe.model.quantise)
    if "policy" in stages:
        _check_engine(recipe)
    for key in _DATA_KEYS:
        _check_source(getattr(recipe.data, key), f"data.{key}")
    for name, source in outside_sources(recipe.policy):
        if kind_of(source) == "function":
            load_function(source, name)
        else:
            _check_ready_reward(source, name)
    for part in reward_parts(recipe.policy):
        if part.token_env and not os.environ.get(part.token_env):
            raise RecipeError(
                f"policy.rewards: {part.label}: the environment variable {part.token_env} "
                "(token_env) is not set; set it, or remove the key"
            )
    if recipe.collect.annotator == "judge":
        _check_judge(recipe.collect)


def _check_engine(recipe: Recipe) -> None:
    if recipe.policy.engine != "vllm" or not recipe.policy.enabled:
        return
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            'policy.engine: "vllm" needs the package vllm, which is not installed; '
            'pip install "amenable[vllm]", or set policy.engine = "own"'
        )
    if seat() is not None:
        raise UsageError(
            'policy.engine: "vllm" runs within one process; set policy.engine = "own" for several'
        )


def _check_judge(config: CollectConfig) -> None:
    """What can be wrong with the judge of AI feedback before anything is asked."""
    from amenable.data.reading.custom import load_function
    from amenable.judges.template import load_template

    load_template(config.judge_template)
    if config.judge_token_env and not os.environ.get(config.judge_token_env):
        raise RecipeError(
            f"collect.judge_token_env: the environment variable {config.judge_token_env} is not "
            "set; set it, or remove the key"
        )
    if kind_of(config.judge) == "function":
        load_function(config.judge, "collect.judge")
    else:
        _check_ready_reward(config.judge, "collect.judge")
    if config.judge_audit:
        from amenable.evaluate.judge_audit import read_audit

        read_audit(Path(config.judge_audit))


def base_model(recipe: Recipe, say: Callable[[str], None]) -> Path | str:
    """The base model's folder, pulled and converted if it is a built-in one; or its hub id.

    Raises:
        ModelError: it cannot serve as a base model.
        StorageError: the model cache cannot be written.
    """
    from amenable.models.check import check_base, check_quantisable
    from amenable.models.pull import resolve_base

    base = resolve_base(recipe.model.base, say)
    if isinstance(base, str):
        check_base(base)
    if recipe.model.quantise != "none":
        check_quantisable(base)
    return base


def forecast_run(recipe: Recipe, data: Path, say: Callable[[str], None]) -> Forecast | None:
    """What the run will take on this machine; None, and a line that says why, where that fails.

    Args:
        recipe: the run.
        data: its splits.
        say: takes the line.

    Raises:
        UsageError: the run cannot fit into this machine's memory; says what would.
    """
    try:
        from amenable.plan.forecast import plan
        from amenable.plan.hardware import hardware, resident_bytes
        from amenable.plan.remedy import refuse

        machine = hardware()
        process = resident_bytes() if machine.kind == "cpu" else 0
        found = plan(recipe, machine, data=data, process=process)
    except Exception as error:  # a forecast that fails is no reason to fail a run
        say(f"no forecast of memory and time: {error}")
        return None
    refuse(found)
    return found


def silence_libraries() -> None:
    """Switches off telemetry, foreign progress bars and what libraries tell their developers.

    Values that the user has set stay.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # imported by peft, it advises to fetch a faster product from the hub; ours are torch's
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=_CHATTY)


def close_hub(recipe: Recipe, base: Path | str) -> None:
    """Forbids calls to the hub unless the recipe names a model or data on it."""
    rewards = (source for _, source in outside_sources(recipe.policy))
    named = any(kind_of(source) == "model" and not is_folder(source) for source in rewards)
    if isinstance(base, str) or named or any(map(_is_on_hub, _files(recipe))):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _files(recipe: Recipe) -> Iterator[str]:
    for key in _DATA_KEYS:
        yield from getattr(recipe.data, key).files


def _is_on_hub(name: str) -> bool:
    if Source(name, "").is_hub:
        return not Path(hub_name(name).dataset).is_dir()
    return "hf://" in name


def _check_source(config: SourceConfig, key: str) -> None:
    """Returns when the files are there, and format and reader exist."""
    from amenable.data.formats.table import find_format
    from amenable.data.reading.custom import load_reader

    try:
        for source in find_sources(config.files):
            local = source.local
            if local is not None and local.stat().st_size == 0:
                raise DataError("is empty; at least one row is needed", path=source.shown)
    except DataError as error:
        raise DataError(f"{error.reason} ({key})", path=error.path) from error
    if config.format != "auto":
        find_format(config.format)
    if config.reader:
        load_reader(config.reader)


def _check_ready_reward(reward: str, key: str = "policy.reward") -> None:
    path = Path(reward).expanduser()
    looks_local = reward.startswith((".", "/", "~")) or reward.count("/") > 1
    if kind_of(reward) != "model" or not (looks_local or path.exists()):
        return
    if not path.is_dir() or not (path / "config.json").exists():
        raise ModelError(
            f"{reward}: no reward-model folder (config.json is missing); correct {key}:"
            " a folder, a hub id or module:function"
        )
