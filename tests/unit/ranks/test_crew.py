"""Several processes on one run: who writes, what must fit, and what becomes of a lost rank.

Plain processes, as no agent ends them: they must end by themselves.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from amenable.artifacts import read_json

WORKER = Path(__file__).with_name("crew_worker.py")
LIMIT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Ranks:
    """Processes of one run."""

    def __init__(self, out: Path, what: str, size: int = 2, **of_rank_1: str) -> None:
        port = str(free_port())
        self.processes = []
        for rank in range(size):
            env = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                **(of_rank_1 if rank == 1 else {}),
            }
            command = [sys.executable, str(WORKER), str(out), what]
            self.processes.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )

    def end(self) -> list[tuple[int, str]]:
        """Exit code and output of each."""
        found = []
        for process in self.processes:
            text, _ = process.communicate(timeout=120)
            found.append((process.returncode, text))
        return found


def test_rank_0_writes_and_speaks_and_all_compute(tmp_path: Path) -> None:
    ends = Ranks(tmp_path / "run", "nothing").end()
    assert [code for code, _ in ends] == [0, 0], ends
    assert "rank 0 has done" in ends[0][1]
    assert "2 ranks on 1 host: versions, recipe and run folder are the same" in ends[0][1]
    assert "rank 0 speaks" in ends[0][1]
    assert "together: done" in ends[0][1]
    assert "row 0 is broken\n" in ends[0][1]
    said = ends[1][1].strip().splitlines()
    assert said == ["row 1 is broken (seen by rank 1)", "rank 1 has done"], "nothing else"
    stage = tmp_path / "run" / "stages" / "together"
    section = read_json(stage / "state.json")["summary"]
    versions, folder, replicas = section.pop("faults")
    assert section == {"rows": 3, "ranks": [0, 1], "ended": [False, False]}
    assert re.fullmatch(
        r"the version of torch is 2\.13 on rank 1 \(host \S+, pid \d+\) and 2\.12 on rank 0; .*",
        versions,
    )
    assert re.search(r"/here on rank 1 \(.*\) is not rank 0's folder; put the run folder", folder)
    assert "after step 1: the weights of rank 1 are no longer those of rank 0" in replicas
    assert read_json(stage / "made.json") == {"rank": 0}
    rows = (stage / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1
    assert '"together/rank": 0.0' in rows[0]


@pytest.mark.parametrize(("lost", "size"), [(0, 2), (1, 3)])
def test_a_killed_rank_ends_the_others_by_name(tmp_path: Path, lost: int, size: int) -> None:
    started = Ranks(tmp_path / "run", f"dies:{lost}", size=size)
    started.processes[lost].wait(timeout=120)
    gone = time.monotonic()
    ends = started.end()
    assert time.monotonic() - gone < LIMIT_S
    pid = started.processes[lost].pid
    for rank in set(range(size)) - {lost}:
        code, text = ends[rank]
        assert code == 1, text
        line = text.strip().splitlines()[-1]
        named = rf"amenable: rank {lost} of {size} \(host \S+, pid {pid}\) is gone: .*"
        assert re.fullmatch(named, line)


def test_a_rank_that_fails_tells_the_others_why(tmp_path: Path) -> None:
    started = Ranks(tmp_path / "run", "raises:1")
    ends = started.end()
    assert [code for code, _ in ends] == [1, 1], ends
    said = f"pid {started.processes[1].pid}) failed: the floor is wet"
    assert said in ends[0][1].strip().splitlines()[-1]
    assert ends[1][1].strip().endswith("amenable: the floor is wet")
    state = read_json(tmp_path / "run" / "stages" / "together" / "state.json")
    assert state["status"] == "failed"
    assert said in state["error"]


def test_ranks_must_have_the_same_recipe(tmp_path: Path) -> None:
    ends = Ranks(tmp_path / "run", "nothing", OTHER_SEED="1").end()
    assert [code for code, _ in ends] == [2, 2], ends
    for _, text in ends:
        assert re.search(r"the recipe's seed is 1 on rank 1 .* and 0 on rank 0", text), text
    assert not (tmp_path / "run" / "stages").exists(), "before anything runs"


def test_no_heartbeat_is_left_when_a_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ends a thread that is inside torch's store by aborting the process."""
    from amenable.ranks.watch import Watch

    inside = threading.Event()

    def look(*_: object) -> None:
        inside.set()
        time.sleep(0.5)

    monkeypatch.setattr(Watch, "_look", look)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    watch = Watch()
    assert inside.wait(10)
    watch.leave(well=False)
    assert "amenable ranks" not in {thread.name for thread in threading.enumerate()}


def test_a_process_leaves_its_group_before_it_ends() -> None:
    """Python ends last what was registered first; a group left to it aborts every other time."""
    program = (
        "import atexit, torch.distributed as dist; from amenable.ranks.launch import join, seat; "
        "atexit.register(lambda: print('still in' if dist.is_initialized() else 'left')); "
        "join(seat()); print('in' if dist.is_initialized() else 'out')"
    )
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        told = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_PORT": port}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **told}
        command = [sys.executable, "-c", program]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.communicate(timeout=120)[0].split("\n")[:2] == ["in", "left"]
        assert process.returncode == 0


def test_a_port_that_is_taken() -> None:
    from amenable.errors import StageError
    from amenable.ranks.launch import Seat, join

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        seat = Seat(0, 2, 0, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(StageError, match=r"MASTER_PORT \d+ of this host cannot be opened"):
            join(seat, timeout_s=1)


def test_nobody_at_the_port() -> None:
    from amenable.errors import StageError
    from amenable.ranks.launch import Seat, join

    with pytest.raises(StageError, match=r"does not answer .*is rank 0 started there"):
        join(Seat(1, 2, 1, "127.0.0.1", free_port()), timeout_s=0.5)


def test_a_rank_that_never_comes() -> None:
    from amenable.errors import StageError
    from amenable.ranks.launch import Seat, join

    with pytest.raises(StageError, match=r"no word of rank 1 in 0\.5 s; are all 2 ranks started"):
        join(Seat(0, 2, 0, "127.0.0.1", free_port()), timeout_s=0.5)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_PORT"])
def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    from amenable.errors import UsageError
    from amenable.ranks.launch import seat

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UsageError, match=f"{missing} is ''; it must be a number"):
        seat()
