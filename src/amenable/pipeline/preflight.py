"""What is looked at before a run folder is touched or a weight is loaded."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from amenable.config.recipe import Recipe
from amenable.errors import DataError, ModelError
from amenable.pipeline.fingerprint import ready_reward

_DATA_KEYS = ("demonstrations", "preferences", "prompts", "evaluation_prompts")
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_CHATTY = r"(torch|transformers|peft|huggingface_hub|tensorboard|google)\."


def check_inputs(recipe: Recipe) -> None:
    """Returns when every file and folder that the recipe names is there.

    Raises:
        DataError: a data file is missing or empty.
        ModelError: `policy.reward` looks like a path and is no model folder.
    """
    for key in _DATA_KEYS:
        for name in getattr(recipe.data, key):
            _check_data_file(name, f"data.{key}")
    _check_ready_reward(recipe.policy.reward)


def base_model(recipe: Recipe, say: Callable[[str], None]) -> Path | str:
    """The base model's folder, pulled and converted if it is a built-in one; or its hub id.

    Raises:
        ModelError: it cannot serve as a base model.
        StorageError: the model cache cannot be written.
    """
    from amenable.models.check import check_base
    from amenable.models.pull import resolve_base

    base = resolve_base(recipe.model.base, say)
    if isinstance(base, str):
        check_base(base)
    return base


def silence_libraries() -> None:
    """Switches off telemetry, foreign progress bars and what libraries tell their developers.

    Values that the user has set stay.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=_CHATTY)


def close_hub(recipe: Recipe, base: Path | str) -> None:
    """Forbids calls to the hub unless the recipe names something on it."""
    reward = recipe.policy.reward
    named = isinstance(ready_reward(reward), str) and reward and ":" not in reward
    if isinstance(base, str) or named:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _check_data_file(name: str, key: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"is a folder; name the files of {key} in it", path=name)
    if not path.exists():
        here = "" if path.is_absolute() else f" from the current directory, {Path.cwd()}"
        raise DataError(f"no such file{here}; correct {key}", path=name)
    if path.stat().st_size == 0:
        raise DataError(f"is empty; {key} needs at least one row", path=name)


def _check_ready_reward(reward: str) -> None:
    path = Path(reward).expanduser()
    looks_local = reward.startswith((".", "/", "~")) or reward.count("/") > 1
    if not reward or ":" in reward or not (looks_local or path.exists()):
        return
    if not path.is_dir() or not (path / "config.json").exists():
        raise ModelError(
            f"{reward}: no reward-model folder (config.json is missing); correct policy.reward:"
            " a folder, a hub id or module:function"
        )
