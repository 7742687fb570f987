"""Parameters of Google Cloud's RLHF pipelines -> a recipe, and what of them cannot be honoured.

The names, defaults and meanings are those of Google Cloud Pipeline Components 2.22
(`preview.llm.rlhf_pipeline`, `infer_pipeline`, `rlaif_pipeline`); docs/vertex.md has the table.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amenable.config.kfp import KfpConfig
from amenable.config.load import build_section, load_recipe
from amenable.config.policy import PolicyConfig
from amenable.config.recipe import Recipe
from amenable.config.reward import RewardConfig
from amenable.errors import DataError, RecipeError, UsageError
from amenable.models.pull import BUILT_IN

SETTINGS_VARIABLE = "AMENABLE_VERTEX"
"""Environment variable with the path of the settings file."""

BATCH = 64
"""Pairs and prompts in a step: fixed in the reference too."""

LORA_RANK = 4
"""The reference has 4 for the reward model and 1 for the policy; a recipe has one rank for both."""

REWARD_EVALUATION_ROWS = 5000
"""Of a preference-shaped eval_dataset the first so many are scored, as in the reference."""


@dataclass(frozen=True)
class LargeModel:
    """A base model behind a key of `large_model_reference`."""

    base: str
    """A built-in name, a folder or a hub id."""

    chat: bool
    """Prompts are put through the tokenizer's chat template."""


LARGE_MODELS = {
    "llama-2-7b": LargeModel("meta-llama/Llama-2-7b-hf", chat=False),
    "llama-2-7b-chat": LargeModel("meta-llama/Llama-2-7b-chat-hf", chat=True),
    "llama-2-13b": LargeModel("meta-llama/Llama-2-13b-hf", chat=False),
    "llama-2-13b-chat": LargeModel("meta-llama/Llama-2-13b-chat-hf", chat=True),
}

_REFUSED = {
    "t5-": "T5 is an encoder-decoder, and Amenable trains decoders alone",
    "text-bison": "PaLM's weights were never published, and its service has been shut down",
    "chat-bison": "PaLM's weights were never published, and its service has been shut down",
}
_GOOGLE = {
    "project": "no Google Cloud project is used",
    "location": "tasks run where the pipeline runs",
    "encryption_spec_key_name": "files are not encrypted; encrypt the disk or volume",
    "tensorboard_resource_id": "curves are in stages/*/tensorboard of the run folder: "
    "tensorboard --logdir FOLDER",
}


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Who takes the place of Google's closed autorater."""

    source: str = ""
    """A service's URL, a model, a reward model's folder or a function, as of `amenable compare`."""

    model: str = ""
    """The service's name of the model."""

    template: str = ""
    """How it is asked; empty: by the task, summary-1 or answer-1."""

    token_env: str = ""
    """Environment variable with the service's token."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the reference's parameters have no word for: the file that AMENABLE_VERTEX names."""

    models: Mapping[str, str] = field(default_factory=dict)
    """Key of `large_model_reference` -> built-in name, folder or hub id; goes before the table."""

    kfp: KfpConfig = field(default_factory=KfpConfig)
    """Image, volume and resources of the tasks."""

    judge: JudgeSettings = field(default_factory=JudgeSettings)
    """For AI feedback and AutoSxS."""

    set: tuple[str, ...] = ()
    """Changes of the recipe, KEY=VALUE as of `amenable run --set`."""


def read_settings(path: str | None) -> Settings:
    """The settings file; the defaults where none is named.

    Raises:
        RecipeError: it cannot be read, or a key or value is wrong.
    """
    if not path:
        return Settings()
    try:
        with Path(path).open("rb") as file:
            return settings_of(tomllib.load(file), path)
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror}); correct {SETTINGS_VARIABLE}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no valid TOML: {error}") from error


def settings_of(table: Mapping[str, Any], where: str) -> Settings:
    """The settings of a table.

    Raises:
        RecipeError: a key or value is wrong; `where` begins its message.
    """
    known = {"models", "kfp", "judge", "set"}
    if unknown := sorted(set(table) - known):
        raise RecipeError(
            f"{where}: {unknown[0]}: unknown key; there are {', '.join(sorted(known))}"
        )
    models, changes = table.get("models", {}), table.get("set", [])
    if not isinstance(models, dict) or not all(isinstance(base, str) for base in models.values()):
        raise RecipeError(f"{where}: models: must be a section of texts: KEY = FOLDER or hub id")
    if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
        raise RecipeError(f'{where}: set: must be a list of texts, ["policy.epochs=1"]')
    return Settings(
        models={_model_key(key): base for key, base in models.items()},
        kfp=build_section(KfpConfig, table.get("kfp", {}), f"{where}: kfp"),
        judge=build_section(JudgeSettings, table.get("judge", {}), f"{where}: judge"),
        set=tuple(changes),
    )


