"""`manifest.json`: with what, on what and from what a run was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import amenable
from amenable.artifacts import Json
from amenable.masking import without_secrets
from amenable.pipeline.state import StageState

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
)
_INPUT_MARK = " content"


def manifest(
    states: Mapping[str, StageState], seed: int, base: Path | str, command: list[str]
) -> Json:
    """Versions, hardware, seeds, hashes, time and memory.

    Args:
        states: of the stages that are done, by name.
        seed: of the recipe.
        base: the base model's folder or hub id.
        command: the words of the command line.
    """
    return {
        "schema_version": 1,
        "command": [without_secrets(word) for word in command],
        "amenable": {"version": amenable.__version__, "git_commit": git_commit()},
        "versions": versions(),
        "hardware": hardware(),
        "seed": seed,
        "base_model": str(base),
        "inputs": _inputs(states),
        "artifacts": {
            path: digest for state in states.values() for path, digest in state.outputs.items()
        },
        "stages": {
            name: {
                "fingerprint": state.fingerprint,
                "wall_s": state.wall_s,
                "peak_rss_gb": state.peak_rss_gb,
                "shortened": state.shortened,
            }
            for name, state in states.items()
        },
    }


@cache
def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that decide results; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> Json:
    """Machine, processor, cores that this process may use, memory, threads and GPUs."""
    torch = sys.modules.get("torch")
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gb": _memory_gb(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "gpus": _gpus(),
    }


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device() -> str | None:
    """Where models ran: `cpu`, or the accelerator's name; None before torch is imported."""
    if "torch" not in sys.modules:
        return None
    gpus = _gpus()
    return gpus[0] if gpus else "cpu"


@cache
def git_commit() -> str | None:
    """The commit of the checkout that Amenable runs from, `+` behind it if files differ."""
    root = Path(amenable.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "src")
    return f"{commit}+" if commit and changed else commit or None


def _git(root: Path, *words: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()
    return ""


def _inputs(states: Mapping[str, StageState]) -> dict[str, str]:
    """Hashes of files outside the run folder, by the recipe key that names them."""
    marks = ("base model", "policy.reward/", "policy.rewards[")
    return {
        name: value
        for state in states.values()
        for name, value in state.ingredients.items()
        if name.startswith(marks) or name.endswith(_INPUT_MARK)
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    with suppress(OSError, ValueError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
