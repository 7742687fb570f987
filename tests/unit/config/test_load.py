from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amenable.config.checks import RANGES, lookup
from amenable.config.data import PreferenceSource
from amenable.config.load import (
    field_help,
    flatten,
    load_recipe,
    recipe_keys,
    to_toml,
)
from amenable.config.policy import PPOConfig
from amenable.config.recipe import Recipe
from amenable.config.rewards import RewardPart
from amenable.errors import RecipeError

EXAMPLES = Path(__file__).parents[3] / "examples"
VALID = ("data.task=docstrings", "collect.annotator=simulated")
READY = ("data.task=docstrings", "policy.reward=m:f")  # valid with and without preference files


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [*VALID, *overrides])
    return str(caught.value)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, 'seed = 3\n[data]\nprompts = ["a", "b"]\n[policy]\nreward = "m:f"\n')
    recipe = load_recipe(path, ["policy.kl.coef=1", "policy.updates=7", "name=x"])
    assert recipe.seed == 3
    assert recipe.data.prompts.files == ("a", "b")
    assert recipe.policy.kl.coef == 1.0
    assert isinstance(recipe.policy.kl.coef, float)
    assert (recipe.policy.updates, recipe.name) == (7, "x")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=7", "name", "7"),
        ("name='a b'", "name", "a b"),
        ("name=a=b", "name", "a=b"),
        ("data.instruction=Say it: now", "data.instruction", "Say it: now"),
        ("sft.enabled=false", "sft.enabled", False),
        ("sft.learning_rate=1e-5", "sft.learning_rate", 1e-5),
        ("data.preferences=one.jsonl", "data.preferences.files", ("one.jsonl",)),
        ("data.preferences=['a', 'b']", "data.preferences.files", ("a", "b")),
        ("data.preferences.files=one.jsonl", "data.preferences.files", ("one.jsonl",)),
        ("data.prompts.columns.id=name", "data.prompts.columns.id", "name"),
        (" seed = 4 ", "seed", 4),
    ],
)
def test_override_values(override: str, key: str, value: object) -> None:
    assert lookup(load_recipe(None, [*READY, override]), key) == value


@pytest.mark.parametrize(
    "given",
    ["data.preferences = 'a'", "data.preferences = ['a']", "[data.preferences]\nfiles = ['a']"],
)
def test_files_of_a_kind_stand_for_their_section(given: str, tmp_path: Path) -> None:
    path = write(tmp_path, given)
    overrides = ["data.preferences.pairs=best_worst", "data.preferences.format=hh"]
    for more, files in (([], ("a",)), (["data.preferences=b"], ("b",))):
        source = load_recipe(path, [*overrides, *more, "data.prompts=p"]).data.preferences
        assert (source.files, source.format) == (files, "hh")
        assert source.pairs == "best_worst"
        assert source


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("format = 'hh'\nreader = 'a.py:f'", "reader: format is named as well, and one of them"),
        ("format = 'hh'\ncolumns.id = 'n'", "columns: format is named as well"),
        ("reader = 'a.py:f'\ncolumns.id = 'n'", "columns: reader is named as well"),
        ("columns.choice_values = ['2', '2']", r"columns.choice_values: found \['2', '2'\]; exp"),
        ("columns.choice_values = ['2']", r"columns.choice_values: found \['2'\]; exp"),
        ("columns.choice_values = ['1', '2', '3', '4']", "columns.choice_values: found .* exp"),
    ],
)
def test_a_source_is_read_in_one_way(given: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"[data.preferences]\nfiles = ['a']\n{given}")
    with pytest.raises(RecipeError, match=rf"recipe.toml: data.preferences.{told}"):
        load_recipe(path, ["data.prompts=p"])


def test_a_verdict_may_be_in_three_words(tmp_path: Path) -> None:
    verdicts = "columns.choice_values = ['a', 'b', 'tie']"
    path = write(tmp_path, f"[data.preferences]\nfiles = ['a']\n{verdicts}")
    source = load_recipe(path, ["data.prompts=p"]).data.preferences
    assert source.columns.choice_values == ("a", "b", "tie")


