from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from tests.unit.disks import small_disk

from amenable.artifacts import StageContext, read_json
from amenable.errors import (
    DataError,
    NumericsError,
    RecipeError,
    StageError,
    StorageError,
    UsageError,
)
from amenable.pipeline import local, mirror
from amenable.pipeline.store import Store

from .stores import Cut, clear

if TYPE_CHECKING:
    from .conftest import Pipeline

ALL = ["letters", "upper", "count", "page"]


def raising(error: BaseException) -> Callable[[StageContext], NoReturn]:
    def hook(ctx: StageContext) -> NoReturn:
        raise error

    return hook


def status(pipeline: Pipeline, stage: str) -> str:
    return str(read_json(pipeline.out / "stages" / stage / "state.json")["status"])


def test_first_run_runs_all_in_order(pipeline: Pipeline) -> None:
    summary = pipeline.run()
    assert pipeline.calls == ALL
    assert (pipeline.out / "models" / "upper" / "weights").read_text() == "HELLO"
    assert {row["status"] for row in summary["stages"].values()} == {"done"}
    assert read_json(pipeline.out / "summary.json") == summary


def test_second_run_skips_all_and_leaves_every_file_alone(pipeline: Pipeline) -> None:
    first = pipeline.run()
    before = {path: path.stat().st_mtime_ns for path in pipeline.out.rglob("*.*")}
    again = pipeline.run()
    assert pipeline.calls == []
    assert again == first
    changed = [path.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert set(changed) <= {".lock", ".hashes.json"}


def test_changed_setting_reruns_its_stage_and_what_follows_from_it(pipeline: Pipeline) -> None:
    pipeline.run()
    pipeline.run("reward.epochs=2")
    assert pipeline.calls == ["count"]
    assert "count: runs again (changed: reward.epochs)" in pipeline.said.getvalue()
    assert "reward.epochs: 1.0 → 2.0" in pipeline.said.getvalue()


def test_changed_input_file_reruns_its_descendants(pipeline: Pipeline) -> None:
    pipeline.run()
    pipeline.source.write_text("Other words\n")
    pipeline.run()
    assert pipeline.calls == ALL


def test_input_change_without_effect_ends_where_it_ends(pipeline: Pipeline) -> None:
    pipeline.run()
    pipeline.source.write_text("hELLO\n")
    pipeline.run()
    assert pipeline.calls == ["letters"]


def test_touched_but_equal_input_reruns_nothing(pipeline: Pipeline) -> None:
    pipeline.run()
    os.utime(pipeline.source, (1, 1))
    pipeline.run()
    assert pipeline.calls == []


def test_damaged_artifact_is_made_again(pipeline: Pipeline) -> None:
    pipeline.run()
    (pipeline.out / "models" / "upper" / "weights").write_text("HELLX")
    pipeline.run()
    assert pipeline.calls == ["upper"]
    assert "missing or altered: models/upper/weights" in pipeline.said.getvalue()


def test_missing_artifact_is_made_again(pipeline: Pipeline) -> None:
    pipeline.run()
    (pipeline.out / "data" / "count.txt").unlink()
    pipeline.run()
    assert pipeline.calls == ["count"]


def test_model_card_written_later_is_no_damage(pipeline: Pipeline) -> None:
    pipeline.run()
    (pipeline.out / "models" / "upper" / "README.md").write_text("card")
    pipeline.run()
    assert pipeline.calls == []


def test_changed_code_reruns_all(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.run()
    monkeypatch.setattr("amenable.pipeline.fingerprint.code_hash", lambda *, with_report: "other")
    pipeline.run()
    assert pipeline.calls == ALL


def test_failed_stage_runs_again_afresh(pipeline: Pipeline) -> None:
    def fail(ctx: StageContext) -> None:
        (ctx.out / "half").write_text("")
        raise NumericsError("the loss is not finite")

    pipeline.hooks["upper"] = fail
    with pytest.raises(NumericsError, match="the loss is not finite"):
        pipeline.run()
    assert status(pipeline, "upper") == "failed"
    assert read_json(pipeline.out / "summary.json")["stages"]["upper"]["status"] == "failed"
    del pipeline.hooks["upper"]
    pipeline.run()
    assert pipeline.calls == ["upper", "count", "page"]
    assert not (pipeline.out / "stages" / "upper" / "half").exists()


def interrupt_with_checkpoint(ctx: StageContext) -> None:
    checkpoint = ctx.out / "checkpoints" / "1"
    if checkpoint.exists():
        ctx.log.truncate(0)
        return
    ctx.log.write(0, loss=2.0)
    ctx.log.write(1, loss=2.0)
    checkpoint.mkdir(parents=True)
    raise KeyboardInterrupt


def test_interrupted_stage_goes_on_from_its_checkpoint(pipeline: Pipeline) -> None:
    pipeline.hooks["upper"] = interrupt_with_checkpoint
    with pytest.raises(local.Interrupted, match="the same command goes on from there") as caught:
        pipeline.run()
    assert caught.value.exit_code == 130
    pipeline.run()
    assert pipeline.calls == ["upper", "count", "page"]
    assert "upper: had not finished; its last checkpoint is looked for" in pipeline.said.getvalue()


def test_half_of_a_first_checkpoint_is_none(pipeline: Pipeline) -> None:
    def die_in_a_write(ctx: StageContext) -> None:
        (ctx.out / "checkpoints" / ".step-000001.partial").mkdir(parents=True)
        raise KeyboardInterrupt

    pipeline.hooks["upper"] = die_in_a_write
    with pytest.raises(local.Interrupted):
        pipeline.run()
    pipeline.hooks.clear()
    pipeline.run()
    assert "upper: starts afresh, the last attempt did not finish" in pipeline.said.getvalue()
    assert not (pipeline.out / "stages" / "upper" / "checkpoints").exists()


def test_checkpoint_of_another_recipe_is_not_used(pipeline: Pipeline) -> None:
    pipeline.hooks["upper"] = interrupt_with_checkpoint
    with pytest.raises(local.Interrupted):
        pipeline.run()
    pipeline.hooks["upper"] = lambda ctx: None
    pipeline.run("sft.epochs=3")
    assert not (pipeline.out / "stages" / "upper" / "checkpoints").exists()


def test_stage_that_leaves_nothing_is_an_error(pipeline: Pipeline) -> None:
    def forget(ctx: StageContext) -> None:
        sys.modules["fake_stages"].page = lambda ctx: {}  # type: ignore[attr-defined]

    pipeline.hooks["count"] = forget
    with pytest.raises(StageError, match=r"page: ended without .*page\.txt"):
        pipeline.run()
    assert status(pipeline, "page") == "failed"


def test_stage_switched_off_leaves_no_artifact(pipeline: Pipeline) -> None:
    pipeline.run()
    summary = pipeline.run("reward.enabled=false")
    assert pipeline.calls == ["page"]
    assert not (pipeline.out / "data" / "count.txt").exists()
    assert summary["stages"]["count"] == {"status": "off", "wall_s": None, "peak_rss_gb": None}
    assert summary["reward"] is None


def test_only_needs_what_comes_before(pipeline: Pipeline) -> None:
    with pytest.raises(StageError, match="upper: needs stage letters, which has not finished in"):
        pipeline.run(only="upper")
    pipeline.run(only="letters")
    pipeline.run(only="upper")
    assert pipeline.calls == ["upper"]


def test_only_on_outdated_inputs_warns(pipeline: Pipeline) -> None:
    pipeline.run()
    summary = pipeline.run("seed=1", "sft.epochs=2", only="upper")
    assert pipeline.calls == ["upper"]
    assert "warning: stage letters was made with other settings" in pipeline.said.getvalue()
    assert summary["stages"]["letters"]["status"] == "outdated"
    assert summary["data"] is None


def test_until_stops_there(pipeline: Pipeline) -> None:
    summary = pipeline.run(until="upper")
    assert pipeline.calls == ["letters", "upper"]
    assert summary["stages"]["count"]["status"] == "pending"


def test_unknown_stage_and_both_flags_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="no stage 'uper'; the stages are letters, upper, count"):
        pipeline.run(only="uper")
    with pytest.raises(UsageError, match="exclude each other"):
        pipeline.run(only="upper", until="count")
    with pytest.raises(UsageError, match="must be above 0"):
        pipeline.run(max_minutes=0)


def test_missing_and_empty_data_files_are_refused_before_the_folder_is_made(
    pipeline: Pipeline,
) -> None:
    pipeline.source.write_text("")
    with pytest.raises(DataError, match=r"is empty; at least one row is needed \(data\.prompts\)"):
        pipeline.run()
    pipeline.source.unlink()
    with pytest.raises(DataError, match=r"no such file .* \(data\.prompts\)"):
        pipeline.run()
    with pytest.raises(DataError, match="is a folder"):
        pipeline.run(f"data.prompts={pipeline.root}")
    for setting, message in (
        ("format=lisp", "format 'lisp' is unknown; expected auto or one of"),
        ("reader=nowhere:pairs", "reader: nowhere:pairs: nowhere cannot be imported"),
        ("reader=json:nothing", "there is no function nothing in json"),
    ):
        pipeline.source.write_text("{}")
        with pytest.raises(RecipeError, match=message):
            pipeline.run(f"data.prompts.{setting}")
    assert not pipeline.out.exists()


def test_the_code_of_a_reader_function_counts_as_input(pipeline: Pipeline) -> None:
    reader = pipeline.root / "own.py"
    reader.write_text("def rows(records):\n    yield from records\n")
    setting = f"data.prompts.reader={reader}:rows"
    pipeline.run(setting)
    pipeline.run(setting)
    assert pipeline.calls == []
    reader.write_text("def rows(records):\n    return records\n")
    pipeline.run(setting)
    assert "letters" in pipeline.calls


def test_full_disk_in_a_stage_is_told(pipeline: Pipeline) -> None:
    pipeline.hooks["upper"] = raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(StorageError, match="the disk is full; free some space and run again"):
        pipeline.run()
    assert not (pipeline.out / "models").exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_out_of_memory_is_told(pipeline: Pipeline, error: Exception) -> None:
    pipeline.hooks["upper"] = raising(error)
    with pytest.raises(StageError, match=r"upper: out of memory; lower upper\.micro_batch_tokens"):
        pipeline.run()


def test_defect_keeps_its_own_error(pipeline: Pipeline) -> None:
    pipeline.hooks["upper"] = raising(ZeroDivisionError("mine"))
    with pytest.raises(ZeroDivisionError, match="mine"):
        pipeline.run()
    assert status(pipeline, "upper") == "failed"


def test_budget_is_shared_and_a_shortened_stage_is_completed_later(pipeline: Pipeline) -> None:
    shares = {}

    def look(ctx: StageContext) -> None:
        shares[ctx.stage] = ctx.deadline.remaining_s()

    def use_up(ctx: StageContext) -> None:
        look(ctx)
        ctx.deadline._end = 0.0
        assert ctx.deadline.exceeded()

    pipeline.hooks |= {"letters": look, "upper": look, "count": use_up, "page": look}
    summary = pipeline.run(max_minutes=10)
    assert shares["letters"] == pytest.approx(540 / 5, abs=5)
    assert shares["count"] == pytest.approx(540 * 2 / 3, abs=5)
    assert summary["stages"]["count"]["status"] == "shortened"
    pipeline.run(max_minutes=10)
    assert pipeline.calls == []
    pipeline.hooks.clear()
    pipeline.run()
    assert pipeline.calls == ["count"]


def test_summary_has_every_key_and_moves_health_up(pipeline: Pipeline) -> None:
    summary = pipeline.run("name=mine", "seed=3")
    assert [summary[key] for key in ("schema_version", "name", "seed", "base_model")] == [
        1,
        "mine",
        3,
        "tiny",
    ]
    assert summary["health"] == [{"rule": "r", "stage": "upper", "step": 0}]
    assert summary["evaluate"] is None
    assert summary["peak_rss_gb"] > 0
    assert 0 <= summary["wall_s"] < 60


def test_manifest_names_versions_inputs_and_artifacts(pipeline: Pipeline) -> None:
    pipeline.run(command=["amenable", "run"])
    manifest = read_json(pipeline.out / "manifest.json")
    assert manifest["command"] == ["amenable", "run"]
    assert manifest["versions"]["python"].startswith("3.")
    assert manifest["hardware"]["cores"] >= 1
    assert len(manifest["inputs"]["data.prompts[0] content"]) == 64
    assert set(manifest["artifacts"]) == {
        "data/letters.txt",
        "data/count.txt",
        "models/upper/weights",
        "stages/upper/metrics.jsonl",
        "page.txt",
    }


def test_report_that_fails_stops_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(folder: object) -> NoReturn:
        raise ValueError("no page")

    pipeline.hooks["upper"] = lambda ctx: [ctx.refresh_report(), ctx.refresh_report()]  # type: ignore[assignment,func-returns-value]
    monkeypatch.setattr(local, "_SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setitem(
        sys.modules, "amenable.evaluate.report", type("Report", (), {"render": render})
    )
    pipeline.run()
    assert pipeline.said.getvalue().count("report.html could not be refreshed: no page") == 1


def test_the_report_is_not_drawn_after_every_short_step(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    pipeline.hooks["upper"] = lambda ctx: [ctx.refresh_report() for _ in range(5)]  # type: ignore[assignment,func-returns-value]
    monkeypatch.setitem(
        sys.modules, "amenable.evaluate.report", type("Report", (), {"render": drawn.append})
    )
    pipeline.run()
    assert len(drawn) == 1


def test_damaged_state_means_not_done(pipeline: Pipeline) -> None:
    pipeline.run()
    (pipeline.out / "stages" / "count" / "state.json").write_text('{"finger')
    pipeline.run()
    assert pipeline.calls == ["count"]


SCRIPT = """
    import sys, time, types
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import conftest
    made = conftest.Pipeline(Path({root!r}))
    module = types.ModuleType("fake_stages")
    for name in ("letters", "upper", "count", "page"):
        setattr(module, name, getattr(made, name))
    sys.modules["fake_stages"] = module
    conftest.local.base_model = lambda recipe, say: made.root / "base"
    def hang(ctx):
        (ctx.folder.models / "upper").mkdir(parents=True)
        (ctx.folder.models / "upper" / "weights").write_text("HEL")
        (made.root / "started").write_text("")
        time.sleep(60)
    made.hooks["upper"] = hang
    made.run()
"""


@pytest.fixture
def hanging(pipeline: Pipeline) -> subprocess.Popen[bytes]:
    """Another process that runs the pipeline and hangs in `upper` with half a model written."""
    code = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), root=str(pipeline.root))
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if (pipeline.root / "started").exists():
            return process
        time.sleep(0.05)
    process.kill()
    pytest.fail("the other process did not start")


