from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fake_run() -> ModuleType:
    """The module `fake_run.py` beside this file; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(
        "fake_run", Path(__file__).with_name("fake_run.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build_run(fake_run: ModuleType) -> Callable[..., Path]:
    """`fake_run.build(root, **settings)`: writes a run folder and returns it."""
    return fake_run.build  # type: ignore[no-any-return]
