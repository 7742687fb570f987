from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from amenable.config.data import DataConfig, PromptSource
from amenable.config.recipe import Recipe
from amenable.errors import ModelError
from amenable.pipeline import fingerprint as fp
from amenable.pipeline import preflight
from amenable.pipeline.fingerprint import FileHashes, code_hash, differences, ready_reward
from amenable.pipeline.memory import peak_gb, start_peak
from amenable.pipeline.summary import split_result

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_digest_is_sha256_and_follows_the_content(tmp_path: Path) -> None:
    path, hashes = tmp_path / "a", FileHashes(tmp_path / "memory")
    path.write_text("abc")
    assert hashes.digest(path) == ABC
    path.write_text("abd")
    assert hashes.digest(path) != ABC


def test_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashes = tmp_path / "a", FileHashes(tmp_path / "memory")
    path.write_text("abc")
    time.sleep(0.12)
    hashes.digest(path)
    hashes.save()
    again = FileHashes(tmp_path / "memory")
    monkeypatch.setattr(fp.hashlib, "file_digest", None)
    assert again.digest(path) == ABC


def test_change_of_equal_size_and_time_is_seen(tmp_path: Path) -> None:
    path, hashes = tmp_path / "a", FileHashes(tmp_path / "memory")
    path.write_text("abc")
    os.utime(path, (1, 1))
    time.sleep(0.12)
    hashes.digest(path)
    path.write_text("abd")
    os.utime(path, (1, 1))
    assert hashes.digest(path) != ABC


def test_broken_memory_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("[1")
    (tmp_path / "a").write_text("abc")
    assert FileHashes(tmp_path / "memory").digest(tmp_path / "a") == ABC


def test_differences_name_changed_new_and_lost_ones() -> None:
    assert differences({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}) == [
        "b",
        "d",
        "c",
    ]


def test_report_code_counts_for_the_report_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/ppo.py", "cli/main.py", "evaluate/report.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(fp, "_PACKAGE", tmp_path)

    def hashes() -> tuple[str, str]:
        code_hash.cache_clear()
        return code_hash(with_report=False), code_hash(with_report=True)

    first = hashes()
    (tmp_path / "cli/main.py").write_text("2")
    assert hashes() == first
    (tmp_path / "evaluate/report.py").write_text("2")
    second = hashes()
    assert (second[0] == first[0], second[1] == first[1]) == (True, False)
    (tmp_path / "train/ppo.py").write_text("2")
    assert hashes()[0] != first[0]
    code_hash.cache_clear()


def test_ready_reward_is_a_folder_a_source_file_or_a_name(tmp_path: Path) -> None:
    assert ready_reward(str(tmp_path)) == tmp_path
    assert ready_reward("amenable.errors:DataError") == Path(fp.amenable.__file__).with_name(
        "errors.py"
    )
    assert ready_reward("no.such.module:f") == "no.such.module:f"
    assert ready_reward("some/hub-id") == "some/hub-id"


@pytest.mark.parametrize("reward", ["./nowhere", "/nowhere/at/all"])
def test_reward_folder_that_is_none_is_refused(reward: str) -> None:
    with pytest.raises(ModelError, match="no reward-model folder"):
        preflight._check_ready_reward(reward)


def test_hub_is_closed_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    preflight.close_hub(Recipe(), "some/hub-id")
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    preflight.close_hub(Recipe(), tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("files", "is_open"),
    [
        (["hub:owner/name:train"], True),
        (["rows.jsonl", "hf://datasets/o/n/rows.jsonl"], True),
        (["rows.jsonl", "hub:.", "https://h/x"], False),
    ],
)
def test_hub_stays_open_for_data_that_is_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], is_open: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for section in (PromptSource(files=tuple(files)), PromptSource()):
        recipe = Recipe(data=DataConfig(prompts=section))
        preflight.close_hub(recipe, tmp_path)
        assert os.environ["HF_HUB_OFFLINE"] == ("0" if is_open and section else "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")


def test_code_of_a_reader_is_its_file_and_what_it_imports_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rd.py").write_text("import json, helper\nfrom . import other\n")
    (tmp_path / "helper.py").write_text("def f():\n    from deeper.x import y\n")
    (tmp_path / "deeper.py").write_text("not Python")
    for name in ("other", "unrelated"):
        (tmp_path / f"{name}.py").write_text("")
    found = dict(fp._code("reader", tmp_path / "rd.py"))
    assert [Path(file).name for file in found.values()] == [
        *("rd.py", "deeper.py", "helper.py", "other.py")
    ]
    assert list(found)[1] == "reader, import of deeper.py"
    monkeypatch.chdir(tmp_path)
    assert fp.source_of_function("rd:pairs") == tmp_path / "rd.py"  # before it can be imported


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_stretch() -> None:
    start_peak()
    before = peak_gb()
    size = 200_000_000
    with mmap.mmap(-1, size) as block:  # not malloc, which may keep what is freed
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
    high = peak_gb()
    assert high >= before + 0.15
    start_peak()
    assert peak_gb() < high


def test_health_rows_are_taken_out_of_a_section() -> None:
    assert split_result({"a": 1, "health": [{"rule": "x"}]}) == ({"a": 1}, [{"rule": "x"}])
    assert split_result([1]) == ([1], [])
