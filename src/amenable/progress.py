"""What the user sees while a stage works, and how long it may take. Everything goes to stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

PLAIN_INTERVAL_S = 10.0
PLAIN_SILENCE_S = 60.0
PLAIN_FRACTION = 0.1


class Tracker(Protocol):
    """Counts the steps of one piece of work."""

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        """Counts `n` more steps; `postfix` figures are shown beside the count."""
        ...


class Deadline:
    """A share of the time budget, counted from its creation on the monotonic clock."""

    def __init__(
        self, seconds: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ):
        """Starts the clock.

        Args:
            seconds: the budget; None never ends.
            clock: seconds, monotone; tests pass their own.
        """
        self._clock = clock
        self.cut = False
        """True once `exceeded` has said so: whoever asked has stopped early."""
        self._end = math.inf if seconds is None else clock() + max(0.0, seconds)

    def remaining_s(self) -> float:
        """Seconds left, at least 0; infinity without a budget."""
        return max(0.0, self._end - self._clock())

    def part(self, share: float) -> Deadline:
        """Another one, which ends after a share of what is left."""
        left_s = self.remaining_s()
        return Deadline(None if left_s == math.inf else share * left_s, clock=self._clock)

    def exceeded(self) -> bool:
        """True when the budget is used up."""
        self.cut = self.cut or self.remaining_s() <= 0.0
        return self.cut


class StopRequest:
    """That somebody wants the run to end, and where it may.

    Where nothing is lost it ends at once, as on Ctrl-C. Training holds it up: it looks after each
    step, writes a checkpoint, and ends itself.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the signal that asked; None: nobody has."""
        self._holders = 0

    @property
    def asked(self) -> bool:
        """Whether somebody has."""
        return self.signal is not None

    def ask(self, signal: int) -> None:
        """Ends at once, or when the holder is ready.

        Raises:
            KeyboardInterrupt: nobody holds it up.
        """
        self.signal = signal
        if not self._holders:
            raise KeyboardInterrupt

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """A block that ends by itself: it must look at `asked`, and call `obey` when ready."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
        self.obey()

    def obey(self) -> None:
        """Ends if somebody has asked.

        Raises:
            KeyboardInterrupt: somebody has.
        """
        if self.asked:
            raise KeyboardInterrupt


class Progress:
    """A bar with time left on a terminal, few plain lines elsewhere, nothing if `quiet`."""

    def __init__(self, *, stream: TextIO | None = None, quiet: bool = False, rank: int = 0):
        """Decides by the stream how to draw.

        Args:
            stream: where to write; stderr as it is at each call, if None.
            quiet: say nothing.
            rank: above 0 a process that follows another: it is quiet but for what it alone has
                seen.
        """
        self._stream = stream
        self._quiet = quiet or rank > 0
        self._rank = rank
        self._say_above_bar: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        """Writes one line; above the bar, if one is drawn."""
        if self._quiet:
            return
        if self._say_above_bar is not None:
            self._say_above_bar(text)
        else:
            print(text, file=self._out(), flush=True)

    def blame(self, text: str) -> None:
        """Writes one line about a row, which of several processes one alone has seen."""
        if self._rank:
            print(f"{text} (seen by rank {self._rank})", file=self._out(), flush=True)
        else:
            self.say(text)

    @contextmanager
    def track(self, total: int, description: str, done: int = 0) -> Iterator[Tracker]:
        """Yields a tracker of `total` steps.

        A bar inside another bar becomes plain lines above it.

        Args:
            total: steps.
            description: of the work.
            done: steps that were done before, in no time that counts.
        """
        if not self._quiet and self._out().isatty() and self._say_above_bar is None:
            with self._bar(total, description, done) as tracker:
                yield tracker
            return
        lines = PlainLines(total, description, self.say, done=done)
        yield lines
        lines.finish()

    @contextmanager
    def _bar(self, total: int, description: str, done: int) -> Iterator[Tracker]:
        with rich_bar(total, description, self._out(), done) as (tracker, say):
            self._say_above_bar = say
            try:
                yield tracker
            finally:
                self._say_above_bar = None

    def _out(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream


class PlainLines:
    """A line at most every ten seconds, for pipes and log files."""

    def __init__(
        self,
        total: int,
        description: str,
        say: Callable[[str], None],
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts behind the first `done` steps of `total`; `say` takes the finished line."""
        self._total, self._description, self._say, self._clock = total, description, say, clock
        self._done = self._before = done
        self._start = self._said_at = clock()
        self._said_done = -1
        self._postfix: dict[str, float | str] = {}

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        """Counts `n` more steps and writes a line if one is due."""
        self._done += n
        self._postfix.update(postfix)
        silence_s = self._clock() - self._said_at
        moved = self._done - max(self._said_done, self._before)
        enough = moved >= PLAIN_FRACTION * self._total or silence_s >= PLAIN_SILENCE_S
        if silence_s >= PLAIN_INTERVAL_S and enough:
            self._write()

    def finish(self) -> None:
        """Writes the last line, unless it stands there already."""
        if self._said_done != self._done:
            self._write(ended=True)

    def _write(self, *, ended: bool = False) -> None:
        now = self._clock()
        self._said_at, self._said_done = now, self._done
        parts = [
            f"{self._description} {self._done}/{self._total}",
            self._times(now - self._start, ended),
        ]
        parts += [_figure(name, value) for name, value in self._postfix.items()]
        self._say("  ".join(parts))

    def _times(self, elapsed_s: float, ended: bool) -> str:
        if ended or not self._before < self._done < self._total:
            return duration(elapsed_s)
        left_s = elapsed_s / (self._done - self._before) * (self._total - self._done)
        return f"{duration(elapsed_s)}, {duration(left_s)} left"


class _BarTracker:
    def __init__(self, advance: Callable[[int, str], None]):
        self._advance = advance
        self._postfix: dict[str, float | str] = {}

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        self._postfix.update(postfix)
        text = "  ".join(_figure(name, value) for name, value in self._postfix.items())
        self._advance(n, text)


@contextmanager
def rich_bar(
    total: int, description: str, stream: TextIO, done: int = 0
) -> Iterator[tuple[Tracker, Callable[[str], None]]]:
    """Yields a tracker drawn as a bar with time left, and a function that prints above the bar."""
    from rich import progress as rich_progress  # 0.1 s: only when a bar is drawn
    from rich.console import Console

    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[figures]}", markup=False),
        console=Console(file=stream, stderr=stream is sys.stderr),
        redirect_stdout=False,
    )
    task = bar.add_task(description, total=total, completed=done, figures="")

    def advance(n: int, figures: str) -> None:
        bar.update(task, advance=n, figures=figures)

    def say(text: str) -> None:
        bar.console.print(text, markup=False, highlight=False)

    with bar:
        yield _BarTracker(advance), say


def duration(seconds: float) -> str:
    """Seconds as people say them: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _figure(name: str, value: float | str) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{name} {text}"
