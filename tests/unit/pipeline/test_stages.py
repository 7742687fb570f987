from __future__ import annotations

from amenable.config.checks import lookup
from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.pipeline.stages import STAGES, config_values, stage_names

BY_NAME = {stage.name: stage for stage in STAGES}
DEMO = ("data.task=docstrings", "collect.annotator=simulated")


def on(*overrides: str) -> list[str]:
    recipe = load_recipe(None, overrides)
    return [stage.name for stage in STAGES if not stage.off(recipe)]


def test_order() -> None:
    assert stage_names() == ["data", "sft", "collect", "reward", "policy", "evaluate", "report"]


def test_needs_come_before() -> None:
    names = stage_names()
    for stage in STAGES:
        assert all(names.index(needed) < names.index(stage.name) for needed in stage.needs)


def test_keys_exist() -> None:
    for stage in STAGES:
        for key in (*stage.config, *stage.sources):
            assert lookup(Recipe(), key) is not None


def test_every_recipe_key_belongs_to_a_stage() -> None:
    from amenable.config.load import flatten

    used = {key for stage in STAGES for key in config_values(stage, flatten(Recipe()))}
    without_effect_on_results = {"schema_version", "trackers", "health.off", "health.stop_on"}
    without_effect_on_results |= {
        key for key in flatten(Recipe()) if key.startswith(("checkpoint.", "kfp.", "ray."))
    }
    assert set(flatten(Recipe())) - used == without_effect_on_results


def test_built_in_task_takes_every_stage() -> None:
    assert on(*DEMO) == stage_names()


def test_preference_file_replaces_collecting() -> None:
    assert on("data.preferences=p.jsonl") == ["data", "reward", "policy", "evaluate", "report"]
    demo = [value for value in DEMO if not value.startswith("collect.annotator")]
    assert "collect" not in on(*demo, "data.preferences=p.jsonl")


def test_ready_reward_replaces_collecting_and_reward() -> None:
    assert on(*DEMO, "policy.reward=m:f") == ["data", "sft", "policy", "evaluate", "report"]


def test_switches() -> None:
    off = ("sft.enabled=false", "policy.enabled=false", "evaluate.enabled=false")
    assert on(*DEMO, *off) == ["data", "collect", "reward", "report"]
    assert on(*DEMO, "reward.enabled=false", "policy.enabled=false") == [
        "data",
        "sft",
        "evaluate",
        "report",
    ]


def test_section_does_not_catch_keys_that_only_begin_alike() -> None:
    values = config_values(BY_NAME["sft"], {"sft.epochs": 1, "sftx": 2, "model.lora.rank": 3})
    assert values == {"sft.epochs": 1, "model.lora.rank": 3}
