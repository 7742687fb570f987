from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest

from amenable.artifacts import StageContext
from amenable.config.policy import PolicyConfig
from amenable.errors import RecipeError
from amenable.train.registry import ALGORITHMS, Algorithm, run_policy

MakeContext = Callable[..., StageContext]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_names_a_function(name: str) -> None:
    module, _, function = ALGORITHMS[name].run.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert ALGORITHMS[name].summary


def test_the_recipe_knows_the_rows_of_the_table() -> None:
    assert set(get_args(get_type_hints(PolicyConfig)["algorithm"])) == set(ALGORITHMS)


def test_the_named_algorithm_is_run(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("echo_algorithm")
    module.echo = lambda ctx: {"stage": ctx.stage}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "echo_algorithm", module)
    monkeypatch.setitem(ALGORITHMS, "ppo", Algorithm(run="echo_algorithm:echo", summary="says"))
    assert run_policy(make_context("policy")) == {"stage": "policy"}


def test_an_unknown_algorithm_is_refused(make_context: MakeContext) -> None:
    ctx = make_context("policy")
    policy: Any = dataclasses.replace(ctx.recipe.policy, algorithm="a2c")  # type: ignore[arg-type]
    wrong = dataclasses.replace(ctx, recipe=dataclasses.replace(ctx.recipe, policy=policy))
    with pytest.raises(RecipeError, match=r"policy.algorithm = 'a2c' is unknown; choose from \["):
        run_policy(wrong)