def test_kill_leaves_no_lock_and_no_half_artifact(
    pipeline: Pipeline, hanging: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(StageError, match=rf"process {hanging.pid} on .*, is writing this run"):
        pipeline.run()
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()
    assert status(pipeline, "upper") == "running"
    pipeline.run()
    assert pipeline.calls == ["upper", "count", "page"]
    assert (pipeline.out / "models" / "upper" / "weights").read_text() == "HELLO"


def test_a_read_only_folder_is_named_and_stays_as_it_is(pipeline: Pipeline) -> None:
    with small_disk(pipeline.out, "1m") as disk:
        pipeline.run()
        before = {path: path.read_bytes() for path in pipeline.out.rglob("*") if path.is_file()}
        disk.remount("ro")
        told = rf"cannot write {pipeline.out}: the file system is read-only; choose another folder"
        with pytest.raises(StorageError, match=told):
            pipeline.run("sft.epochs=2")
        assert pipeline.calls == []
        after = {path: path.read_bytes() for path in pipeline.out.rglob("*") if path.is_file()}
        assert after == before
        disk.remount("rw")
        pipeline.run()
        assert pipeline.calls == []


@pytest.mark.parametrize("jump_s", [1e9, -1e9], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_reruns_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    real = time.time
    pipeline.hooks["upper"] = lambda ctx: monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    summary = pipeline.run()
    assert 0 <= summary["wall_s"] < 60
    assert all(0 <= row["wall_s"] < 60 for row in summary["stages"].values())
    pipeline.run()
    assert pipeline.calls == []
    (pipeline.out / "models" / "upper" / "weights").write_text("HELLX")
    pipeline.run()
    assert pipeline.calls == ["upper"]


def test_state_lists_hashes(pipeline: Pipeline) -> None:
    pipeline.run()
    state = json.loads((pipeline.out / "stages" / "letters" / "state.json").read_text())
    assert state["status"] == "done"
    assert state["outputs"] == {
        "data/letters.txt": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    }


@pytest.fixture
def on_a_store(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Cut:
    """The pipeline's run folder is `memory://lab/run`, whose power can be cut."""
    clear("lab")
    system = Cut()
    monkeypatch.setenv("AMENABLE_HOME", str(pipeline.root / "home"))
    monkeypatch.setattr(type(pipeline), "out", "memory://lab/run")
    monkeypatch.setattr(mirror, "Store", lambda url: Store(url, wait_s=0, system=system))
    return system


def test_a_run_on_a_store_goes_on_on_another_machine(pipeline: Pipeline, on_a_store: Cut) -> None:
    first = pipeline.run(until="upper")
    shutil.rmtree(pipeline.root / "home")
    second = pipeline.run()
    assert pipeline.calls == ["count", "page"]
    assert second["stages"].keys() == first["stages"].keys()
    shutil.rmtree(pipeline.root / "home")
    assert pipeline.run() == second
    assert pipeline.calls == []


def test_a_store_that_goes_away_ends_the_run_and_nothing_is_lost(
    pipeline: Pipeline, on_a_store: Cut
) -> None:
    def cut(ctx: StageContext) -> None:
        on_a_store.at = on_a_store.steps
        (ctx.out / "checkpoints").mkdir()
        (ctx.out / "checkpoints" / "one").write_text("1")
        ctx.publish()

    pipeline.hooks["count"] = cut
    with pytest.raises(StorageError, match=r"cannot be reached.* is whole in .*/run; the same"):
        pipeline.run()
    assert status_of(pipeline, "count") == "failed"
    on_a_store.at = None
    found: list[str] = []
    pipeline.hooks["count"] = lambda ctx: found.extend(
        path.name for path in (ctx.out / "checkpoints").iterdir()
    )
    pipeline.run()
    assert pipeline.calls == ["count", "page"]
    assert found == ["one"]


def status_of(pipeline: Pipeline, stage: str) -> str:
    """As `status`, in the working folder of a store."""
    folder = mirror.working_folder(str(pipeline.out))
    return str(read_json(folder / "stages" / stage / "state.json")["status"])
