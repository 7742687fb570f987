from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import AutoTokenizer

from amenable.artifacts import atomic_dir, write_jsonl
from amenable.data.collate import PromptGroup
from amenable.data.render import Renderer
from amenable.data.row_file import RowFile, open_demonstrations, open_preferences
from amenable.data.schemas import Demonstration, Preference
from amenable.data.tokens import cache as token_cache
from amenable.data.tokens.cache import TokenCache, TokenGroups
from amenable.errors import DataError

LONG = "many words that do not fit " * 9


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return Renderer(
        tokenizer,
        frozenset({tokenizer.eos_token_id}),
        max_prompt_tokens=40,
        max_completion_tokens=9,
    )


@pytest.fixture
def demonstrations(tmp_path: Path) -> RowFile[Demonstration]:
    rows = [
        {"id": str(n), "group": "g", "input_text": f"Ask {n}? {LONG * (n % 3)}", "output_text": out}
        for n, out in enumerate(["Yes.", LONG, "  blank before", "é 你好", "x"] * 12)
    ]
    write_jsonl(tmp_path / "d.jsonl", rows)
    return open_demonstrations(tmp_path / "d.jsonl")


@pytest.fixture
def preferences(tmp_path: Path) -> RowFile[Preference]:
    choices: list[Any] = [0, 1, "tie"]
    rows = [
        {
            "id": str(n),
            "group": "g",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": f"So {n}"},
            ],
            "candidate_0": f"first {n}",
            "candidate_1": LONG if n % 2 else "second",
            "choice": choices[n % 3],
        }
        for n in range(30)
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    return open_preferences(tmp_path / "p.jsonl")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are made of few rows."""
    monkeypatch.setattr(token_cache, "MIN_ROWS", 10)


@pytest.fixture
def cache(tmp_path: Path, renderer: Renderer) -> TokenCache:
    return TokenCache(tmp_path / "tokens", renderer, said.append)


said: list[str] = []


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    said.clear()


def entries(cache: TokenCache) -> list[Path]:
    return [path for path in cache.folder.glob("*") if not path.name.startswith(".")]


def groups_of(renderer: Renderer, rows: RowFile[Any]) -> list[PromptGroup]:
    """Row by row, without the code under test."""

    def texts(row: Any) -> tuple[str, ...]:
        return (row.output_text,) if isinstance(row, Demonstration) else (row.chosen, row.rejected)

    return [
        PromptGroup(
            renderer.prompt_ids(row.prompt), [renderer.completion_ids(text) for text in texts(row)]
        )
        for row in rows
    ]


def test_few_rows_are_kept_in_memory_and_are_those_of_the_renderer(
    cache: TokenCache,
    renderer: Renderer,
    demonstrations: RowFile[Demonstration],
    preferences: RowFile[Preference],
) -> None:
    made = cache.demonstrations(demonstrations)
    assert list(made) == groups_of(renderer, demonstrations)
    assert list(cache.preferences(preferences)) == groups_of(renderer, preferences)
    assert made.lengths.tolist() == [group.tokens for group in made]
    assert (len(made), made[-1], made[3:5]) == (60, made[59], [made[3], made[4]])
    with pytest.raises(IndexError):
        made[60]
    assert not cache.folder.exists()
    assert said == []


@pytest.mark.usefixtures("small")
def test_many_rows_are_tokenized_once(
    cache: TokenCache,
    renderer: Renderer,
    demonstrations: RowFile[Demonstration],
    preferences: RowFile[Preference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [groups_of(renderer, demonstrations), groups_of(renderer, preferences)]
    made: list[TokenGroups] = [
        cache.demonstrations(demonstrations),
        cache.preferences(preferences),
    ]
    assert [list(groups) for groups in made] == expected
    assert len(entries(cache)) == 2
    assert said[0] == "tokenizing 60 demonstrations (once: the ids are kept)"
    said.clear()
    monkeypatch.setattr(Renderer, "encode_all", lambda *_: pytest.fail("tokenized again"))
    again = [cache.demonstrations(demonstrations), cache.preferences(preferences)]
    assert [list(groups) for groups in again] == expected
    assert again[0].lengths.tolist() == made[0].lengths.tolist()
    assert said == []


@pytest.mark.usefixtures("small")
def test_an_entry_is_of_one_content(
    cache: TokenCache, renderer: Renderer, demonstrations: RowFile[Demonstration]
) -> None:
    cache.demonstrations(demonstrations)
    changes: list[dict[str, Any]] = [
        {"instruction": "Do."},
        {"system_message": "Be."},
        {"max_prompt_tokens": 39},
        {"max_completion_tokens": 8},
        {"chat_template": False},
    ]
    for number, change in enumerate(changes, start=2):
        other = replace(cache, renderer=replace(renderer, **change))
        assert list(other.demonstrations(demonstrations)) == groups_of(
            other.renderer, demonstrations
        )
        assert len(entries(cache)) == number, change
    text = demonstrations.path.read_text("utf-8").replace("Yes.", "Yes!")
    demonstrations.path.write_text(text, "utf-8")
    cache.demonstrations(open_demonstrations(demonstrations.path))
    assert len(entries(cache)) == len(changes) + 2


@pytest.mark.usefixtures("small")
def test_another_tokenizer_makes_another_entry(
    cache: TokenCache, tiny: Path, renderer: Renderer, demonstrations: RowFile[Demonstration]
) -> None:
    cache.demonstrations(demonstrations)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    same = replace(cache, renderer=replace(renderer, tokenizer=tokenizer))
    same.demonstrations(demonstrations)
    assert len(entries(cache)) == 1
    tokenizer.add_tokens(["Ask"])
    same.demonstrations(demonstrations)
    tokenizer.chat_template = "{{ messages[-1]['content'] }} now:"
    found = same.demonstrations(demonstrations)
    assert list(found) == groups_of(same.renderer, demonstrations)
    assert len(entries(cache)) == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", [cut, turn_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", "tokens.json"])
def test_a_damaged_entry_is_made_again_and_told(
    cache: TokenCache,
    renderer: Renderer,
    demonstrations: RowFile[Demonstration],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    cache.demonstrations(demonstrations)
    (entry,) = entries(cache)
    if name == "tokens.json" and damage is not Path.unlink:
        (entry / name).write_text('{"rows": 3}')
    else:
        damage(entry / name)
    said.clear()
    assert list(cache.demonstrations(demonstrations)) == groups_of(renderer, demonstrations)
    assert "is damaged (" in said[0]
    assert said[1].startswith("tokenizing")
    said.clear()
    cache.demonstrations(demonstrations)
    assert said == []


@pytest.mark.usefixtures("small")
def test_a_prompt_that_cannot_be_rendered_leaves_no_entry(
    cache: TokenCache, renderer: Renderer, demonstrations: RowFile[Demonstration]
) -> None:
    tight = replace(cache, renderer=replace(renderer, instruction=LONG, max_prompt_tokens=30))
    with pytest.raises(DataError, match="more than max_prompt_tokens"):
        tight.demonstrations(demonstrations)
    assert entries(cache) == []


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_costs_memory_only(
    tmp_path: Path, renderer: Renderer, demonstrations: RowFile[Demonstration]
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TokenCache(tmp_path / "file" / "tokens", renderer, said.append)
    assert list(cache.demonstrations(demonstrations)) == groups_of(renderer, demonstrations)
    assert said[-1].endswith("The token ids are kept in memory for this stage.")


def open_once(cache: TokenCache, path: Path, results: Any) -> None:
    token_cache.MIN_ROWS = 10
    told: list[str] = []
    groups = replace(cache, say=told.append).demonstrations(open_demonstrations(path))
    results.put((told, [group.tokens for group in groups]))


def test_of_several_processes_one_tokenizes(
    cache: TokenCache, renderer: Renderer, demonstrations: RowFile[Demonstration]
) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    workers = [
        fork.Process(target=open_once, args=(cache, demonstrations.path, results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(len(told) for told, _ in found) == 1
    expected = [group.tokens for group in groups_of(renderer, demonstrations)]
    assert all(lengths == expected for _, lengths in found)


@pytest.mark.usefixtures("small")
def test_what_was_used_longest_ago_goes_first(
    cache: TokenCache,
    renderer: Renderer,
    demonstrations: RowFile[Demonstration],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_length(tokens: int) -> TokenCache:
        return replace(cache, renderer=replace(renderer, max_completion_tokens=tokens))

    for tokens, age_s in ((7, 300.0), (6, 200.0), (5, 100.0)):
        before = set(entries(cache))
        mapped = with_length(tokens).demonstrations(demonstrations)
        (entry,) = set(entries(cache)) - before
        os.utime(entry / "tokens.json", (time.time() - age_s,) * 2)
    assert len(entries(cache)) == 3
    with_length(7).demonstrations(demonstrations)  # used now: 6 is the oldest
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in entries(cache)]
    monkeypatch.setattr(token_cache, "MAX_BYTES", sum(sizes))
    with_length(4).demonstrations(demonstrations)
    assert len(entries(cache)) == 3
    said.clear()
    with_length(7).demonstrations(demonstrations)
    with_length(5).demonstrations(demonstrations)
    assert said == []
    monkeypatch.setattr(token_cache, "MAX_UNUSED_S", -1.0)
    with_length(3).demonstrations(demonstrations)
    assert len(entries(cache)) == 1
    assert mapped[0].completions  # what was mapped before its entry went is still there


REFUSES_ONE_TURN = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


@pytest.mark.usefixtures("small")
def test_a_template_that_refuses_the_probe_but_no_row(
    cache: TokenCache, tiny: Path, renderer: Renderer, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = REFUSES_ONE_TURN
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    rows = [
        {"id": str(n), "group": "g", "messages": turns, "output_text": f"So {n}."}
        for n in range(12)
    ]
    write_jsonl(tmp_path / "s.jsonl", rows)
    ours = replace(cache, renderer=replace(renderer, tokenizer=tokenizer))
    given = open_demonstrations(tmp_path / "s.jsonl")
    assert list(ours.demonstrations(given)) == groups_of(ours.renderer, given)
    assert len(entries(cache)) == 1
    rows[3]["messages"] = turns[1:]
    write_jsonl(tmp_path / "s.jsonl", rows)
    with pytest.raises(DataError, match=r"refuses prompt '3' .*system first"):
        ours.demonstrations(open_demonstrations(tmp_path / "s.jsonl"))


def make_slowly(entry: Path, begun: Any, go_on: Any, results: Any) -> None:
    try:
        with atomic_dir(entry) as folder:
            begun.set()
            go_on.wait(60)
            (folder / "ids.bin").write_bytes(b"1")
        results.put("made")
    except Exception as error:
        results.put(repr(error))


@pytest.mark.usefixtures("small")
def test_what_another_process_has_just_begun_is_left_alone(
    cache: TokenCache, renderer: Renderer, demonstrations: RowFile[Demonstration]
) -> None:
    """It begins with an empty folder; one that a killed process left a day ago goes."""
    (cache.folder / ".dead.partial").mkdir(parents=True)
    os.utime(cache.folder / ".dead.partial", (time.time() - 2 * 24 * 3600,) * 2)
    fork = multiprocessing.get_context("fork")
    begun, go_on, results = fork.Event(), fork.Event(), fork.Queue()
    args = (cache.folder / "other", begun, go_on, results)
    worker = fork.Process(target=make_slowly, args=args)
    worker.start()
    assert begun.wait(60)
    try:
        assert list(cache.demonstrations(demonstrations)) == groups_of(renderer, demonstrations)
        assert not (cache.folder / ".dead.partial").exists()
    finally:
        go_on.set()
        found = results.get(timeout=60)
        worker.join()
    assert found == "made"


@pytest.mark.usefixtures("small")
def test_an_eviction_that_fails_ends_nothing(
    cache: TokenCache,
    renderer: Renderer,
    demonstrations: RowFile[Demonstration],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError("the folder cannot be listed")

    monkeypatch.setattr(token_cache, "evict", fail)
    assert list(cache.demonstrations(demonstrations)) == groups_of(renderer, demonstrations)
    assert len(entries(cache)) == 1


@pytest.mark.usefixtures("small")
def test_entries_that_are_in_use_are_not_evicted(
    cache: TokenCache,
    demonstrations: RowFile[Demonstration],
    preferences: RowFile[Preference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a stage's validation split, made after its training split was opened."""
    cache.demonstrations(demonstrations)
    monkeypatch.setattr(token_cache, "MAX_BYTES", 1)
    cache.preferences(preferences)
    assert len(entries(cache)) == 2
    text = preferences.path.read_text("utf-8").replace("second", "other")
    preferences.path.write_text(text, "utf-8")
    replace(cache).preferences(open_preferences(preferences.path))  # another stage
    assert len(entries(cache)) == 1


def hold(path: Path, held: Any, let_go: Any) -> None:
    with FileLock(path):
        held.set()
        let_go.wait(60)


@pytest.mark.usefixtures("small")
def test_a_process_that_waits_says_so_and_locks_do_not_grow_in_number(
    cache: TokenCache, demonstrations: RowFile[Demonstration], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.demonstrations(demonstrations)
    (lock,) = cache.folder.glob(".*")
    (entry,) = entries(cache)
    assert lock.name == f".lock-{entry.name[0]}"
    fork = multiprocessing.get_context("fork")
    held, let_go = fork.Event(), fork.Event()
    worker = fork.Process(target=hold, args=(lock, held, let_go))
    worker.start()
    assert held.wait(60)

    def say(line: str) -> None:
        said.append(line)
        let_go.set()

    said.clear()
    monkeypatch.setattr(token_cache, "QUIET_WAIT_S", 0.1)
    replace(cache, say=say).demonstrations(demonstrations)
    worker.join()
    assert said == [f"waiting for another process that is tokenizing rows (it holds {lock})"]
