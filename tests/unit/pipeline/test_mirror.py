from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from amenable.errors import StageError, StorageError, UsageError
from amenable.pipeline.lease import Lease
from amenable.pipeline.mirror import (
    MODEL_FILES,
    Mirror,
    local_copy,
    mirrored,
    output_folder,
    place,
    working_folder,
)

from .stores import PowerCut, clear, memory_store

Tree = dict[str, str]
URL = "memory://runs/x"
OLD: Tree = {
    "recipe.toml": "name",
    "stages/policy/metrics.jsonl": "1",
    "stages/policy/checkpoints/step-1/numbers.json": "at 1",
    "stages/policy/checkpoints/step-1/policy.safetensors": "weights 1",
    "stages/policy/state.json": "running",
}
NEW: Tree = {
    "recipe.toml": "name",
    "stages/policy/metrics.jsonl": "1 2",
    "stages/policy/checkpoints/step-2/numbers.json": "at 2",
    "stages/policy/checkpoints/step-2/policy.safetensors": "weights 2",
    "stages/policy/state.json": "done",
    "models/tuned/model.safetensors": "tuned",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    clear("runs")
    monkeypatch.setenv("AMENABLE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    clear("runs")


def write(root: Path, tree: Mapping[str, str]) -> None:
    """Make the folder hold exactly this."""
    for path in root.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            path.unlink()
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def read(root: Path) -> Tree:
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(root).as_posix(): path.read_text() for path in files}


def fresh(root: Path, *, at: int | None = None) -> Mirror:
    """A machine whose working folder is `root`; whoever wrote before is dead."""
    memory_store("runs/x").delete(".lease.json")
    mirror = Mirror(memory_store("runs/x", at), root, lambda line: None)
    mirror.open()
    return mirror


def there() -> Tree:
    """What the store holds, under its own names."""
    store = memory_store("runs/x")
    found = {path: store.read(path) for path in store.sizes()}
    return {path: (text or b"").decode() for path, text in found.items() if path[0] != "."}


def test_what_is_published_arrives_on_another_machine(tmp_path: Path) -> None:
    first = fresh(tmp_path / "a")
    write(first.root, OLD)
    first.publish()
    write(first.root, NEW)
    first.publish()
    first.close()
    assert there() == NEW
    second = fresh(tmp_path / "b")
    assert read(second.root) == NEW
    second.close()


def test_names_that_begin_with_a_dot_stay(tmp_path: Path) -> None:
    mirror = fresh(tmp_path / "a")
    write(mirror.root, {"models/.sft.partial/half": "x", ".hashes.json": "{}", "recipe.toml": "r"})
    mirror.publish()
    mirror.close()
    assert there() == {"recipe.toml": "r"}


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    mirror = fresh(tmp_path / "a", at=None)
    write(mirror.root, OLD)
    mirror.publish()
    steps = mirror._store._system.steps
    mirror.publish()
    assert mirror._store._system.steps == steps
    mirror.close()


def steps_of_a_publication(root: Path) -> int:
    mirror = fresh(root)
    write(mirror.root, OLD)
    mirror.publish()
    before: int = mirror._store._system.steps
    write(mirror.root, NEW)
    mirror.publish()
    mirror.close()
    return int(mirror._store._system.steps - before)


def test_the_store_is_whole_wherever_the_power_is_cut(tmp_path: Path) -> None:
    """Each step of a publication in turn is the last: another machine gets the old or the new."""
    steps = steps_of_a_publication(tmp_path / "count")
    assert steps > 15
    seen = set()
    for step in range(1, steps + 1):
        clear("runs")
        mirror = fresh(tmp_path / f"{step}")
        write(mirror.root, OLD)
        mirror.publish()
        cut = mirror._store._system
        cut.at = cut.steps + step
        write(mirror.root, NEW)
        died = False
        try:
            mirror.publish()
        except StorageError:  # the last step of all gives the lease back
            died = True
        mirror.close()
        other = fresh(tmp_path / f"other-{step}")
        found = read(other.root)
        assert found in (OLD, NEW), f"half after step {step}"
        seen.add(died and found == OLD)
        write(other.root, NEW)
        other.publish()
        other.close()
        assert there() == NEW, f"after step {step}"
        assert memory_store("runs/x").sizes(".mirror") == {}
    assert seen == {True, False}


@pytest.mark.parametrize("late", [False, True])
def test_the_same_machine_goes_on_wherever_the_power_was_cut(tmp_path: Path, late: bool) -> None:
    """What was not published yet is not lost where it was made."""
    for step in range(1, steps_of_a_publication(tmp_path / "count")):
        clear("runs")
        mirror = fresh(tmp_path / f"{step}")
        write(mirror.root, OLD)
        mirror.publish()
        cut = mirror._store._system
        cut.at, cut.late = cut.steps + step, late
        write(mirror.root, NEW)
        with pytest.raises(StorageError):
            mirror.publish()
        mirror.close()
        again = fresh(tmp_path / f"{step}")
        assert read(again.root) == NEW
        again.publish()
        again.close()
        assert there() == NEW


def test_the_first_publication_cut_short_leaves_no_run(tmp_path: Path) -> None:
    mirror = fresh(tmp_path / "a")
    mirror._store._system.at = mirror._store._system.steps + 4
    write(mirror.root, OLD)
    with pytest.raises(StorageError):
        mirror.publish()
    mirror.close()
    with pytest.raises(UsageError, match="there is no run folder"):
        local_copy(URL)
    other = fresh(tmp_path / "b")
    assert read(other.root) == {}
    other.close()


def test_after_the_store_was_given_up_nothing_is_tried_again(tmp_path: Path) -> None:
    mirror = fresh(tmp_path / "a", at=None)
    cut = mirror._store._system
    cut.at = cut.steps + 1
    write(mirror.root, OLD)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"cannot be reached.* whole in .*/a; the same"):
            mirror.publish()
    assert cut.steps == cut.at
    mirror.close()