def large_model(
    key: str, settings: Settings, parameter: str = "large_model_reference"
) -> LargeModel:
    """The model behind a key: of the settings, of the table, or a built-in name or folder itself.

    A model that the user names is asked through its chat template if it has one, unless its key is
    one of the table's.

    Raises:
        UsageError: no model stands behind it.
    """
    name = _model_key(key)
    table = LARGE_MODELS.get(name)
    if name in settings.models:
        return LargeModel(settings.models[name], chat=table.chat if table else True)
    if table is not None:
        return table
    if key in BUILT_IN or Path(key).expanduser().is_dir():
        return LargeModel(key, chat=True)
    for start, reason in _REFUSED.items():
        if name.startswith(start):
            raise UsageError(
                f"{parameter}: {key!r} cannot be had: {reason}; name another model, for example"
                " llama-2-7b or smollm2-135m"
            )
    known = ", ".join({**LARGE_MODELS, **settings.models, **BUILT_IN})
    raise UsageError(
        f"{parameter}: no model {key!r}; there are {known}. A folder can be given as it is; the"
        f" file that {SETTINGS_VARIABLE} names gives it a key: [models], {name} = FOLDER"
    )


def rlhf_recipe(values: Mapping[str, Any], settings: Settings, kind: str = "rlhf") -> Recipe:
    """The recipe of the reference's parameters.

    Args:
        values: of all parameters of `rlhf_pipeline`.
        settings: the user's.
        kind: of the pipeline, for the name of its run.

    Raises:
        UsageError: a parameter's value is wrong.
        DataError: `preference_dataset` or `eval_dataset` cannot be read.
    """
    _check(values)
    model = large_model(values["large_model_reference"], settings)
    reward, policy = RewardConfig(), PolicyConfig()
    reward_rate = values["reward_model_learning_rate_multiplier"]
    policy_rate = values["reinforcement_learning_rate_multiplier"]
    steps = values["reward_model_train_steps"]
    dataset = values["eval_dataset"]
    held_out = [dataset] if evaluation_kind(dataset) == "prompts" else []
    keys = {
        "name": run_name(values, kind),
        **_rendering(values, model),
        "model.lora.rank": LORA_RANK,
        "model.lora.alpha": 2.0 * LORA_RANK,
        "data.preferences": [values["preference_dataset"]],
        "data.prompts": [values["prompt_dataset"]],
        "data.evaluation_prompts": held_out,
        "sft.enabled": False,
        "reward.batch_size": BATCH,
        "reward.max_steps": steps,
        "reward.epochs": _epochs(values["preference_dataset"], steps),
        "reward.learning_rate": reward.learning_rate * reward_rate,
        "policy.updates": values["reinforcement_learning_train_steps"],
        "policy.prompts_per_update": BATCH,
        "policy.samples_per_prompt": 1,
        "policy.learning_rate": policy.learning_rate * policy_rate,
        "policy.ppo.critic_learning_rate": policy.ppo.critic_learning_rate * policy_rate,
        "policy.kl.coef": values["kl_coeff"],
    }
    return recipe_of(keys, settings)


def inference_recipe(values: Mapping[str, Any], settings: Settings) -> Recipe:
    """The recipe that prompts are put with in bulk inference.

    Raises:
        UsageError: a parameter's value is wrong.
    """
    _check(values)
    strategies = ("greedy", "temperature_sampling")
    if values["sampling_strategy"] not in strategies:
        raise UsageError(
            f"sampling_strategy: found {values['sampling_strategy']!r}; expected one of"
            f" {', '.join(strategies)}"
        )
    model = large_model(values["large_model_reference"], settings)
    keys = {"name": run_name(values, "infer"), **_rendering(values, model)}
    return recipe_of(keys | prompts_alone([values["prompt_dataset"]]), settings)


