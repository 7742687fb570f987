"""SIGTERM and Ctrl-C end a run where nothing is lost, with the exit codes of shells."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from amenable.artifacts import StageContext, read_json
from amenable.pipeline import local
from amenable.pipeline.signals import stops_on_signals
from amenable.progress import StopRequest

if TYPE_CHECKING:
    from .conftest import Pipeline

BOTH = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def sending(number: int) -> Callable[[StageContext], None]:
    def hook(ctx: StageContext) -> None:
        send(number)
        (ctx.out / "went-on").write_text("")

    return hook


@BOTH
def test_a_stage_without_checkpoints_ends_at_once(
    pipeline: Pipeline, number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    pipeline.hooks["count"] = sending(number)
    name = signal.Signals(number).name
    told = f"stopped in stage count by {name}; the same command goes on from there"
    with pytest.raises(local.Interrupted, match=told) as caught:
        pipeline.run()
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == handler
    assert capfd.readouterr().err.count("\n") == 1
    assert not (pipeline.out / "stages" / "count" / "went-on").exists()
    assert read_json(pipeline.out / "stages" / "count" / "state.json")["status"] == "running"
    pipeline.hooks.clear()
    pipeline.run()
    assert pipeline.calls == ["count", "page"]


@BOTH
def test_training_ends_after_its_step(pipeline: Pipeline, number: int, code: int) -> None:
    done = []

    def train(ctx: StageContext) -> None:
        with ctx.stop.held_up():
            for step in range(5):
                if step == 2:
                    send(number)
                done.append(step)
                ctx.stop.obey()

    pipeline.hooks["upper"] = train
    with pytest.raises(local.Interrupted, match="in stage upper") as caught:
        pipeline.run()
    assert caught.value.exit_code == code
    assert done == [0, 1, 2]


def test_a_step_that_is_the_last_one_ends_the_run_too(pipeline: Pipeline) -> None:
    def train(ctx: StageContext) -> None:
        with ctx.stop.held_up():
            send(signal.SIGTERM)
        (ctx.out / "went-on").write_text("")

    pipeline.hooks["upper"] = train
    with pytest.raises(local.Interrupted):
        pipeline.run()
    assert not (pipeline.out / "stages" / "upper" / "went-on").exists()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_a_signal_ends_at_once_and_sigterm_does_not(
    pipeline: Pipeline, first: int
) -> None:
    reached = []

    def train(ctx: StageContext) -> None:
        with ctx.stop.held_up():
            send(first, signal.SIGTERM)
            reached.append("after SIGTERM")
            send(signal.SIGINT)
            reached.append("after Ctrl-C")

    pipeline.hooks["upper"] = train
    with pytest.raises(local.Interrupted) as caught:
        pipeline.run()
    assert reached == ["after SIGTERM"]
    assert caught.value.exit_code == 128 + first


def test_between_two_stages(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "summary", lambda *_, **__: send(signal.SIGTERM))
    with pytest.raises(local.Interrupted, match="between two stages by SIGTERM") as caught:
        pipeline.run()
    assert caught.value.exit_code == 143


def test_an_ignored_signal_stays_ignored() -> None:
    """As of a shell's background job, which Ctrl-C is not meant for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stops_on_signals(stop):
            send(signal.SIGINT)
        assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_changes() -> None:
    handlers = []

    def work() -> None:
        with stops_on_signals(StopRequest()):
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]