def test_a_working_folder_that_others_have_overtaken_becomes_theirs(tmp_path: Path) -> None:
    first = fresh(tmp_path / "a")
    write(first.root, OLD)
    first.publish()
    write(first.root, {**OLD, "stages/policy/metrics.jsonl": "never published"})
    first._lease.abandon()
    second = fresh(tmp_path / "b")
    write(second.root, NEW)
    second.publish()
    with pytest.raises(StageError, match="has taken this run folder over"):
        first.publish()
    second.close()
    third = fresh(tmp_path / "a")
    assert read(third.root) == NEW
    third.close()


@pytest.mark.parametrize("gone", [False, True])
def test_a_writer_that_was_taken_over_replaces_no_file(tmp_path: Path, gone: bool) -> None:
    """Also not a new one, which goes under its own name before any index."""
    path = "stages/policy/checkpoints/step-000005/policy.safetensors"
    first = fresh(tmp_path / "a")
    write(first.root, OLD)
    first.publish()
    first._lease.abandon()
    second = fresh(tmp_path / "b")
    write(second.root, {**OLD, path: "of the second"})
    second.publish()
    if gone:
        second.close()
    write(first.root, {**OLD, path: "of the first"})
    told = "has written to this" if gone else "has taken this run folder over"
    with pytest.raises(StageError, match=f"{told}.* goes on from what the other leaves"):
        first.publish()
    first.close()
    second.close()
    assert (local_copy(URL) / path).read_text() == "of the second"


def test_an_index_that_another_has_replaced_is_not_replaced(tmp_path: Path) -> None:
    """As by two that have taken over one stale lease."""
    first = fresh(tmp_path / "a")
    write(first.root, OLD)
    first.publish()
    index = json.dumps({"revision": "of another", "files": {}, "leftover": []}).encode()
    store = memory_store("runs/x")
    store.write(".mirror.json", index)
    write(first.root, NEW)
    with pytest.raises(StageError, match="another process has written to this run folder"):
        first.publish()
    assert store.read(".mirror.json") == index
    first.close()


def test_a_working_folder_stays_ahead_through_two_kills(tmp_path: Path) -> None:
    """The first after the index was replaced, before that was noted; the second before the next."""
    mirror = fresh(tmp_path / "a")
    write(mirror.root, OLD)
    mirror.publish()
    mirror.close()
    memory = json.loads((mirror.root / ".mirrored.json").read_text())
    noted = {**memory, "revision": "older", "next": memory["revision"]}
    (mirror.root / ".mirrored.json").write_text(json.dumps(noted))
    again = fresh(tmp_path / "a")
    write(again.root, NEW)
    again._memory.next = "never given"
    again._memory.save()
    again.close()
    third = fresh(tmp_path / "a")
    assert read(third.root) == NEW
    third.close()


def test_a_folder_whose_files_are_gone_is_gone(tmp_path: Path) -> None:
    """Stages take `models/sft` for the model."""
    first = fresh(tmp_path / "a")
    write(first.root, NEW)
    first.publish()
    first.close()
    second = fresh(tmp_path / "b")
    write(second.root, OLD)
    second.publish()
    second.close()
    (first.root / ".own").mkdir()
    third = fresh(tmp_path / "a")
    assert read(third.root) == OLD
    assert not (third.root / "models").exists()
    assert (third.root / ".own").exists()
    third.close()


def test_a_damaged_file_is_not_taken_and_of_a_checkpoint_none(tmp_path: Path) -> None:
    mirror = fresh(tmp_path / "a")
    write(mirror.root, OLD)
    mirror.publish()
    mirror.close()
    store = memory_store("runs/x")
    store.write("stages/policy/checkpoints/step-1/policy.safetensors", b"weights ?")
    store.delete("stages/policy/metrics.jsonl")
    said: list[str] = []
    store.delete(".lease.json")
    other = Mirror(store, tmp_path / "b", said.append)
    other.open()
    assert read(other.root) == {
        "recipe.toml": "name",
        "stages/policy/state.json": "running",
    }
    assert "missing or altered there: stages/policy/checkpoints/step-1/policy" in said[0]
    other.close()


