"""SIGTERM, as machines that are taken back send it, and Ctrl-C: end at the next safe point."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from amenable.progress import StopRequest


@contextmanager
def stops_on_signals(stop: StopRequest) -> Iterator[None]:
    """Within the block the first signal asks `stop`; Ctrl-C after another signal ends at once.

    A signal that the process ignores, as a shell's background jobs ignore Ctrl-C, stays ignored.
    Outside the main thread, where Python runs no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, _: object) -> None:
        if stop.asked and number == signal.SIGTERM:
            return
        if stop.asked:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        with suppress(OSError, RuntimeError):  # stderr may be closed, or in the middle of a line
            print(f"{name}: stops at the next safe point; Ctrl-C stops at once", file=sys.stderr)
        stop.ask(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
