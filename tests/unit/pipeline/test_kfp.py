"""A recipe as a Kubeflow pipeline: the compiled file, and whole runs without Docker.

Needs kfp, which pins other versions of what the environment has: `make test-kfp`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kfp", reason="kfp is tested in an environment of its own: make test-kfp")

import yaml

from amenable.artifacts import RunFolder, read_json
from amenable.cli import main as cli
from amenable.errors import StorageError, UsageError
from amenable.pipeline import kfp
from amenable.pipeline.lock import run_lock

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
GOLDEN = HERE / "kfp_golden.yaml"
SHORT = """
name = "short"
model.base = "tiny"
data.demonstrations = "rows.jsonl"
data.token_checks = false
sft.enabled = false
reward.enabled = false
policy.enabled = false
evaluate.enabled = false
kfp.memory = "4G"
"""


def compiled(path: Path) -> list[Any]:
    """The documents of a compiled pipeline, without the version of kfp."""
    text = re.sub(r"^sdkVersion: .*$", "", path.read_text(encoding="utf-8"), flags=re.M)
    return list(yaml.safe_load_all(text))


def run_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["amenable", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_compiled_pipeline_equals_the_golden_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.yaml"
    recipe = str(HERE / "kfp_golden.toml")
    assert run_here(monkeypatch, "kfp", "compile", recipe, str(out)) == 0
    assert compiled(out) == compiled(GOLDEN)


def test_golden_pipeline_is_what_the_recipe_asks_for() -> None:
    """Read by hand: one component a stage that is on, in a chain; resources where models are."""
    pipeline, platform = compiled(GOLDEN)
    tasks = pipeline["root"]["dag"]["tasks"]
    assert pipeline["pipelineInfo"]["name"] == "golden-1"
    assert set(tasks) == {"prepare", "data", "reward", "policy", "report"}
    assert tasks["prepare"]["cachingOptions"] == {}
    for name, before in [("reward", "data"), ("policy", "reward"), ("report", "policy")]:
        inputs = tasks[name]["inputs"]["parameters"]
        assert inputs["key"]["taskOutputParameter"] == {
            "outputParameterKey": name,
            "producerTask": "prepare",
        }
        assert inputs["upstream"]["taskOutputParameter"]["producerTask"] == before
        assert tasks[name]["cachingOptions"] == {"enableCache": True}
    executors = pipeline["deploymentSpec"]["executors"]
    for name in tasks:
        container = executors[f"exec-{name}"]["container"]
        assert container["image"] == "registry.example/amenable:1"
        assert "pip install" not in str(container["command"])
        resources = container.get("resources", {})
        assert ("accelerator" in resources) == (name in ("reward", "policy"))
        assert tasks[name]["retryPolicy"]["maxRetryCount"] == 1
        mounts = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert mounts[f"exec-{name}"]["pvcMount"][0]["mountPath"] == "/runs"
    assert executors["exec-policy"]["container"]["resources"]["resourceMemoryLimit"] == "16Gi"


def test_compiling_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom amenable.cli.main import main\n"
        f"sys.argv = ['amenable', 'kfp', 'compile', {str(HERE / 'kfp_golden.toml')!r}, 'a.yaml']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_faults_of_compiling(tmp_path: Path) -> None:
    text, recipe = kfp.load(HERE / "kfp_golden.toml", [])
    with pytest.raises(UsageError, match=r"a compiled pipeline is a \.yaml file"):
        kfp.compile_to(text, recipe, tmp_path / "out.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        kfp.compile_to(text, recipe, tmp_path / "file" / "out.yaml")


def test_a_run_on_a_store_is_for_amenable_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(HERE / "kfp_golden.toml")
    assert run_here(monkeypatch, "kfp", "run", recipe, "--out", "s3://lab/run") == 2
    assert "the tasks exchange paths; name a folder" in capsys.readouterr().err


def test_settings_are_written_into_the_text() -> None:
    text, _ = kfp.load(HERE / "kfp_golden.toml", ["policy.updates=7"])
    assert "updates = 7\n" in text


# Runs -----------------------------------------------------------------------------------------


def environment(package: Path = ROOT / "src") -> dict[str, str]:
    path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path}


class Runs:
    """`amenable kfp run` of a short recipe, in a folder of its own, with a copy of the package."""

    def __init__(self, root: Path) -> None:
        self.root, self.package = root, root / "package" / "amenable"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src" / "amenable", self.package, ignore=ignored)
        (root / "short.toml").write_text(SHORT)
        rows = (ROOT / "examples" / "tiny.jsonl").read_text().splitlines(keepends=True)
        (root / "rows.jsonl").write_text("".join(rows[:40]))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "amenable", "kfp", "run", "short.toml", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.root,
            env=environment(self.package.parent),
        )

    def done(self, *words: str) -> str:
        """What a run that ends well has said."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """After a first run."""
    made = Runs(tmp_path_factory.mktemp("kfp"))
    done = made.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "report: runs/short/report.html\n"
    assert [line for line in done.stderr.splitlines() if "done in" in line] != []
    assert "KFP" not in done.stderr  # none of the executor's own lines
    assert "Warning" not in done.stderr
    return made


def outcomes(said: str) -> dict[str, str]:
    """Task -> `cached` or how it was done."""
    found = re.findall(r"^([\w-]+): (cached|task took|unchanged, skipped)", said, flags=re.M)
    return dict(found[::-1])


def test_stages_ran_and_left_a_run_folder(runs: Runs) -> None:
    summary = read_json(runs.root / "runs" / "short" / "summary.json")
    assert summary["stages"]["data"]["status"] == "done"
    assert summary["stages"]["policy"]["status"] == "off"
    (page,) = (runs.root / "runs" / "short" / "kfp").glob("short-*/report/report")
    assert page.read_text().startswith("<!")


def test_second_run_is_cached(runs: Runs) -> None:
    assert outcomes(runs.done()) == {
        "prepare": "task took",
        "data": "cached",
        "report": "cached",
    }


def test_edit_of_the_package_runs_the_stages_again(runs: Runs) -> None:
    runs.done()
    with (runs.package / "data" / "splits.py").open("a") as file:
        file.write("\n# edited\n")
    said = runs.done()
    assert "data: runs again (changed: amenable)" in said
    assert "cached" not in outcomes(said).values()


def test_without_caching_the_command_line_skips(runs: Runs) -> None:
    runs.done()
    said = runs.done("--set", "kfp.caching=false")
    assert "data: unchanged, skipped" in said
    assert "cached" not in said


def test_failing_stage_ends_with_its_line_and_exit_code(runs: Runs) -> None:
    rows = runs.root / "broken.jsonl"
    rows.write_text('{"input_text": "a", "output_text": "b"}\n{"input_text": "c"}\n')
    done = runs.run("--set", "data.demonstrations=broken.jsonl", "--out", "runs/broken")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("amenable: broken.jsonl:2: field 'output_text'")
    assert done.stderr.splitlines()[-1].endswith("(task data)")


@pytest.mark.timeout(300)
def test_sigterm_ends_the_stage_with_a_checkpoint(runs: Runs) -> None:
    """To the command alone: it goes on to the training process, and nothing runs on."""
    out = runs.root / "runs" / "stopped"
    long = ("sft.enabled=true", "sft.epochs=10000", "kfp.retries=1")
    words = ["--out", str(out), *(f"--set={setting}" for setting in long)]
    with subprocess.Popen(
        [sys.executable, "-m", "amenable", "kfp", "run", "short.toml", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=runs.root,
        env=environment(runs.package.parent),
    ) as process:
        metrics = out / "stages" / "sft" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.splitlines()[-1].startswith("amenable: stopped in sft by SIGTERM; "), said
    assert said.count("SIGTERM: stops at the next safe point") == 1, said
    assert list((out / "stages" / "sft" / "checkpoints").iterdir()) != []
    with run_lock(RunFolder(out).lock_path):
        pass  # nobody holds it


def test_wrong_parameter_ends_before_any_task(runs: Runs) -> None:
    done = runs.run("--set", "sft.epoch=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sft.epoch: unknown key; did you mean sft.epochs?" in done.stderr


def test_killed_task_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs) -> None:
    """A task that says nothing: the package does not even import."""
    broken = Runs(tmp_path)
    path = broken.package / "pipeline" / "local.py"
    path.write_text(path.read_text().replace("def select(", "def select_(", 1))
    done = broken.run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("amenable: ")
