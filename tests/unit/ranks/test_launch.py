"""`amenable run --processes`, and what a process is told by its environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amenable.cli.main import main
from amenable.ranks import launch
from amenable.ranks.launch import Seat, leads, seat

ROOT = Path(__file__).parents[3]
RECIPE = "examples/tiny.toml"


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


@pytest.mark.parametrize("given", [["--processes", "3"], ["--processes=3", "--debug"]])
def test_processes_run_the_same_words(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    seen: list[tuple[int, list[str]]] = []

    def run(count: int, words: list[str]) -> int:
        seen.append((count, words))
        return 7

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch, "run_processes", run)
    monkeypatch.chdir(ROOT)
    words = ["run", RECIPE, *given, "--set", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["amenable", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 7
    told = ["-m", "amenable", "run", RECIPE, "--set", "seed=3"]
    assert seen == [(3, told + given[1:] if "=" in given[0] else told)]


@pytest.mark.parametrize(
    ("setting", "said"),
    [("policy.updatez=3", "policy.updatez"), ("data.prompts=none.jsonl", "there is no such file")],
)
def test_a_wrong_recipe_is_told_once_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    def run(count: int, words: list[str]) -> int:
        raise AssertionError("a process is started")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch, "run_processes", run)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, "argv", ["amenable", "run", RECIPE, "--processes", "2", "--set", setting]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count(said) == 1


def test_what_the_environment_says_of_another_run_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container may say WORLD_SIZE=1: each process would take itself for the only one."""
    for name, value in {"WORLD_SIZE": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    program = (
        "import pathlib, sys; from amenable.ranks.launch import seat; own = seat(); "
        "pathlib.Path(sys.argv[1], str(own.rank)).write_text(f'{own.size} {own.address}')"
    )
    assert launch.run_processes(2, ["-c", program, str(tmp_path)]) == 0
    assert {path.read_text() for path in tmp_path.iterdir()} == {"2 127.0.0.1"}


def test_processes_get_a_seat_each_and_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    program = (
        "import os, pathlib, sys; "
        f"told = ' '.join(os.environ[name] for name in {names}); "
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(told); "
        "sys.exit(3 * (os.environ['RANK'] == '1'))"
    )
    assert launch.run_processes(2, ["-c", program, str(tmp_path)]) == 3
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 4", "1 1 2 4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: signal.Signals) -> None:
    """Each notes what it hears, and ends some time after the first."""
    program = (
        "import os, pathlib, signal, sys, time; "
        "own = pathlib.Path(sys.argv[1], os.environ['RANK']); heard = []; "
        "[signal.signal(n, lambda n, _: heard.append(n)) for n in (2, 15)]; "
        "own.write_text('ready'); "
        "[time.sleep(0.05) for _ in range(600) if not heard]; time.sleep(0.5); "
        "own.write_text(str(heard)); sys.exit(128 + heard[0])"
    )
    words = ["-c", program, str(tmp_path)]
    starter = (
        "import signal, sys; from amenable.ranks.launch import run_processes; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
        f"sys.exit(run_processes(2, {words}))"
    )
    started = subprocess.Popen([sys.executable, "-c", starter])
    files = [tmp_path / "0", tmp_path / "1"]
    end = time.monotonic() + 30
    while not all(f.exists() and f.read_text() == "ready" for f in files):
        assert time.monotonic() < end
        time.sleep(0.05)
    started.send_signal(number)
    assert started.wait(30) == 128 + number
    assert [f.read_text() for f in files] == [f"[{number:d}]"] * 2


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
