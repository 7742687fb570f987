"""Reads records that a test writes, through the front of the package."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amenable.config.data import DemonstrationSource, PreferenceSource, PromptSource
from amenable.data.reading.readers import iter_demonstrations, iter_preferences, iter_prompts
from amenable.data.reading.records import ReadLog

READERS = {
    "preferences": (PreferenceSource, iter_preferences),
    "demonstrations": (DemonstrationSource, iter_demonstrations),
    "prompts": (PromptSource, iter_prompts),
}


def write(folder: Path, records: Iterable[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(kind: str, path: Path, *, log: ReadLog | None = None, **keys: Any) -> list[Any]:
    source, reader = READERS[kind]
    log = log or ReadLog()
    return [item for _, item in reader(source(files=(str(path),), **keys), log)]
