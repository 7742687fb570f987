from __future__ import annotations

import dataclasses
import importlib
import io
import sys
import types
from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest

from amenable.algorithms import ALGORITHMS, Algorithm
from amenable.artifacts import StageContext
from amenable.config.policy import PolicyConfig
from amenable.train.registry import run_policy

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


def test_what_the_algorithm_does_not_read_is_said(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("echo_algorithm")
    module.echo = lambda ctx: {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "echo_algorithm", module)
    row = dataclasses.replace(ALGORITHMS["rloo"], run="echo_algorithm:echo")
    monkeypatch.setitem(ALGORITHMS, "rloo", row)
    ctx = make_context("policy", policy__algorithm="rloo", ppo__gamma=0.9)
    run_policy(ctx)
    stream = ctx.progress._stream
    assert isinstance(stream, io.StringIO)
    assert "policy: rloo does not read policy.updates" not in stream.getvalue()
    assert "policy: rloo does not read policy.ppo.gamma" in stream.getvalue()