def test_a_source_is_checked_like_any_section(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.preferences\.file: unknown key; did you mean"):
        load_recipe(write(tmp_path, "[data.preferences]\nfile = ['a']"))
    with pytest.raises(RecipeError, match=r"data\.preferences\.shorthand: unknown key"):
        load_recipe(write(tmp_path, "[data.preferences]\nshorthand = 'a'"))
    with pytest.raises(RecipeError, match=r"data\.preferences\.files: must be a text or a list"):
        load_recipe(write(tmp_path, "data.preferences = 7"))


def test_defaults_written_out_load_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(None, [*READY, "data.preferences=['ä\"b\\\\c']", "policy.kl.coef=1e-7"])
    text = to_toml(recipe)
    assert load_recipe(write(tmp_path, text)) == recipe
    for key in recipe_keys():
        assert "[]" in key.key or f"{key.key.rsplit('.', 1)[-1]} = " in text


@given(
    name=st.text(st.characters(categories=["L", "N"]), min_size=1),
    instruction=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")),
    rate=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**32 - 1),
    files=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)),
)
def test_any_recipe_survives_toml(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    instruction: str,
    rate: float,
    seed: int,
    files: list[str],
) -> None:
    recipe = load_recipe(None, READY)
    recipe = replace(
        recipe,
        name=name,
        seed=seed,
        data=replace(
            recipe.data, instruction=instruction, preferences=PreferenceSource(files=tuple(files))
        ),
        sft=replace(recipe.sft, learning_rate=rate),
    )
    path = tmp_path_factory.mktemp("toml") / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("data.promts", "did you mean data.prompts?"),
        ("polcy", "did you mean policy?"),
        ("policy.kl.coeff", "did you mean policy.kl.coef?"),
        ("gae_lambda", "did you mean policy.ppo.gae_lambda?"),
        ("quite.something_else", "remove it"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, near: str) -> None:
    message = refused(f"{key}=1")
    assert f"{key.split('.')[0]}" in message
    assert "unknown key" in message
    assert near in message


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[sft]\nepoch = 2\n")
    with pytest.raises(RecipeError, match=r"recipe\.toml: sft\.epoch: unknown key; did you mean"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.updates=true", "policy.updates: must be a whole number, not True"),
        ("policy.updates=1.5", "must be a whole number, not 1.5"),
        ("policy.updates=ten", "must be a whole number, not 'ten'"),
        ("sft.enabled=1", "must be true or false, not 1"),
        ("sft.learning_rate=true", "must be a number, not True"),
        ("sft.learning_rate=nan", "must be a finite number, not nan"),
        ("policy.algorithm=pro", 'policy.algorithm: must be "ppo" or "grpo" or '),
        ("data.task=3", 'must be "files" or "docstrings", not 3'),
        ("data.prompts=3", "must be a text or a list of texts"),
        ("data.prompts=[1]", "must be a text or a list of texts"),
        ("policy.kl=3", "must be a section, [policy.kl], not 3"),
        ("seed.x=3", "seed: must be a whole number"),
    ],
)
def test_mistyped_value(override: str, words: str) -> None:
    assert words in refused(override)


@pytest.mark.parametrize("override", ["policy.updates", "=3", "policy..updates=3"])
def test_override_that_is_none(override: str) -> None:
    assert "write for example --set policy.updates=50" in refused(override)


def test_override_through_a_value() -> None:
    with pytest.raises(RecipeError, match="name is a value in the recipe, not a section"):
        load_recipe(None, [*VALID, "name=x", "name.y=3"])


@pytest.mark.parametrize("key", RANGES)
def test_ranges_are_checked_and_hold_for_the_defaults(key: str) -> None:
    default = lookup(Recipe(), key)
    assert RANGES[key].holds(default)
    number = RANGES[key].low - 1 if isinstance(default, int) else RANGES[key].low - 0.5
    text = f"{number:.0f}" if isinstance(default, int) else f"{number}"
    assert f"{key}: must be {RANGES[key]}, not" in refused(f"{key}={text}")


