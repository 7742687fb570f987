"""What must hold between the ranks before a weight is loaded; each fault in one line.

The same interpreter, versions and code, the same recipe, one run folder that all see, and an
exchange that adds up.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from amenable.artifacts import storage_errors
from amenable.errors import StageError, UsageError
from amenable.ranks import group

_FOLDER_S = 20.0  # for a new file to be seen on a shared file system


def check_ranks(folder: Path, recipe: Mapping[str, object], versions: Mapping[str, object]) -> None:
    """Returns when the ranks fit together. Called by all.

    Args:
        folder: of the run.
        recipe: flat, by key.
        versions: of what decides results: packages, source.

    Raises:
        UsageError: versions, code or recipe differ; or the run folder is not the same one.
        StageError: an all-reduce gives a wrong sum.
    """
    check_sum()
    check_same("the version of ", versions)
    check_same("the recipe's ", recipe)
    check_shared(folder)


def check_sum() -> None:
    """Raises StageError: an all-reduce of 1, 2, …, N does not give its sum on every rank."""
    ranks = group.size()
    total = torch.tensor([group.rank() + 1.0], dtype=torch.float64)
    group.add_up([total])
    if float(total) != ranks * (ranks + 1) / 2:
        raise StageError(
            f"an all-reduce over {ranks} ranks gave {float(total):g} on {_where()}, not "
            f"{ranks * (ranks + 1) / 2:g}; do all processes belong to one run?"
        )


def check_same(what: str, facts: Mapping[str, object]) -> None:
    """Raises UsageError: a rank's facts are not rank 0's; names the first."""
    everybodys = group.gathered((_where(), dict(facts)))
    first = everybodys[0][1]
    for where, own in everybodys[1:]:
        for key in first | own:
            if own.get(key) != first.get(key):
                raise UsageError(
                    f"{what}{key} is {own.get(key)} on {where} and {first.get(key)} on rank 0; "
                    "give every rank the same"
                )


def check_shared(folder: Path, wait_s: float = _FOLDER_S) -> None:
    """Raises UsageError: a rank does not see in time what rank 0 writes into the folder."""
    token = group.led(lambda: secrets.token_hex(8))
    path = folder / f".ranks-{token}"
    if group.rank() == 0:
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(token)
    group.told(None)  # it has been written
    seen = group.gathered((_where(), _appears(path, token, wait_s)))
    if group.rank() == 0:
        path.unlink(missing_ok=True)
    blind = [where for where, sees in seen if not sees]
    if blind:
        raise UsageError(
            f"{folder} on {', '.join(blind)} is not rank 0's folder; put the run folder (--out) on "
            "a file system that all hosts share, under the same path"
        )


def _appears(path: Path, token: str, wait_s: float) -> bool:
    end = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() > end or group.rank() == 0:
            return False
        time.sleep(0.1)


def _where() -> str:
    return f"rank {group.rank()} (host {socket.gethostname()}, pid {os.getpid()})"
