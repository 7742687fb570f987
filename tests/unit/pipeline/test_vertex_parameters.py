"""Parameters of Google Cloud's RLHF pipelines as recipes. Expected values are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amenable.errors import DataError, RecipeError, UsageError
from amenable.pipeline.vertex_parameters import (
    Settings,
    evaluation_kind,
    inference_recipe,
    large_model,
    not_honoured,
    read_settings,
    records,
    rlhf_recipe,
    run_name,
)

PAIR = {"input_text": "a", "candidate_0": " b", "candidate_1": " c", "choice": 1}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """128 pairs and two prompts, in files of the course's names."""
    monkeypatch.chdir(tmp_path)
    pairs = [json.dumps({**PAIR, "input_text": f"a {n}"}) for n in range(128)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    (tmp_path / "prompts.jsonl").write_text('{"input_text": "x"}\n{"input_text": "y"}\n')
    return tmp_path


def values(**changes: Any) -> dict[str, Any]:
    """All parameters: the course's, and the defaults of the others."""
    course = {
        "preference_dataset": "pairs.jsonl",
        "prompt_dataset": "prompts.jsonl",
        "eval_dataset": "",
        "large_model_reference": "llama-2-7b",
        "reward_model_train_steps": 1410,
        "reinforcement_learning_train_steps": 320,
        "reward_model_learning_rate_multiplier": 1.0,
        "reinforcement_learning_rate_multiplier": 0.2,
        "kl_coeff": 0.1,
        "instruction": "Summarize in less than 50 words",
    }
    others = {
        "model_display_name": "",
        "prompt_sequence_length": 512,
        "target_sequence_length": 64,
        "deploy_model": True,
        "project": "",
        "accelerator_type": "GPU",
        "location": "",
        "encryption_spec_key_name": "",
        "tensorboard_resource_id": "",
    }
    return {**course, **others, **changes}


def test_course_values_become_a_recipe(data: Path) -> None:
    """Of 128 pairs 1410 steps of 64 are 705 passes; some are held out, so twice that and one."""
    recipe = rlhf_recipe(values(), Settings())
    assert recipe.name == "llama-2-7b-rlhf"
    assert (recipe.model.base, recipe.model.chat_template) == ("meta-llama/Llama-2-7b-hf", False)
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (4, 8.0)
    assert recipe.data.preferences.files == ("pairs.jsonl",)
    assert recipe.data.prompts.files == ("prompts.jsonl",)
    assert recipe.data.evaluation_prompts.files == ()
    assert recipe.data.instruction == "Summarize in less than 50 words"
    assert (recipe.data.max_prompt_tokens, recipe.data.max_completion_tokens) == (512, 64)
    assert not recipe.sft.enabled
    assert (recipe.reward.batch_size, recipe.reward.max_steps) == (64, 1410)
    assert recipe.reward.epochs == 1411.0
    assert recipe.reward.learning_rate == 3e-4
    assert (recipe.policy.updates, recipe.policy.prompts_per_update) == (320, 64)
    assert recipe.policy.samples_per_prompt == 1
    assert recipe.policy.learning_rate == pytest.approx(2e-5)
    assert recipe.policy.ppo.critic_learning_rate == pytest.approx(6e-5)
    assert recipe.policy.kl.coef == 0.1
    assert (recipe.policy.algorithm, recipe.collect.annotator) == ("ppo", "none")


def test_settings_change_the_recipe_last(data: Path) -> None:
    settings = Settings(set=("policy.epochs=1", "model.lora.rank=16"))
    recipe = rlhf_recipe(values(model_display_name="My model!"), settings)
    assert (recipe.policy.epochs, recipe.model.lora.rank) == (1, 16)
    assert recipe.name == "My-model"


def test_eval_prompts_are_the_held_out_ones(data: Path) -> None:
    recipe = rlhf_recipe(values(eval_dataset="prompts.jsonl"), Settings())
    assert recipe.data.evaluation_prompts.files == ("prompts.jsonl",)
    assert rlhf_recipe(values(eval_dataset="pairs.jsonl"), Settings()).data.evaluation_prompts == (
        rlhf_recipe(values(), Settings()).data.evaluation_prompts
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_coeff": -0.1}, "kl_coeff: must be at least 0, not -0.1"),
        ({"target_sequence_length": 1}, "target_sequence_length: must be at least 2, not 1"),
        ({"prompt_sequence_length": 0}, "prompt_sequence_length: must be at least 1"),
        ({"reward_model_train_steps": 0}, "reward_model_train_steps: must be at least 1"),
        ({"reinforcement_learning_train_steps": 0}, "reinforcement_learning_train_steps: must be"),
        (
            {"reinforcement_learning_rate_multiplier": 0},
            "reinforcement_learning_rate_multiplier: must be above 0, not 0",
        ),
        ({"accelerator_type": "NPU"}, "accelerator_type: found 'NPU'; expected GPU, TPU or CPU"),
    ],
)
def test_wrong_value_names_the_parameter(changes: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(UsageError, match=words):
        rlhf_recipe(values(**changes), Settings())


def test_wrong_data_names_the_parameter(data: Path) -> None:
    with pytest.raises(DataError, match=r"no such file .*\(preference_dataset\)"):
        rlhf_recipe(values(preference_dataset="none.jsonl"), Settings())
    (data / "bad.jsonl").write_text('{"input_text": "a"}\nb\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no JSON object; write one a line"):
        list(records(["bad.jsonl"]))
    (data / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty; at least one row is needed"):
        evaluation_kind("none.jsonl")


def test_inference_recipe(data: Path) -> None:
    recipe = inference_recipe(values(sampling_strategy="greedy"), Settings())
    assert recipe.name == "llama-2-7b-infer"
    assert recipe.data.instruction == "Summarize in less than 50 words"
    assert not recipe.policy.enabled
    with pytest.raises(UsageError, match="sampling_strategy: found 'beam'; expected one of greedy"):
        inference_recipe(values(sampling_strategy="beam"), Settings())


@pytest.mark.parametrize(
    ("key", "base", "chat"),
    [
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf", False),
        ("LLAMA_2_7B_CHAT", "meta-llama/Llama-2-7b-chat-hf", True),
        ("llama-2-13b", "meta-llama/Llama-2-13b-hf", False),
        ("llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", True),
        ("smollm2-135m", "smollm2-135m", True),
    ],
)
def test_models_of_the_table(key: str, base: str, chat: bool) -> None:
    found = large_model(key, Settings())
    assert (found.base, found.chat) == (base, chat)


def test_users_table_goes_first(tmp_path: Path) -> None:
    settings = Settings(models={"llama-2-7b": "/models/llama", "t5-small": "tiny"})
    assert large_model("llama-2-7b", settings).base == "/models/llama"
    assert not large_model("llama_2_7b", settings).chat
    assert large_model("t5-small", settings).base == "tiny"
    assert large_model(str(tmp_path), settings).base == str(tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("t5-xxl", "T5 is an encoder-decoder, and Amenable trains decoders alone"),
        ("text-bison@001", "PaLM's weights were never published"),
        ("chat_bison@001", "its service has been shut down"),
        ("gpt-5", r"no model 'gpt-5'; there are llama-2-7b, .*\[models\], gpt-5 = FOLDER"),
    ],
)
def test_model_that_cannot_be_had(key: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        large_model(key, Settings())


def test_what_is_not_honoured_is_told() -> None:
    said = not_honoured(values(accelerator_type="CPU", deploy_model=False))
    assert said == []
    said = not_honoured(
        values(project="p", location="l", encryption_spec_key_name="k", tensorboard_resource_id="t")
    )
    names = [line.partition(":")[0] for line in said]
    assert names == [
        "project",
        "location",
        "encryption_spec_key_name",
        "tensorboard_resource_id",
        "accelerator_type GPU",
        "deploy_model",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 1", r"model: unknown key; there are judge, kfp, models, set"),
        ("models = 1", "models: must be a section of texts"),
        ("set = [1]", "set: must be a list of texts"),
        ("kfp.gpu = 1", "kfp: gpu: unknown key"),
        ("judge.source = 1", "judge: source: must be text in quotes"),
        ("=", "no valid TOML"),
    ],
)
def test_faults_of_the_settings_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "vertex.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_settings(str(path))


def test_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "vertex.toml"
    path.write_text('set = ["seed=1"]\n[models]\nLlama_2_7b = "x"\n[kfp]\ngpus = 2\n')
    found = read_settings(str(path))
    assert (found.models, found.kfp.gpus, found.set) == ({"llama-2-7b": "x"}, 2, ("seed=1",))
    assert read_settings(None) == Settings()
    with pytest.raises(RecipeError, match=r"cannot be read .*correct AMENABLE_VERTEX"):
        read_settings(str(tmp_path / "none.toml"))


def test_run_name() -> None:
    assert run_name({"large_model_reference": "Llama_2_7b"}, "infer") == "llama-2-7b-infer"
    assert run_name({"large_model_reference": "/a/b"}, "rlhf") == "a-b-rlhf"