def test_ends_of_a_range() -> None:
    assert "policy.ppo.gamma: must be above 0 and at most 1" in refused("policy.ppo.gamma=0")
    assert "gae_lambda" in refused("policy.ppo.gae_lambda=1.01")
    assert load_recipe(None, [*VALID, "policy.ppo.gae_lambda=0"]).policy.ppo.gae_lambda == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.shard=fsdp2"],
            'model.shard: "fsdp2" spreads weights that are trained, and with LoRA the base is',
        ),
        (
            ["model.quantise=nf4", "model.lora.enabled=false"],
            'model.quantise: "nf4" freezes the base, and model.lora.enabled = false trains every',
        ),
        (
            ["policy.engine=vllm", "policy.algorithm=dpo"],
            "policy.engine: dpo learns from preferences and rolls nothing out; remove the key",
        ),
        (
            ["policy.engine=vllm", "model.quantise=nf4"],
            'policy.engine: "vllm" samples with whole weights, which a base in nf4 does not have',
        ),
        (
            ["policy.engine=vllm", "policy.temperature=2.5"],
            "policy.temperature: 2.5 is out of what vLLM samples at; set at least 0.01 and at most",
        ),
        (
            ["policy.engine=vllm", "evaluate.temperature=0.005"],
            "evaluate.temperature: 0.005 is out of what vLLM samples at",
        ),
        (["policy.engine=vllm", "model.dtype=fp64"], 'policy.engine: "vllm" has no fp64; set'),
        (
            ["policy.engine=vllm", "policy.vllm.ratio_cap=0.5"],
            "policy.vllm.ratio_cap: 0.5 would hold every token's weight below 1; set at least 1",
        ),
        (["policy.top_p=0.9"], "policy.top_p: must be 1 in training, not 0.9"),
        (["policy.top_k=50"], "policy.top_k: must be 0 in training, not 50"),
        (["data.task=files"], 'set data.task = "docstrings" for the built-in task'),
        (["data.prompts=a.jsonl"], "data.prompts: would be ignored"),
        (["data.test_share=0.6", "data.validation_share=0.4"], "leave nothing to train on; set"),
        (["data.test_share=0"], "0 holds nothing out; set a share above 0"),
        (["collect.annotator=none"], "data.preferences: is empty"),
        (["reward.enabled=false"], "reward.enabled: is false, and policy.reward names no"),
        (["policy.minibatches=7"], "7 does not divide the 16 prompts"),
        (["data.preferences=a.jsonl"], 'collect.annotator: "simulated" would collect nothing'),
        (["evaluate.best_of=1"], "set 0 to leave it out"),
        (["kfp.image="], "kfp.image: is empty"),
        (["kfp.mount=runs"], "kfp.mount: 'runs' is no place in a container"),
        (["kfp.memory=16 GB"], "kfp.memory: '16 GB' is no amount of memory"),
        (["kfp.cpu=four"], "kfp.cpu: 'four' is no number of CPUs"),
        (["name=a/b"], "cannot name a folder"),
        (["name="], "cannot name a folder"),
        (["model.base="], "model.base: is empty"),
    ],
)
def test_contradictions_name_key_and_remedy(overrides: list[str], words: str) -> None:
    assert words in refused(*overrides)


def test_ready_reward_needs_no_preferences() -> None:
    overrides = ["data.task=docstrings", "policy.reward=my.module:score"]
    assert load_recipe(None, overrides).policy.reward == "my.module:score"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema_version = 2", "this Amenable reads version 1"),
        ("a = ", "no valid TOML"),
        ("\x00", "no valid TOML"),
    ],
)
def test_faulty_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, text))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file; give a path from"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(tmp_path)


MIX = """
[[policy.rewards]]
source = "rule:length"
max_words = 5
[[policy.rewards]]
source = "m:f"
weight = 2
"""


def mix(tmp_path: Path, *overrides: str, text: str = MIX) -> tuple[RewardPart, ...]:
    path = write(tmp_path, text)
    return load_recipe(path, ["data.task=docstrings", *overrides]).policy.rewards


def test_list_of_sections(tmp_path: Path) -> None:
    first, second = mix(tmp_path)
    assert first == RewardPart(source="rule:length", max_words=5)
    assert second == RewardPart(source="m:f", weight=2.0)
    assert isinstance(second.weight, float)
    assert mix(tmp_path, "collect.annotator=simulated", text="") == ()
    assert mix(tmp_path, text="[policy.rewards]\nsource = 'm:f'") == (RewardPart(source="m:f"),)


