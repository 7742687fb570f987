"""What of a run on Ray needs no Ray; the rest is tests/integration/test_ray_run.py."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from amenable.artifacts import Deadline, Progress
from amenable.cli.main import main
from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.errors import RecipeError, UsageError
from amenable.pipeline import ray
from amenable.pipeline.stages import STAGES

TINY = "examples/tiny.toml"
TUNED = ["sft", "collect", "reward", "policy", "evaluate"]


def recipe(*settings: str) -> Recipe:
    return load_recipe(Path(__file__).parents[3] / TINY, settings)


def named(own: Recipe) -> list[tuple[tuple[int, float, float], list[str]]]:
    return [
        ((place.workers, place.cpus, place.gpus), [stage.name for stage in stages])
        for place, stages in ray.places(own, STAGES)
    ]


def test_stages_that_ask_for_the_same_share_their_workers() -> None:
    own = recipe("ray.workers=2", "ray.cpus_per_worker=3", "ray.gpus_per_worker=1")
    assert named(own) == [
        ((1, 3.0, 0.0), ["data"]),
        ((2, 3.0, 1.0), TUNED),
        ((1, 3.0, 0.0), ["report"]),
    ]


def test_a_stage_asks_for_what_is_its_own() -> None:
    own = recipe("ray.workers=2", "ray.gpus_per_worker=1", "ray.policy.workers=8")
    own_two = recipe("ray.workers=2", "ray.gpus_per_worker=1", "ray.evaluate.gpus_per_worker=0")
    assert named(own)[1:4] == [
        ((2, 1.0, 1.0), TUNED[:3]),
        ((8, 1.0, 1.0), ["policy"]),
        ((2, 1.0, 1.0), ["evaluate"]),
    ]
    assert named(own_two)[2] == ((2, 1.0, 0.0), ["evaluate"])


def test_a_stage_that_is_off_asks_for_nothing() -> None:
    own = recipe("sft.enabled=false", "ray.sft.workers=8")
    assert named(own)[0] == ((1, 1.0, 0.0), ["data", "sft"])
    assert named(own)[1] == ((1, 1.0, 0.0), TUNED[1:])


def test_each_part_has_its_share_of_the_minutes() -> None:
    """Shares of sft 12, policy 44, evaluate 18, of 74 minutes: as many minutes each."""
    own = recipe("reward.enabled=true")
    sft, policy, evaluate = (
        stage for stage in STAGES if stage.name in ("sft", "policy", "evaluate")
    )
    now = [0.0]
    deadline = Deadline(74 * 60, clock=lambda: now[0])
    rest = [sft, policy, evaluate]
    assert ray._minutes(deadline, [sft], rest, own) == pytest.approx(12)
    now[0] = 12 * 60
    assert ray._minutes(deadline, [policy, evaluate], rest[1:], own) == pytest.approx(62)
    now[0] = 75 * 60
    assert ray._minutes(deadline, [evaluate], [evaluate], own) > 0


def job(folder: Path, name: str, end: float | None = None) -> ray.Job:
    place = ray.Place(1, 1.0, 0.0, together=True)
    return ray.Job(recipe(), folder, folder, (), ("sft",), end, place, None, name)


def test_the_budget_does_not_begin_again_with_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(ray.time, "time", lambda: now[0])
    own = job(tmp_path, "sft-1", end=1000 + 60 * 10)
    assert own.minutes() == pytest.approx(10)
    now[0] += 60 * 7
    assert own.minutes() == pytest.approx(3)
    now[0] += 60 * 7
    assert 0 < (own.minutes() or 0) < 0.1
    assert job(tmp_path, "sft-1").minutes() is None


def test_records_of_another_run_stay(tmp_path: Path) -> None:
    for name in ("sft-1", "sft-2"):
        (tmp_path / ".ray" / name).mkdir(parents=True)
    ray._remove_records(job(tmp_path, "sft-2"))
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["sft-1"]
    ray._remove_records(job(tmp_path, "sft-1"))
    assert not (tmp_path / ".ray").exists()
    ray._remove_records(job(tmp_path, "data-1"))


def test_a_line_is_told_when_it_is_whole() -> None:
    told: list[str] = []

    class Queue:
        put = staticmethod(told.append)

    stream = ray._Lines(Queue())
    progress = Progress(stream=stream)  # type: ignore[arg-type]
    progress.say("sft: starts")
    stream.write("half a ")
    assert told == ["sft: starts"]
    stream.write("line\nand")
    assert told == ["sft: starts", "half a line"]


@pytest.mark.parametrize("on", ["rays", "ray:", "ray://", "ray://a/b", "kfp"])
def test_no_address(on: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected ray, ray://auto or ray://HOST:PORT"):
        ray.run(
            recipe("data.demonstrations=[]", f"data.prompts={prompts(tmp_path)}"), tmp_path, on=on
        )


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    own = recipe("data.demonstrations=[]", f"data.prompts={prompts(tmp_path)}")
    with pytest.raises(UsageError, match=r'--on ray: Ray is not installed .*"amenable\[ray\]"'):
        ray.run(own, tmp_path / "run", on="ray")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("run", TINY, "--on", "ray", "--processes", "2"),
            "--processes and --on exclude each other",
        ),
        (("run", TINY, "--on", "spark"), "--on: found 'spark'"),
        (("run", TINY, "--on", "ray", "--max-minutes", "0"), "--max-minutes: must be above 0"),
        (("run", TINY, "--on", "ray", "--only", "x"), "--only: no stage 'x'"),
        (
            ("run", TINY, "--on", "ray", "--out", "s3://lab/run"),
            "--on ray: the run folder must lie",
        ),
    ],
)
def test_the_command_refuses(
    words: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setattr(sys, "argv", ["amenable", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"amenable: {told}")


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text('{"input_text": "Say yes."}\n')
    return path


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(OSError, match="refused"):
            ray._knock(f"127.0.0.1:{port}")
        free.listen()
        ray._knock(f"127.0.0.1:{port}")
    ray._knock("local")
    ray._knock("auto")


def room(own: Recipe, **has: float) -> str:
    stream = io.StringIO()
    asked = [place for place, _ in ray.places(own, STAGES)]
    ray._check_room("ray://auto", asked, has, Progress(stream=stream))
    return stream.getvalue()


def test_a_cluster_that_is_too_small_is_told_before_it_waits_for_ever() -> None:
    own = recipe("ray.workers=3", "ray.cpus_per_worker=2", "ray.gpus_per_worker=1")
    assert room(own, CPU=6.0, GPU=3.0) == ""
    with pytest.raises(UsageError, match=r"3 workers with 2 CPUs each and the cluster has 4 CPUs"):
        room(own, CPU=4.0, GPU=3.0)
    with pytest.raises(UsageError, match=r"1 GPUs each and the cluster has 0 GPUs; lower ray.work"):
        room(own, CPU=6.0)


def test_gpus_that_nobody_asks_for_are_named() -> None:
    assert "has 8 GPUs and the recipe asks for none" in room(recipe(), CPU=8.0, GPU=8.0)


def look(directory: Path, mark: Path, changed: Sequence[tuple[str, str]] = ()) -> str:
    wanted = {"python": ray.versions()["python"], **dict(changed)}
    return ray._look(directory, mark, wanted)


def test_a_host_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "facts", lambda: {"python": ray.versions()["python"]})
    mark = tmp_path / "mark"
    assert "is not the run folder there" in look(tmp_path, mark)
    mark.touch()
    assert look(tmp_path, mark) == ""
    assert "is not there; share it" in look(tmp_path / "none", mark)
    assert look(tmp_path, mark, [("python", "2.7")]).endswith("there and 2.7 here")


def test_every_stage_that_ranks_share_has_its_section() -> None:
    assert set(ray.RAY_STAGES) == {stage.name for stage in STAGES if stage.together}


def test_ranges() -> None:
    for setting in ("ray.workers=0", "ray.max_failures=-2", "ray.sft.gpus_per_worker=-2"):
        with pytest.raises(RecipeError, match=setting.partition("=")[0]):
            recipe(setting)


def test_vllm_serves_one_worker() -> None:
    ray._check_engine(recipe("policy.engine=vllm"), ray.places(recipe(), STAGES))
    two = recipe("policy.engine=vllm", "ray.workers=2")
    with pytest.raises(UsageError, match=r"set ray\.policy\.workers = 1"):
        ray._check_engine(two, ray.places(two, STAGES))
    few = recipe("policy.engine=vllm", "ray.workers=2", "ray.policy.workers=1")
    ray._check_engine(few, ray.places(few, STAGES))
