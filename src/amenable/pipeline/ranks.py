"""Several processes on one run: rank 0 leads, the others follow.

Rank 0 alone holds the run folder's lock, decides what runs, writes and speaks. Of a stage that is
computed together the others are told the name; they run the same function with the same recipe, and
what they would write into the run folder is left out. They read from it what rank 0 has written.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from amenable.artifacts import Json, MetricsLog, RunFolder, StageContext, writes_left_out
from amenable.config.load import flatten
from amenable.config.recipe import Recipe
from amenable.errors import AmenableError, StageError
from amenable.pipeline.fingerprint import code_hash
from amenable.pipeline.manifest import versions
from amenable.pipeline.preflight import base_model, close_hub
from amenable.pipeline.stages import Stage
from amenable.progress import Deadline, Progress, StopRequest
from amenable.ranks import group
from amenable.ranks.launch import Seat, join
from amenable.ranks.preflight import check_ranks
from amenable.ranks.watch import BEAT_S, SILENT_S, Watch

_BETWEEN_LOOKS_S = 0.05  # for the next stage
_OF_EXCHANGE = ("gloo", "nccl", "connection", "socket", "broken pipe", "store", "timed out")


class SharedDeadline(Deadline):
    """Rank 0's clock decides for all; asked by all ranks at the same places."""

    def part(self, share: float) -> Deadline:
        """Another one, which ends after a share of what is left."""
        left_s = self.remaining_s()
        return SharedDeadline(None if left_s == math.inf else share * left_s, clock=self._clock)

    def remaining_s(self) -> float:
        """Seconds left on rank 0."""
        return math.inf if self._end == math.inf else group.told(super().remaining_s())

    def exceeded(self) -> bool:
        """True when the budget is used up, by rank 0's clock."""
        self.cut = self.cut or self.remaining_s() <= 0.0
        return self.cut


class SharedStop(StopRequest):
    """Rank 0's signals end all, after the same step; asked by all ranks at the same places.

    Args:
        own: what this rank's signals ask; on the others nothing does.
    """

    def __init__(self, own: StopRequest) -> None:
        super().__init__()
        self._own = own

    @property
    def asked(self) -> bool:
        """Whether somebody has asked rank 0."""
        self.signal = group.told(self._own.signal)
        return self.signal is not None

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """A block that ends by itself, or on rank 0 when it is over."""
        with self._own.held_up():
            yield

    def obey(self) -> None:
        """Ends if somebody had asked when the ranks last looked.

        Raises:
            KeyboardInterrupt: somebody had.
        """
        if self.signal is not None:
            raise KeyboardInterrupt


class Crew:
    """The ranks of one run, from joining to leaving."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._orders = watch, 0

    @property
    def hosts(self) -> str:
        """How many there are."""
        return "1 host" if (count := len(self._watch.hosts)) == 1 else f"{count} hosts"

    def deadline(self, seconds: float | None) -> Deadline:
        """Of a stage that all compute."""
        return SharedDeadline(seconds)

    def stop(self, own: StopRequest) -> StopRequest:
        """Of a stage that all compute."""
        return SharedStop(own)

    def start(self, stage: Stage, seconds: float | None) -> None:
        """Rank 0: the others shall run a stage, too."""
        self._order({"stage": stage.name, "seconds": seconds})

    def end(self, summary: Json) -> None:
        """Rank 0: the run is done; the others leave with its summary."""
        self._order({"summary": summary})

    def _order(self, order: Json) -> None:
        self._watch.store.set(f"order/{self._orders}", json.dumps(order))
        self._orders += 1

    def _next_order(self) -> Json:
        key = f"order/{self._orders}"
        while not self._watch.store.check([key]):
            if (verdict := self._watch.verdict()) is not None:
                raise StageError(verdict)
            time.sleep(_BETWEEN_LOOKS_S)
        self._orders += 1
        order: Json = json.loads(self._watch.store.get(key))
        return order

    def follow(self, recipe: Recipe, folder: RunFolder, stages: Sequence[Stage]) -> Json:
        """Every other rank: run what rank 0 runs, until it is done; returns its summary."""
        quiet, stop = Progress(rank=group.rank()), SharedStop(StopRequest())
        by_name = {stage.name: stage for stage in stages}
        try:
            with self.explained(), writes_left_out(folder.root), _leaves_signals_to_rank_0():
                order = self._next_order()
                if "stage" in order:
                    close_hub(recipe, base_model(recipe, quiet.say))
                while "stage" in order:
                    stage = by_name[order["stage"]]
                    log = MetricsLog(stage.name, folder.stage_path(stage.name), tensorboard=False)
                    stage.load()(
                        StageContext(
                            recipe=recipe,
                            folder=folder,
                            stage=stage.name,
                            log=log,
                            progress=quiet,
                            deadline=SharedDeadline(order["seconds"]),
                            stop=stop,
                        )
                    )
                    order = self._next_order()
        except KeyboardInterrupt:  # rank 0 tells why
            raise SystemExit(128 + (stop.signal or signal.SIGINT)) from None
        summary: Json = order["summary"]
        return summary

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error inside is told to the other ranks; one that another rank caused names that one.

        Raises:
            StageError: another rank is gone, or failed.
        """
        try:
            yield
        except KeyboardInterrupt as error:  # torchrun sends SIGTERM to all when one is gone
            verdict = self._watch.verdict(2 * BEAT_S + 0.5)
            if verdict is not None:
                raise StageError(verdict) from error
            raise
        except Exception as error:
            said = str(error).lower()
            of_exchange = not isinstance(error, AmenableError) and any(
                word in said for word in _OF_EXCHANGE
            )
            verdict = self._watch.verdict(SILENT_S + 2 * BEAT_S if of_exchange else 0.0)
            if verdict is not None:
                raise StageError(verdict) from error
            self._watch.fail(_first_line(error))
            raise


@contextmanager
def _leaves_signals_to_rank_0() -> Iterator[None]:
    """SIGTERM and the first Ctrl-C, which all ranks get, end this one when rank 0 says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, AmenableError) else f"{type(error).__name__}: {line}"


@contextmanager
def crew(own: Seat, recipe: Recipe, folder: Path) -> Iterator[Crew]:
    """Join the other ranks and look whether all fit together; leave them when the block ends.

    Raises:
        StageError: they cannot be joined, or one of them is gone or failed.
        UsageError: they do not fit together.
    """
    join(own)
    watch = Watch()
    team = Crew(watch)
    well = False
    try:
        with team.explained():
            facts = {**versions(), "amenable's source": code_hash(with_report=True)[:12]}
            check_ranks(folder, flatten(recipe), facts)
            yield team
        well = True
    except BaseException as error:
        if not isinstance(error, SystemExit):  # a stop that rank 0 has told of
            watch.fail(_first_line(error))
        raise
    finally:
        watch.leave(well=well)


def run(
    own: Seat,
    recipe: Recipe,
    folder: RunFolder,
    stages: Sequence[Stage],
    lead: Callable[[Crew], Json],
    say: Callable[[str], None],
) -> Json:
    """The run as this rank takes part in it; the summary.

    Args:
        own: this rank.
        recipe: of the run.
        folder: of the run.
        stages: the table.
        lead: what rank 0 does.
        say: what the user hears from it.
    """
    with crew(own, recipe, folder.root) as team:
        if own.rank > 0:
            return team.follow(recipe, folder, stages)
        say(f"{own.size} ranks on {team.hosts}: versions, recipe and run folder are the same")
        result = lead(team)
        team.end(result)
        return result
