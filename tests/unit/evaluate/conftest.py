from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _beside(name: str) -> ModuleType:
    """A module beside this file; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_run() -> ModuleType:
    """The module `fake_run.py`."""
    return _beside("fake_run")


@pytest.fixture
def build_run(fake_run: ModuleType) -> Callable[..., Path]:
    """`fake_run.build(root, **settings)`: writes a run folder and returns it."""
    return fake_run.build  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def build_comparison() -> Callable[..., dict[str, Any]]:
    """`fake_comparison.build(folder, **settings)`: writes what `amenable compare` leaves."""
    return _beside("fake_comparison").build  # type: ignore[no-any-return]
