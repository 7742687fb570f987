"""What must answer quickly imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "scipy", "matplotlib", "tensorboard")
LIGHT_MODULES = [
    "amenable.errors",
    "amenable.artifacts",
    "amenable.progress",
    "amenable.config.load",
    "amenable.data.schemas",
    "amenable.data.reading.check",
    "amenable.data.reading.readers",
    "amenable.data.splits",
    "amenable.pipeline.stages",
    "amenable.pipeline.local",
    "amenable.pipeline.ray",
    "amenable.pipeline.kfp_tasks",
    "amenable.pipeline.vertex_parameters",
    "amenable.pipeline.vertex_tasks",
    "amenable.models.pull",
    "amenable.cli.main",
]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_module_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_neither_rich_nor_the_pipeline() -> None:
    code = (
        "import sys\nfrom amenable.cli.main import main\nsys.argv = ['amenable', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('rich', 'torch', 'amenable.pipeline.local') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
