"""`amenable run --processes`, and what a process is told by its environment."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from amenable.cli.main import main
from amenable.ranks.launch import Seat, leads, seat


def test_one_process_has_no_seat_and_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert seat() is None
    assert leads()


def test_a_seat_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "9",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert seat() == Seat(rank=3, size=4, local_rank=1, address="h", port=9)
    assert not leads()


@pytest.mark.parametrize("given", [["--processes", "3"], ["--processes=3"]])
def test_processes_runs_the_same_words_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        seen.append(command)
        return SimpleNamespace(returncode=7)

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    words = ["run", "recipe.toml", *given, "--set", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["amenable", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 7
    (command,) = seen
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=3" in command
    assert command[-6:] == ["-m", "amenable", "run", "recipe.toml", "--set", "seed=3"]


def test_processes_within_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["amenable", "run", "recipe.toml", "--processes", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--processes: this is one of several processes already" in capsys.readouterr().err