def prompts_alone(files: Sequence[str]) -> dict[str, Any]:
    """Recipe keys of a model that completes prompts and learns nothing."""
    return {"data.prompts": list(files), "reward.enabled": False, "policy.enabled": False}


def not_honoured(values: Mapping[str, Any]) -> list[str]:
    """A line for each parameter that has no meaning off Vertex and was given one."""
    said = [f"{name}: {remark}" for name, remark in _GOOGLE.items() if values.get(name)]
    if values.get("accelerator_type", "GPU") != "CPU":
        said.append(
            f"accelerator_type {values['accelerator_type']}: the device is the one that torch finds"
            " (CUDA, else the CPU); on a cluster kfp.gpus asks for it"
        )
    if values.get("deploy_model"):
        said.append(
            "deploy_model: nothing is deployed, and endpoint_resource_name is empty (Vertex does so"
            " too but for Bison); the tuned model is a Hugging Face folder that any server loads"
        )
    return said


def evaluation_kind(dataset: str) -> str:
    """What eval_dataset holds: `preferences`, `prompts`, or nothing where there is none.

    The first row decides, and every other row must be of its kind: they are all read later on.

    Raises:
        DataError: there is no such file, or no row in it.
    """
    if not dataset:
        return ""
    first = next(records([dataset]))
    has_pair = {"candidate_0", "candidate_1", "choice"} <= first.keys()
    return "preferences" if has_pair else "prompts"


def records(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields every row of JSON Lines files, as a dict.

    Raises:
        DataError: a file is missing or has no row, or a line is no JSON object.
    """
    from amenable.data.reading.sources import find_sources, open_source

    for source in find_sources(files):
        found = False
        with open_source(source) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise DataError(
                        "no JSON object; write one a line", path=source.shown, line=number
                    )
                found = True
                yield row
        if not found:
            raise DataError("is empty; at least one row is needed", path=source.shown)


def run_name(values: Mapping[str, Any], kind: str) -> str:
    """Name of the run folder: model_display_name, else the model's key and what is done with it.

    The reference adds the time. Here the same parameters lead to the same folder, where what is
    done is not done again.
    """
    given = values.get("model_display_name")
    name = str(given or f"{_model_key(values['large_model_reference'])}-{kind}")
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or kind


def _model_key(key: str) -> str:
    return key.lower().replace("_", "-")


def _rendering(values: Mapping[str, Any], model: LargeModel) -> dict[str, Any]:
    return {
        "model.base": model.base,
        "model.chat_template": model.chat,
        "data.instruction": values["instruction"],
        "data.max_prompt_tokens": values["prompt_sequence_length"],
        "data.max_completion_tokens": values["target_sequence_length"],
    }


def recipe_of(keys: Mapping[str, Any], settings: Settings) -> Recipe:
    """The recipe with these keys, and on top of them what the user's settings change.

    Raises:
        RecipeError: a value is wrong.
    """
    texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    return load_recipe(None, [*texts, *settings.set])


def _epochs(preferences: str, steps: int) -> float:
    """Enough passes for so many steps, though some rows are held out: max_steps ends them."""
    from amenable.data.reading.readers import read_preferences

    try:
        rows = len(read_preferences([preferences]))
    except DataError as error:
        raise DataError(
            f"{error.reason} (preference_dataset)",
            path=error.path,
            line=error.line,
            field=error.field,
        ) from error
    return 1.0 + round(2 * BATCH * steps / rows, 1)


def _check(values: Mapping[str, Any]) -> None:
    """Raises UsageError that names the parameter, not the recipe's key."""
    least = {
        "prompt_sequence_length": 1,
        "target_sequence_length": 2,
        "reward_model_train_steps": 1,
        "reinforcement_learning_train_steps": 1,
        "kl_coeff": 0,
    }
    for name, low in least.items():
        if name in values and values[name] < low:
            raise UsageError(f"{name}: must be at least {low}, not {values[name]}")
    for name in (
        "reward_model_learning_rate_multiplier",
        "reinforcement_learning_rate_multiplier",
    ):
        if name in values and values[name] <= 0:
            raise UsageError(f"{name}: must be above 0, not {values[name]}")
    if values["accelerator_type"] not in ("GPU", "TPU", "CPU"):
        raise UsageError(
            f"accelerator_type: found {values['accelerator_type']!r}; expected GPU, TPU or CPU"
        )
