"""Shared by all tests. Where torch is not installed, only files that can do without it are run."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path

os.environ["AMENABLE_HOME"] = tempfile.mkdtemp(prefix="amenable-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

HAS_TORCH = importlib.util.find_spec("torch") is not None
_WITH_TORCH = re.compile(
    r"^(?:from|import) (?:torch|transformers|peft|safetensors"
    r"|amenable\.(?:losses|train|rollout|lab|plan)"
    r"|amenable\.data\.(?:render|collate)"
    r"|amenable\.models\.(?:adapters|export|heads|load|logprobs|roles))\b"
    r'|^pytest\.importorskip\("torch"\)',
    re.MULTILINE,
)
_FOLDERS_WITH_TORCH = (
    "losses",
    "models",
    "train",
    "rollout",
    "lab",
    "plan",
    "property",
    "peers",
    "integration",
)
_left_out: list[str] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out what needs torch where there is none."""
    if HAS_TORCH:
        return None
    if collection_path.is_dir():
        needs_torch = collection_path.name in _FOLDERS_WITH_TORCH
    else:
        needs_torch = collection_path.suffix == ".py" and bool(
            _WITH_TORCH.search(collection_path.read_text(encoding="utf-8"))
        )
    if needs_torch:
        _left_out.append(collection_path.name)
    return needs_torch or None


def pytest_terminal_summary(terminalreporter: object) -> None:
    """Says what was left out."""
    if _left_out:
        line = f"torch is not installed; left out: {', '.join(sorted(_left_out))}"
        terminalreporter.write_line(line)  # type: ignore[attr-defined]
