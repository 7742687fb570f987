"""Recipes and rows whose lengths are known, on the shape of the tiny model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.plan.hardware import Hardware, hardware
from amenable.plan.rows import Rows
from amenable.plan.shape import ModelShape, config_of, shape_of

COUNTS = {
    "demonstrations.train": 10,
    "demonstrations.validation": 2,
    "preferences.train": 6,
    "preferences.validation": 2,
    "preferences.test": 4,
    "prompts.train": 20,
    "prompts.test": 8,
}


def recipe(*settings: str) -> Recipe:
    base = ["model.base=tiny", "model.dtype=fp32", "data.preferences=p.jsonl"]
    return load_recipe(None, [*base, "data.demonstrations=d.jsonl", *settings])


def rows(**counts: int) -> Rows:
    """Prompts of 12 tokens and completions of 4."""
    lengths = {
        "demonstrations": [(12, 4)] * 3,
        "preferences": [(12, 4, 4)] * 3,
        "prompts": [(12,)] * 3,
    }
    return Rows(lengths, {**COUNTS, **counts}, "known")


def machine(**changes: Any) -> Hardware:
    """A card, or a machine like it."""
    return dataclasses.replace(hardware("h100"), **changes)


@pytest.fixture(scope="session")
def tiny_shape() -> ModelShape:
    return shape_of(config_of("tiny"), "tiny")