def test_an_emptied_store_is_not_filled_again_by_itself(tmp_path: Path) -> None:
    mirror = fresh(tmp_path / "a")
    write(mirror.root, OLD)
    mirror.publish()
    mirror.close()
    clear("runs")
    with pytest.raises(UsageError, match=r"holds nothing, but .*/a was mirrored there; remove"):
        fresh(tmp_path / "a")
    assert read(tmp_path / "a") == OLD
    for path, text in OLD.items():  # the remedy that the message names
        memory_store("runs/x").write(path, text.encode())
    again = fresh(tmp_path / "a")
    assert read(again.root) == OLD
    again.close()


def test_a_run_folder_copied_there_by_other_means_is_taken_up(tmp_path: Path) -> None:
    store = memory_store("runs/x")
    for path, text in OLD.items():
        store.write(path, text.encode())
    mirror = fresh(tmp_path / "a")
    assert read(mirror.root) == OLD
    steps = mirror._store._system.steps
    mirror.publish()
    assert mirror._store._system.steps == steps
    mirror.close()


def test_what_is_no_run_folder_is_left_alone(tmp_path: Path) -> None:
    memory_store("runs/x").write("data/rows.jsonl", b"{}")
    mirror = fresh(tmp_path / "a")
    write(mirror.root, OLD)
    mirror.publish()
    mirror.close()
    assert there() == {**OLD, "data/rows.jsonl": "{}"}


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    entry = {"size": 1, "sha256": "", "at": ""}
    index = {"revision": "1", "files": {"../outside": entry}, "leftover": []}
    memory_store("runs/x").write(".mirror.json", json.dumps(index).encode())
    with pytest.raises(StorageError, match=r"no index of a run folder \(\.\./outside leads out"):
        fresh(tmp_path / "a")


def test_a_reader_fetches_what_it_wants_and_only_what_differs(tmp_path: Path) -> None:
    with mirrored(URL, print) as mirror:
        write(mirror.root, NEW)
    copy = local_copy(URL, MODEL_FILES)
    assert read(copy) == {
        key: NEW[key] for key in ("recipe.toml", "models/tuned/model.safetensors")
    }
    before = (copy / "recipe.toml").stat().st_mtime_ns
    assert local_copy(URL, MODEL_FILES) == copy
    assert (copy / "recipe.toml").stat().st_mtime_ns == before
    with mirrored(URL, print) as mirror:
        write(mirror.root, OLD)
    assert read(local_copy(URL, MODEL_FILES)) == {"recipe.toml": "name"}


def test_a_model_folder_may_stand_for_a_run() -> None:
    store = memory_store("runs/x")
    store.write("config.json", b"{}")
    store.write("model.safetensors", b"w")
    assert read(local_copy(URL, MODEL_FILES, or_model=True)) == {
        "config.json": "{}",
        "model.safetensors": "w",
    }
    with pytest.raises(UsageError, match=r"memory://runs/x: there is no run folder"):
        local_copy(URL, MODEL_FILES)


def test_a_page_is_put_back_beside_what_was_not_fetched() -> None:
    with mirrored(URL, print) as mirror:
        write(mirror.root, NEW)
    with mirrored(URL, print, ("*.toml", "*.html")) as mirror:
        assert read(mirror.root) == {"recipe.toml": "name"}
        (mirror.root / "report.html").write_text("page")
    assert there() == {**NEW, "report.html": "page"}


def test_an_error_inside_publishes_nothing_and_gives_the_lease_back() -> None:
    def fail() -> None:
        with mirrored(URL, print) as mirror:
            write(mirror.root, OLD)
            raise PowerCut

    with pytest.raises(PowerCut):
        fail()
    assert there() == {}
    Lease(memory_store("runs/x")).acquire()


def test_one_writer_on_one_machine() -> None:
    held = pytest.raises(StageError, match="is writing this run folder")
    with mirrored(URL, print), held, mirrored(URL, print):
        pass


def test_places(tmp_path: Path) -> None:
    assert place("s3://bucket/x") == "s3://bucket/x"
    assert place("file:///tmp/x") == Path("/tmp/x")
    assert place(tmp_path) == tmp_path
    assert working_folder("s3://bucket/x/") == working_folder("s3://bucket/x")
    assert working_folder("s3://bucket/x") != working_folder("s3://other/x")
    assert working_folder("s3://bucket/x").name == "x"
    with output_folder(tmp_path / "out", print) as (folder, publish):
        publish()
        assert folder == tmp_path / "out"
