"""The tiny recipe on a local Ray cluster of two workers: what one process computes, also after a
worker was killed. Every rate is high enough for a lost or repeated step to show."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from amenable.artifacts import Json, read_jsonl, write_jsonl

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-8  # that of several processes in fp64
UPDATES = 8
SETTINGS = [
    "ray.workers=2",
    'model.dtype="fp64"',
    "sft.learning_rate=0.01",
    "reward.learning_rate=0.01",
    "policy.learning_rate=0.01",
    f"policy.updates={UPDATES}",
    'policy.selection.by="last"',
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; make test-ray"
    ),
]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "amenable", *map(str, words)]


def started(*words: object) -> subprocess.Popen[str]:
    """A command whose two streams come back as one."""
    return subprocess.Popen(
        command(*words),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def recipe_words(out: Path) -> list[object]:
    return ["run", "examples/tiny.toml", "--out", out, *(f"--set={own}" for own in SETTINGS)]


def run(out: Path, *words: object) -> str:
    process = started(*recipe_words(out), *words)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run(out)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("together") / "run"
    return out, run(out, "--on", "ray")


def weights(folder: Path) -> dict[str, Path]:
    found = {
        path.relative_to(folder).as_posix(): path for path in folder.glob("models/**/*.safetensors")
    }
    assert len(found) == 7
    return found


def furthest(one: Path, other: Path) -> float:
    """The largest difference of any weight of any model, and of any figure of any step."""
    apart = [0.0]
    theirs = weights(other)
    for name, path in weights(one).items():
        a, b = load_file(path), load_file(theirs[name])
        assert a.keys() == b.keys()
        apart += [float((a[key].double() - b[key].double()).abs().max()) for key in a]
    for stage in ("sft", "reward", "policy"):
        rows = [
            list(read_jsonl(folder / "stages" / stage / "metrics.jsonl")) for folder in (one, other)
        ]
        assert len(rows[0]) == len(rows[1]) > 2
        for a_row, b_row in zip(*rows, strict=True):
            apart += _figures_apart(a_row, b_row)
    return max(apart)


def _figures_apart(a: Json, b: Json) -> list[float]:
    assert a.keys() == b.keys()
    known = [key for key in a.keys() - {"wall_s"} if a[key] is not None or b[key] is not None]
    return [abs(a[key] - b[key]) / max(1.0, abs(a[key])) for key in known]


def results(folder: Path) -> object:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["evaluate"], summary["reward"]["accuracy"]


def test_two_workers_compute_what_one_process_does(alone: Path, together: tuple[Path, str]) -> None:
    out, said = together
    assert furthest(alone, out) <= TOLERANCE
    assert results(alone) == results(out)
    assert {"0", "1"} == set(re.findall(r"^ray: worker (\d) of 2: ", said, re.M))


def test_the_command_says_what_a_run_here_says(together: tuple[Path, str]) -> None:
    """Nothing of Ray's own, every stage's lines, the result; and no folder of Ray's stays."""
    out, said = together
    for stage in ("data", "sft", "collect", "reward", "policy", "evaluate", "report"):
        assert re.search(rf"^{stage}: done in ", said, re.M), said
    assert f"report: {out / 'report.html'}" in said
    assert not re.search(r"pid=|INFO|WARNING|Train|ray\.io", said), said
    assert not (out / ".ray").exists()


def test_a_killed_worker_is_started_again_and_the_result_stands(
    together: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    said: list[str] = []
    killed = 0
    with started(*recipe_words(out), "--on", "ray") as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("policy: numerics gate") and not killed:
                found = re.search(r"ray: worker 1 of 2: \S+, process (\d+)", "".join(said))
                assert found
                killed = int(found[1])
                wait_for_update(out / "stages" / "policy" / "metrics.jsonl", 2)
                os.kill(killed, signal.SIGKILL)
    text = "".join(said)
    assert process.returncode == 0, text
    assert killed
    assert len(re.findall(r"^ray: worker 1 of 2: ", text, re.M)) == 2, text
    assert "policy: had not finished; its last checkpoint is looked for" in text
    assert furthest(together[0], out) == 0.0
    assert results(together[0]) == results(out)


def wait_for_update(path: Path, step: int) -> None:
    end = time.monotonic() + 120
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert f'"step": {UPDATES - 1},' not in path.read_text(), "the kill would come too late"


def test_an_error_of_a_stage_ends_the_command_as_it_does_here(tmp_path: Path) -> None:
    """Not tried again: a missing stage is missing the second time, too."""
    process = started(*recipe_words(tmp_path / "run"), "--on", "ray", "--only", "reward")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert said.splitlines()[-1].startswith("amenable: reward: needs stage "), said
    assert len(re.findall(r"^ray: worker 0 of 2: ", said, re.M)) == 1, said


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = []
    with started(*recipe_words(out), "--on", "ray", "--until", "sft") as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("ray: worker 0"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(said)
    assert "the same command goes on from there" in said[-1]
    again = subprocess.run(
        command(*recipe_words(out), "--until", "sft"), cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "data: unchanged, skipped" in again.stderr


def test_generate_shares_the_prompts(together: tuple[Path, str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, ({"input_text": f"Return the {n}th word."} for n in range(7)))
    rows = []
    for name, words in (("here", ()), ("there", ("--on", "ray", "--workers", 2))):
        out = tmp_path / f"{name}.jsonl"
        done = started("generate", together[0], "--prompts", prompts, "--out", out, *words)
        said, _ = done.communicate(timeout=300)
        assert done.returncode == 0, said
        rows.append(list(read_jsonl(out)))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "here.jsonl",
        "prompts.jsonl",
        "there.jsonl",
    ]
