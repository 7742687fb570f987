"""Data and run folder on an S3 server: every stage, a kill, another machine, wrong keys."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

pytest.importorskip("torch")

from moto.server import ThreadedMotoServer

from amenable.artifacts import read_json

from .test_tiny_run import LIMIT_S, ROOT, STAGES, environment, timeless

DATA = "s3://lab/data/tiny.jsonl"


@dataclass(frozen=True)
class Lab:
    """A server with a bucket, and a machine that knows where it is."""

    url: str
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "AMENABLE_HOME": str(self.home),
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "known",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return {**environment(), **own}

    def store(self) -> fsspec.AbstractFileSystem:
        """The server, by another way than ours."""
        return fsspec.filesystem(
            "s3", key="k", secret="s", endpoint_url=self.url, use_listings_cache=False
        )

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "amenable", *words]

    def run(self, *words: str, code: int = 0, **variables: str) -> str:
        """Standard output and error of `amenable`."""
        done = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**self.environment, **variables},
            timeout=5 * LIMIT_S,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def recipe(self, out: str) -> list[str]:
        data = [f"--set=data.{key}={DATA}" for key in ("demonstrations", "prompts")]
        return ["run", "examples/tiny.toml", *data, "--set=policy.updates=3", "--out", out]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made = Lab(f"http://{host}:{port}", tmp_path_factory.mktemp("home"))
    made.store().mkdir("lab")
    made.store().put_file(str(ROOT / "examples" / "tiny.jsonl"), DATA)
    yield made
    server.stop()


@pytest.fixture(scope="module")
def whole(lab: Lab) -> str:
    """The URL of a finished run."""
    told = lab.run(*lab.recipe("s3://lab/runs/whole"))
    assert "report: s3://lab/runs/whole/report.html" in told
    return "s3://lab/runs/whole"


def published(lab: Lab, run: str) -> bool:
    """Whether a checkpoint of the policy stage is in the index."""
    try:
        return b"stages/policy/checkpoints/" in lab.store().cat_file(f"lab/{run}/.mirror.json")
    except FileNotFoundError:
        return False


def fetched(lab: Lab, url: str, to: Path) -> Path:
    """The run folder as any tool would fetch it: the objects under their own names."""
    lab.store().get(url.removeprefix("s3://"), str(to), recursive=True)
    return to


def test_every_stage_is_done_and_the_store_holds_the_run(
    lab: Lab, whole: str, tmp_path: Path
) -> None:
    folder = fetched(lab, whole, tmp_path / "run")
    summary = read_json(folder / "summary.json")
    assert {name: row["status"] for name, row in summary["stages"].items()} == dict.fromkeys(
        STAGES, "done"
    )
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "models" / "tuned" / "model.safetensors").exists()
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert hidden == {".mirror.json"}
    told = b"".join(path.read_bytes() for path in folder.rglob("*.json"))
    assert b"hunter2" not in told


def test_the_same_command_skips_all(lab: Lab, whole: str) -> None:
    told = lab.run(*lab.recipe(whole))
    assert told.count("unchanged, skipped") == len(STAGES)


def test_a_killed_run_goes_on_on_another_machine(lab: Lab, whole: str, tmp_path: Path) -> None:
    url = "s3://lab/runs/killed"
    process = subprocess.Popen(
        lab.command(*lab.recipe(url)), cwd=ROOT, env=lab.environment, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 5 * LIMIT_S
    while not published(lab, "runs/killed") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    shutil.rmtree(lab.home / "runs")

    held = lab.run(*lab.recipe(url), code=1)
    assert "is writing this run folder; wait for it, stop it" in held
    lease = json.loads(lab.store().cat_file("lab/runs/killed/.lease.json"))
    stale = {**lease, "time": lease["time"] - 120}
    lab.store().pipe_file("lab/runs/killed/.lease.json", json.dumps(stale).encode())

    told = lab.run(*lab.recipe(url))
    assert told.count("unchanged, skipped") == STAGES.index("policy")
    assert "policy: starts" not in told
    one, other = fetched(lab, whole, tmp_path / "one"), fetched(lab, url, tmp_path / "other")
    for name in ("metrics", "samples"):
        log = f"stages/policy/{name}.jsonl"
        assert timeless(one / log) == timeless(other / log)
    weights = "models/tuned/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    results = [read_json(folder / "summary.json")["evaluate"] for folder in (one, other)]
    assert results[0] == results[1]


def test_reports_are_drawn_from_the_store_without_its_weights(lab: Lab, whole: str) -> None:
    page = "lab/runs/whole/report.html"
    before = lab.store().info(page)["LastModified"]
    time.sleep(1.1)
    assert lab.run("report", whole).strip() == f"{whole}/report.html"
    assert lab.store().info(page)["LastModified"] > before
    assert not list((lab.home / "copies").rglob("*.safetensors"))


def test_compare_takes_a_run_from_the_store(lab: Lab, whole: str, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def score(prompts, completions, rows):\n    return [len(c) for c in completions]\n"
    )
    words = ["compare", "tiny", f"tuned={whole}", "--prompts", DATA, "--diversity", "0"]
    told = lab.run(*words, "--judge", f"{judge}:score", "--out", "s3://lab/compared")
    assert "s3://lab/compared/comparison.html" in told
    found = json.loads(lab.store().cat_file("lab/compared/comparison.json"))
    assert [(row["a"], row["b"]) for row in found["comparisons"]] == [("tiny", "tuned")]


def test_what_is_wrong_is_told_in_one_line(lab: Lab) -> None:
    told = lab.run(*lab.recipe("s3://nowhere/runs/x"), code=2)
    assert "s3://nowhere/runs/x: cannot be written" in told
    assert "make the bucket first" in told
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AMENABLE_STORE_WAIT_S": "1"}
    local = ["run", "examples/tiny.toml", "--out", "s3://lab/runs/away"]
    told = lab.run(*local, code=1, **away)
    assert "s3://lab/runs/away: the store cannot be reached, tried for" in told
    assert "hunter2" not in told