def test_list_of_sections_survives_toml(tmp_path: Path) -> None:
    keys = "[[policy.rewards]]\nsource = 'rule:json'\nkeys = ['a \"b\"', 'ä']"
    recipe = load_recipe(write(tmp_path, MIX + keys), ["data.task=docstrings"])
    text = to_toml(recipe)
    assert text.count("[[policy.rewards]]") == 3
    assert load_recipe(write(tmp_path, text)) == recipe
    (_, _, last) = flatten(recipe)["policy.rewards"]
    assert last["keys"] == ['a "b"', "ä"]
    assert last["weight"] == 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("policy.rewards[1].weight=3", [("rule:length", 1), ("m:f", 3)]),
        ("policy.rewards[1].source=a:b", [("rule:length", 1), ("a:b", 2)]),
        ("policy.rewards[2].source=own", [("rule:length", 1), ("m:f", 2), ("own", 1)]),
        ("policy.rewards=[{source = 'm:g'}]", [("m:g", 1)]),
        ("policy.rewards={source = 'm:g'}", [("m:g", 1)]),
    ],
)
def test_set_reaches_into_a_list(
    override: str, expected: list[tuple[str, float]], tmp_path: Path
) -> None:
    parts = mix(tmp_path, "collect.annotator=simulated", override)
    assert [(part.source, part.weight) for part in parts] == expected


def test_set_begins_a_list(tmp_path: Path) -> None:
    overrides = ("policy.rewards[0].source=m:f", "policy.rewards[0].weight=3")
    assert mix(tmp_path, *overrides, text="") == (RewardPart(source="m:f", weight=3.0),)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.rewards[4].source=m:f", "the recipe has 2 such, from [0] on"),
        ("policy.rewards.source=m:f", "say which of the sections is meant: [0] is the first"),
        ("policy.rewards[0]=m:f", "no KEY=VALUE; write for example"),
        ("policy.rewards[x].source=m:f", "no KEY=VALUE; write for example"),
        ("policy.updates[0].source=m:f", "[0] must follow a list of sections"),
        ("data.prompts[0].files=a", "[0] must follow a list of sections"),
        ("policy.rewards=3", "policy.rewards: must be a list of sections, [[policy.rewards]], not"),
        ("policy.rewards=['m:f']", "policy.rewards: must be a list of sections"),
        ("policy.rewards[1].weight=x", "policy.rewards[1].weight: must be a number, not 'x'"),
        ("policy.rewards[1].keys=3", "policy.rewards[1].keys: must be a text or a list of texts"),
        ("policy.rewards[1].normalise=all", '[1].normalise: must be "none" or "running", not'),
        ("policy.rewards[1].wieght=1", "unknown key; did you mean policy.rewards[1].weight?"),
        ("policy.reward[1].weight=1", "[1] must follow a list of sections"),
        ("policy.rewards[0].max_words=-1", "policy.rewards[0].max_words: must be at least 0, not"),
    ],
)
def test_fault_in_a_list_names_the_section(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        mix(tmp_path, override)
    assert words in str(caught.value)


def test_keys_of_a_list_are_described() -> None:
    keys = {key.key: key for key in recipe_keys()}
    assert keys["policy.rewards"].type_text == "a list of sections, [[policy.rewards]]"
    assert keys["policy.rewards"].default == []
    weight = keys["policy.rewards[].weight"]
    assert (weight.type_text, weight.default) == ("a number", 1.0)
    assert weight.help.startswith("Factor in the sum")


def test_every_key_has_help_and_a_default() -> None:
    keys = recipe_keys()
    assert [key.key for key in keys if "[]" not in key.key] == list(flatten(Recipe()))
    assert [key.key for key in keys if not key.help] == []
    updates = next(key for key in keys if key.key == "policy.updates")
    assert (updates.type_text, updates.default, updates.help) == (
        "a whole number",
        100,
        "Roll-out batches.",
    )


def test_field_help_is_the_string_under_the_field() -> None:
    texts: dict[str, Any] = field_help(PPOConfig)
    assert texts["gamma"] == "Discount a token."


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ([], (2048, 2048, 2048, 2048)),
        (["model.lora.enabled=false"], (1024, 1024, 1024, 1024)),
        (["sft.micro_batch_tokens=64", "reward.micro_batch_tokens=0"], (64, 2048, 2048, 2048)),
    ],
)
def test_micro_batches_are_sized_by_the_kind_of_training(
    settings: list[str], tokens: tuple[int, ...]
) -> None:
    """The recipe in the run folder has the number."""
    recipe = load_recipe(None, [*READY, *settings])
    sections = (recipe.sft, recipe.reward, recipe.policy, recipe.policy.preference)
    assert tuple(section.micro_batch_tokens for section in sections) == tokens
    assert to_toml(recipe).count(f"micro_batch_tokens = {tokens[-1]}\n") == tokens.count(tokens[-1])
