"""Rules while a stage runs: said once, also after a resume; they may end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amenable.artifacts import MetricsLog
from amenable.config.health import HealthConfig
from amenable.config.load import load_recipe
from amenable.errors import RecipeError
from amenable.health.watch import OnlineWatch, Unhealthy

FAR = {"kl_loss": 30.0, "completion_tokens": 8.0}
NEGATIVE = {"kl_loss": -3.0, "kl_se": 0.1, "completion_tokens": 8.0}


def watched(
    folder: Path, said: list[str], config: HealthConfig | None = None
) -> tuple[MetricsLog, OnlineWatch]:
    watch = OnlineWatch("policy", config or HealthConfig(), said.append)
    return MetricsLog("policy", folder, tensorboard=False, observer=watch), watch


def test_what_is_found_is_said_at_once_and_once(tmp_path: Path) -> None:
    said: list[str] = []
    log, watch = watched(tmp_path, said)
    for step in range(6):
        log.write(step, **FAR)
        assert len(said) == (step >= 2)
    assert said[0].startswith("policy: warning kl-far: The policy is 3.75, 3.75, 3.75 nats a token")
    (row,) = watch.rows
    assert (row["rule"], row["stage"], row["step"], row["level"]) == (
        "kl-far",
        "policy",
        2,
        "warning",
    )


def test_a_resumed_stage_does_not_say_it_again(tmp_path: Path) -> None:
    said: list[str] = []
    log, _ = watched(tmp_path, said)
    for step in range(4):
        log.write(step, **FAR)
    log.close()
    again: list[str] = []
    log, watch = watched(tmp_path, again)
    log.truncate(3)
    log.write(4, **FAR)
    assert again == []
    assert [row["step"] for row in watch.rows] == [2]


def test_rows_that_are_forgotten_do_not_count(tmp_path: Path) -> None:
    said: list[str] = []
    log, watch = watched(tmp_path, said)
    for step in range(3):
        log.write(step, **FAR)
    log.truncate(0)
    assert watch.rows == []
    log.write(1, **FAR)
    assert watch.rows == []


@pytest.mark.parametrize(
    ("stop_on", "figures", "stops"),
    [
        (("kl-negative",), NEGATIVE, True),
        (("errors",), NEGATIVE, True),
        (("errors",), FAR, False),
        (("kl-far",), FAR, True),
        (("ratio",), FAR, False),
    ],
)
def test_a_rule_ends_the_stage_where_the_recipe_wants_it(
    tmp_path: Path, stop_on: tuple[str, ...], figures: dict[str, float], stops: bool
) -> None:
    log, watch = watched(tmp_path, [], HealthConfig(stop_on=stop_on))

    def write() -> None:
        for step in range(5):
            log.write(step, **figures)

    if stops:
        with pytest.raises(Unhealthy, match=r"at step \d \(health.stop_on\)"):
            write()
        assert len(log.rows()) < 5, "the row that it spoke of is kept, no other is written"
    else:
        write()
    assert watch.rows


def test_a_rule_that_is_off_is_not_asked(tmp_path: Path) -> None:
    said: list[str] = []
    log, _ = watched(tmp_path, said, HealthConfig(off=("kl-far",)))
    for step in range(5):
        log.write(step, **FAR)
    assert said == []


@pytest.mark.parametrize("key", ["stop_on", "off"])
def test_an_unknown_rule_is_refused(key: str) -> None:
    settings: list[Any] = ['data.task="docstrings"', 'collect.annotator="simulated"']
    with pytest.raises(RecipeError, match=rf"health.{key}: 'kl-farr' is no rule; choose from"):
        load_recipe(None, [*settings, f'health.{key}=["kl-farr"]'])
    load_recipe(None, [*settings, f'health.{key}=["kl-far"]'])
