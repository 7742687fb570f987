"""What decides whether a pipeline may take a stage's task as done, on the fake stages."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from amenable.artifacts import write_text
from amenable.config.load import load_recipe, to_toml
from amenable.pipeline import fingerprint as fp
from amenable.pipeline import kfp_tasks, local
from amenable.pipeline.kfp_tasks import TaskFailed, prepare, run_stage

from .conftest import STAGES, Pipeline

NAMES = [stage.name for stage in STAGES]
Keys = dict[str, str]


@pytest.fixture
def tasks(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The fake stages, run in this process where a task would start a command."""

    def amenable(command: str, recipe: str, *options: str) -> None:
        assert (command, options[0], options[2]) == ("run", "--only", "--out")
        loaded = load_recipe(recipe)
        local.run(loaded, options[3], only=options[1], stages=STAGES)

    monkeypatch.setattr(kfp_tasks, "STAGES", STAGES)
    monkeypatch.setattr(kfp_tasks, "base_model", lambda recipe, say: pipeline.root / "base")
    monkeypatch.setattr(kfp_tasks, "amenable", amenable)
    return pipeline


def keys(tasks: Pipeline, *overrides: str, stages: Sequence[str] = NAMES) -> Keys:
    return prepare(to_toml(tasks.recipe(*overrides)), str(tasks.out), stages)


def whole(tasks: Pipeline, *overrides: str) -> Keys:
    """A run of the pipeline; its keys."""
    found = keys(tasks, *overrides)
    for name in NAMES:
        run_stage(name, str(tasks.out), found[name])
    return found


def changed(before: Keys, after: Keys) -> list[str]:
    return [name for name in NAMES if before[name] != after[name]]


def test_keys_stay_while_nothing_changes(tasks: Pipeline) -> None:
    before = whole(tasks)
    assert len(set(before.values())) == len(NAMES)
    assert keys(tasks) == before
    assert whole(tasks) == before
    assert tasks.calls == NAMES  # the second run found every stage unchanged


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        (lambda tasks, patch: tasks.source.write_text("Other\n"), ["letters"]),
        (lambda tasks, patch: patch.setattr(fp, "code_hash", lambda **_: "edited"), NAMES),
        (lambda tasks, patch: (tasks.out / "data" / "count.txt").unlink(), ["count"]),
        (lambda tasks, patch: write_text(tasks.out / "page.txt", "altered"), ["page"]),
        (lambda tasks, patch: shutil.rmtree(tasks.out / "stages"), NAMES),
    ],
    ids=["data file", "package", "output gone", "output altered", "states gone"],
)
def test_key_is_new_where_the_stage_must_run(
    tasks: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Pipeline, pytest.MonkeyPatch], object],
    touched: list[str],
) -> None:
    before = whole(tasks)
    change(tasks, monkeypatch)
    assert changed(before, keys(tasks)) == touched


def test_setting_touches_its_stage_and_upstream_the_rest(tasks: Pipeline) -> None:
    before = whole(tasks)
    states = {name: run_stage(name, str(tasks.out), before[name]) for name in NAMES}
    after = keys(tasks, "sft.epochs=2")
    assert changed(before, after) == ["upper"]
    assert run_stage("upper", str(tasks.out), after["upper"]) != states["upper"]


def test_key_of_an_earlier_recipe_does_not_come_back(tasks: Pipeline) -> None:
    """The run folder holds the other recipe's results by then."""
    first = whole(tasks)
    second = whole(tasks, "sft.epochs=2")
    third = keys(tasks)
    assert len({first["upper"], second["upper"], third["upper"]}) == 3
    assert first["letters"] == third["letters"]


def test_run_beside_the_pipeline_is_noticed(tasks: Pipeline) -> None:
    before = whole(tasks)
    tasks.run("sft.epochs=2")
    assert tasks.calls == ["upper"]
    assert changed(before, keys(tasks)) == ["upper"]


def test_killed_stage_has_a_new_key(tasks: Pipeline) -> None:
    found = keys(tasks)
    run_stage("letters", str(tasks.out), found["letters"])
    assert changed(found, keys(tasks)) == NAMES[1:]


def test_stage_that_is_off_now_leaves_nothing(tasks: Pipeline) -> None:
    whole(tasks)
    left = [name for name in NAMES if name != "count"]
    found = keys(tasks, "reward.enabled=false", stages=left)
    assert found["count"] == ""
    assert not (tasks.out / "data" / "count.txt").exists()


def test_recipe_of_another_pipeline_is_refused(
    tasks: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        keys(tasks, "reward.enabled=false")
    assert caught.value.code == 2
    said = capsys.readouterr().out
    assert said.startswith("amenable> prepare: failed with exit code 2: ")
    assert "compile it again from this recipe" in said


def test_failed_stage_ends_the_task_with_its_exit_code(
    tasks: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*words: str) -> None:
        raise TaskFailed("no more letters", 130)

    monkeypatch.setattr(kfp_tasks, "amenable", fails)
    with pytest.raises(SystemExit) as caught:
        run_stage("letters", str(tasks.out), "key")
    assert caught.value.code == 130
    said = capsys.readouterr().out
    assert "amenable> letters: failed with exit code 130: no more letters\n" in said


def test_error_line_of_a_command_is_the_tasks() -> None:
    with pytest.raises(TaskFailed, match=r"^none\.toml: no such recipe file") as caught:
        kfp_tasks.amenable("run", "none.toml")
    assert caught.value.exit_code == 2


def test_command_that_is_killed_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfp_tasks.sys, "executable", "false")
    with pytest.raises(TaskFailed, match="ended without a word") as caught:
        kfp_tasks.amenable("run", "none.toml")
    assert caught.value.exit_code == 1


def test_sigterm_goes_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is waited for, its exit code is the task's, and the handler of before is back."""
    command = tmp_path / "command"
    command.write_text(
        "#!/bin/sh\n"
        "trap 'echo saved >&2; exit 143' TERM\n"
        "kill -TERM $PPID\n"
        "while :; do sleep 0.05; done\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(kfp_tasks.sys, "executable", str(command))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TaskFailed) as caught:
        kfp_tasks.amenable("run")
    assert caught.value.exit_code == 143
    assert capsys.readouterr().out == "amenable> saved\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_exit_code_of_a_command_that_a_signal_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\nkill -KILL $$\n")
    command.chmod(0o755)
    monkeypatch.setattr(kfp_tasks.sys, "executable", str(command))
    with pytest.raises(TaskFailed, match="ended without a word") as caught:
        kfp_tasks.amenable("run")
    assert caught.value.exit_code == 137


def test_results_are_copied_with_the_main_figures(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>")
    (tmp_path / "summary.json").write_text(
        '{"reward": {"accuracy": 0.75}, "evaluate": ['
        '{"a": "base", "b": "tuned", "judge": "annotator", "win_rate": 0.5},'
        '{"a": "base", "b": "sft", "judge": "annotator", "win_rate": null}]}'
    )
    places = [tmp_path / name for name in ("page", "numbers", "figures")]
    found = kfp_tasks.results(str(tmp_path), *map(str, places))
    assert found == {"reward_accuracy": 0.75, "win_rate_tuned_against_base_by_annotator": 0.5}
    assert [place.read_text()[:3] for place in places] == ["<p>", '{"r', "{\n "]
