from __future__ import annotations

import io
from typing import Any

import pytest

from amenable.progress import Deadline, PlainLines, Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_deadline_without_budget_never_ends() -> None:
    assert not Deadline().exceeded()


def test_deadline_ends_and_remembers_that_it_said_so() -> None:
    clock = Clock()
    deadline = Deadline(5, clock=clock)
    clock.now = 4.9
    assert not deadline.exceeded()
    assert not deadline.cut
    clock.now = 5
    assert deadline.exceeded()
    assert deadline.cut
    assert deadline.remaining_s() == 0


def test_a_part_of_a_deadline_ends_before_it() -> None:
    clock = Clock()
    deadline = Deadline(8, clock=clock)
    clock.now = 4
    part = deadline.part(0.25)
    clock.now = 4.9
    assert not part.exceeded()
    clock.now = 5
    assert part.exceeded()
    assert not deadline.exceeded()
    assert not Deadline().part(0.25).exceeded()


def test_plain_lines_are_few_and_say_the_time_left() -> None:
    clock, lines = Clock(), list[str]()
    tracker = PlainLines(100, "sft", lines.append, clock=clock)
    for _ in range(100):
        clock.now += 1
        tracker.advance(loss=0.51234)
    tracker.finish()
    assert lines[0] == "sft 10/100  10 s, 1 min 30 s left  loss 0.5123"
    assert len(lines) == 10
    assert lines[-1].startswith("sft 100/100  1 min 40 s")


def test_what_was_done_before_counts_for_no_time() -> None:
    """50 of 100 came out of a checkpoint; the 51st takes ten seconds."""
    clock, lines = Clock(), list[str]()
    tracker = PlainLines(100, "sft", lines.append, done=50, clock=clock)
    for _ in range(10):
        clock.now += 10
        tracker.advance()
    assert lines[0] == "sft 56/100  1 min 00 s, 7 min 20 s left"


def test_slow_steps_are_told_after_a_minute() -> None:
    clock, lines = Clock(), list[str]()
    tracker = PlainLines(1000, "sft", lines.append, clock=clock)
    for _ in range(7):
        clock.now += 20
        tracker.advance()
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "a\nb\n"),
        ({"quiet": True}, ""),
        ({"rank": 2}, "b (seen by rank 2)\n"),
    ],
)
def test_a_process_that_follows_says_which_rows_it_blames(
    settings: dict[str, Any], said: str
) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream, **settings)
    progress.say("a")
    progress.blame("b")
    with progress.track(3, "work") as bar:
        bar.advance(0)
    assert stream.getvalue().replace("work 0/3  0 s\n", "") == said


def test_piped_progress_is_plain_text() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.track(2, "evaluate") as tracker:
        tracker.advance(2, wins="0.5")
    progress.say("done")
    assert stream.getvalue() == "evaluate 2/2  0 s  wins 0.5\ndone\n"


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream, quiet=True)
    with progress.track(1, "evaluate") as tracker:
        tracker.advance()
    progress.say("done")
    assert stream.getvalue() == ""


def test_terminal_gets_a_bar_and_lines_above_it() -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    with progress.track(2, "policy") as tracker:
        progress.say("a line [with brackets]")
        tracker.advance(2, reward=1.25)
    progress.say("after")
    text = stream.getvalue()
    assert "a line [with brackets]" in text
    assert "2/2" in text
    assert "reward 1.25" in text
    assert text.endswith("after\n")


def test_error_inside_keeps_its_own_message() -> None:
    with (
        pytest.raises(ValueError, match="mine"),
        Progress(stream=io.StringIO()).track(2, "policy"),
    ):
        raise ValueError("mine")
