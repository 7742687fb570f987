"""Which of several processes this one is, and how it joins the others.

`torchrun`, `accelerate launch` and Ray Train set the same five variables for each process: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them a run is one process. Importing this
loads no torch.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from amenable.errors import StageError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

JOIN_TIMEOUT_S = 120.0
"""For all ranks to appear."""

_LAST_WORK_S = 0.2  # for the threads of the group to drop what they hold: microseconds each

LONGEST_STEP = timedelta(days=7)
"""Of a collective: rank 0 alone may ask a judge for long; a lost rank is told by its heartbeat."""


@dataclass(frozen=True)
class Seat:
    """A process among the processes of a run."""

    rank: int
    size: int
    local_rank: int
    """Its number on its host, which is that of its GPU."""
    address: str
    """Of rank 0's host."""
    port: int
    """Where the ranks meet."""

    @property
    def where(self) -> str:
        """In messages."""
        return f"rank {self.rank} of {self.size} (host {socket.gethostname()}, pid {os.getpid()})"


def seat() -> Seat | None:
    """This process's seat; None where it is the only one.

    Raises:
        UsageError: the variables are incomplete or no numbers.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():  # as by Ray Train
        local = int(os.environ.get("LOCAL_RANK", "0"))
        found = Seat(dist.get_rank(), dist.get_world_size(), local, address, 0)
        return found if found.size > 1 else None
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
        if not value.isdigit():
            raise UsageError(
                f"{name} is {value!r}; it must be a number where WORLD_SIZE is above 1: start the "
                "processes with torchrun or accelerate launch"
            )
        numbers[name] = int(value)
    return Seat(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        address=address,
        port=numbers["MASTER_PORT"],
    )


def leads() -> bool:
    """Whether this process writes the run folder and speaks: the only one, or rank 0."""
    own = seat()
    return own is None or own.rank == 0


def run_processes(count: int, words: Sequence[str]) -> int:
    """Run `python WORDS` in so many processes of this machine, and pass on what stops them.

    They share the cores. Each of Ctrl-C, SIGTERM and SIGHUP that this process gets goes to all of
    them, once: they sit in sessions of their own, where a terminal's Ctrl-C does not reach them a
    second time. One that this process ignores, as `nohup` has it, stays ignored.

    Args:
        count: at least 2.
        words: the interpreter's.

    Returns:
        Rank 0's exit code, or another's where that is 0; 128 + the signal that ended it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)),
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        told = signal.SIGTERM if number == signal.SIGHUP else number
        for process in ranks:
            process.send_signal(told)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        for rank in range(count):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, *words]
            ranks.append(subprocess.Popen(command, env=own, start_new_session=True))
        codes = [process.wait() for process in ranks]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code


def join(own: Seat, timeout_s: float = JOIN_TIMEOUT_S) -> None:
    """Join the group, over gloo on CPUs and NCCL on GPUs; a group that there is already is kept.

    Raises:
        StageError: rank 0 does not answer, its port is taken, or not all ranks came in time.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(own.local_rank % torch.cuda.device_count())
    _check_port(own, timeout_s)
    try:
        store = _store(own, timeout_s)
        _wait_for_all(store, own, timeout_s)
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=store,
            rank=own.rank,
            world_size=own.size,
            timeout=LONGEST_STEP,
        )
        atexit.register(_leave)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(
            f"{own.where} cannot join at {own.address}:{own.port}: {reason}; are all {own.size} "
            "ranks started, with the same MASTER_ADDR and MASTER_PORT?"
        ) from error


def _leave() -> None:
    """Before Python ends: the group's threads would abort a process that has done its work.

    A thread of gloo drops the tensors of a finished exchange, for which it takes the interpreter's
    lock; Python's end would end it there, inside a C++ destructor. In the pause it gets the lock.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(_LAST_WORK_S)


def _hosted() -> bool:
    """Whether torchrun's agent listens at the port; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(own: Seat, timeout_s: float) -> Store:
    """Where the ranks meet."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    meeting: Store = TCPStore(
        own.address,
        own.port,
        is_master=own.rank == 0 and not _hosted(),
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return cast("Store", PrefixStore(f"amenable/{attempt}", meeting))


def _wait_for_all(store: Store, own: Seat, timeout_s: float) -> None:
    """Returns when every rank has come to the store; the group itself would wait for days."""
    store.set(f"here/{own.rank}", own.where)
    end = time.monotonic() + timeout_s
    while missing := [n for n in range(own.size) if not store.check([f"here/{n}"])]:
        if time.monotonic() > end:
            raise RuntimeError(f"no word of rank {', '.join(map(str, missing))} in {timeout_s:g} s")
        time.sleep(0.05)


def _check_port(own: Seat, timeout_s: float) -> None:
    """Before torch tries, which says less: whether rank 0's port can be reached, or be opened."""
    if own.rank == 0 and not _hosted():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", own.port))
            except OSError as error:
                raise StageError(
                    f"MASTER_PORT {own.port} of this host cannot be opened ({error.strerror}); "
                    "choose another on all ranks"
                ) from error
        return
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((own.address, own.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise StageError(
                    f"{own.where}: {own.address}:{own.port} does not answer "
                    f"({error.strerror or error}); is rank 0 started there, and is the port open "
                    "to this host?"
                ) from error
            time.sleep(0.2)
