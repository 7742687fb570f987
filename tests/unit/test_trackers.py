from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from amenable import trackers as module
from amenable.artifacts import Json, MetricsLog, read_json
from amenable.config.checks import TRACKERS
from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.errors import RecipeError, UsageError
from amenable.pipeline.preflight import check_inputs
from amenable.trackers import KINDS, Trackers, check_trackers


class Fake:
    """A tracker that keeps what it is told, and fails where it is told to."""

    opened: list[Fake]
    fails_at = 0

    def __init__(self, name: str, config: Json, known: str) -> None:
        self.name, self.config = name, config
        self.id = known or f"id-{len(self.opened)}"
        self.points: list[tuple[str, int, dict[str, float]]] = []
        self.orders: list[int] = []
        self.ok: bool | None = None
        self.opened.append(self)

    def log(self, stage: str, step: int, figures: Mapping[str, float], order: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("https://me:hunter2@host/api?key=abc is away\nsecond line")
        self.points.append((stage, step, dict(figures)))
        self.orders.append(order)

    def finish(self, ok: bool) -> None:
        self.ok = ok


class Heard:
    """What comes after the trackers."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.seen: list[int] = []

    def begin(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        self.begun += [step for step, _ in rows]

    def see(self, step: int, figures: Mapping[str, float]) -> None:
        self.seen.append(step)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(Fake, "opened", [], raising=False)
    monkeypatch.setattr(Fake, "fails_at", 0)
    monkeypatch.setitem(KINDS, "wandb", Fake)
    return Fake


def recipe(*settings: str) -> Recipe:
    base = ["trackers=wandb", "data.prompts=s3://me:hunter2@bucket/x", "policy.reward=math:fsum"]
    return load_recipe(None, [*base, *settings])


def process(
    root: Path, told: Recipe, after: int, steps: Iterable[int], made: str = "as ever"
) -> tuple[list[str], Heard]:
    """One process that trains from a checkpoint at `after`."""
    said: list[str] = []
    heard = Heard()
    trackers = Trackers(told, root, said.append)
    log = MetricsLog("sft", root, tensorboard=False, observer=trackers.of("sft", heard, made))
    log.truncate(after)
    for step in steps:
        log.write(step, loss=step / 2, broken=float("nan"))
    trackers.finish(True)
    return said, heard


def test_a_resumed_run_goes_on_in_the_same_tracked_run(tmp_path: Path, fake: type[Fake]) -> None:
    process(tmp_path, recipe(), -1, [1, 2, 3])
    _, heard = process(tmp_path, recipe(), 2, [3, 4])
    first, second = fake.opened
    assert (first.id, second.id) == ("id-0", "id-0")
    assert first.points == [("sft", step, {"sft/loss": step / 2}) for step in (1, 2, 3)]
    assert second.points == [("sft", 4, {"sft/loss": 2.0})]
    assert first.orders + second.orders == [2, 3, 4, 5]
    assert second.ok
    assert (heard.begun, heard.seen) == ([1, 2], [3, 4])


def test_another_recipe_is_another_tracked_run(tmp_path: Path, fake: type[Fake]) -> None:
    process(tmp_path, recipe(), -1, [1])
    process(tmp_path, recipe("seed=1"), -1, [1])
    assert [tracker.id for tracker in fake.opened] == ["id-0", "id-1"]
    assert [len(tracker.points) for tracker in fake.opened] == [1, 1]


@pytest.mark.parametrize(
    "setting", ["ray.max_failures=9", "kfp.retries=3", "checkpoint.keep_last=7", "trackers=wandb"]
)
def test_where_a_run_goes_on_is_no_other_recipe(
    tmp_path: Path, fake: type[Fake], setting: str
) -> None:
    process(tmp_path, recipe(), -1, [1])
    process(tmp_path, recipe(setting), 1, [2])
    assert [tracker.id for tracker in fake.opened] == ["id-0", "id-0"]


def test_a_stage_made_of_something_else_is_another_tracked_run(
    tmp_path: Path, fake: type[Fake]
) -> None:
    """As after an edit of the data, under the same recipe; also in the middle of a process."""
    process(tmp_path, recipe(), -1, [1, 2], made="of old rows")
    process(tmp_path, recipe(), -1, [1, 2], made="of new rows")
    assert [tracker.id for tracker in fake.opened] == ["id-0", "id-1"]
    assert [len(tracker.points) for tracker in fake.opened] == [2, 2]
    trackers = Trackers(recipe(), tmp_path, print)
    trackers.log("data", 1, {"rows": 1.0}, "first")
    trackers.log("sft", 1, {"loss": 1.0}, "of newer rows")
    trackers.finish(True)
    assert [tracker.id for tracker in fake.opened] == ["id-0", "id-1", "id-1", "id-3"]
    assert all(tracker.ok for tracker in fake.opened)


def test_a_tracker_named_later_is_told_what_stands_in_the_log(
    tmp_path: Path, fake: type[Fake]
) -> None:
    process(tmp_path, recipe("trackers=[]"), -1, [1, 2])
    process(tmp_path, recipe(), 2, [3])
    (tracker,) = fake.opened
    assert [step for _, step, _ in tracker.points] == [1, 2, 3]


def test_a_failing_tracker_is_told_of_once_and_training_goes_on(
    tmp_path: Path, fake: type[Fake]
) -> None:
    fake.fails_at = 2
    said, heard = process(tmp_path, recipe(), -1, [1, 2, 3])
    assert heard.seen == [1, 2, 3]
    assert [step for _, step, _ in fake.opened[0].points] == [1]
    (line,) = said
    assert line.startswith("trackers: warning: wandb is left out from here on (https://")
    assert line.endswith("training goes on")
    assert "hunter2" not in line
    assert "abc" not in line


def test_no_secret_goes_to_a_tracker(tmp_path: Path, fake: type[Fake]) -> None:
    process(tmp_path, recipe(), -1, [1])
    assert fake.opened[0].config["data.prompts.files"] == ["s3://bucket/x"]
    assert "hunter2" not in str(fake.opened[0].config)


def test_nothing_is_opened_or_written_without_trackers(tmp_path: Path, fake: type[Fake]) -> None:
    process(tmp_path, recipe("trackers=[]"), -1, [1])
    assert fake.opened == []
    assert not (tmp_path / "trackers.json").exists()


def test_a_broken_memory_starts_a_new_tracked_run(tmp_path: Path, fake: type[Fake]) -> None:
    process(tmp_path, recipe(), -1, [1])
    (tmp_path / "trackers.json").write_text('{"recipe": 1}')
    process(tmp_path, recipe(), 1, [2])
    assert [tracker.id for tracker in fake.opened] == ["id-0", "id-1"]
    assert read_json(tmp_path / "trackers.json")["trackers"]["wandb"]["steps"] == {"sft": 2}


def test_every_name_is_a_row() -> None:
    assert tuple(KINDS) == TRACKERS


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"trackers: 'tensorbord' is no tracker; choose from wand"
    ):
        recipe("trackers=tensorbord")


def test_a_missing_package_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"trackers: 'mlflow' needs the package mlflow, .* pip in"):
        check_trackers(["mlflow"])
    with pytest.raises(UsageError, match="trackers: 'wandb' needs the package wandb"):
        check_inputs(recipe())
    assert importlib.util is module.importlib.util
