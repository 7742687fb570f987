"""Token ids of a split, made once: flat arrays on disk that every later process maps.

    FOLDER/KEY/       KEY is a hash of everything that the ids depend on
      ids.bin         int32, all ids, one text behind the other
      offsets.bin     int64, where each text begins, and where the last ends
      tokens.json     rows, texts a row, checksum; its time is that of the last use
    FOLDER/.lock-D    held while an entry whose key begins with D is opened or made

An entry is written aside and renamed, under a lock: of several processes one tokenizes, the others
wait and map what it made. A damaged entry is made again. `PromptGroup`s are as if every text were
tokenized on the spot.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from amenable.artifacts import atomic_dir, read_json, storage_errors, write_json
from amenable.data import render
from amenable.data.collate import PromptGroup
from amenable.data.row_file import BLOCK_BYTES, RowFile
from amenable.data.schemas import Demonstration, Message, Preference, Prompt, Speaker
from amenable.errors import DataError, StorageError

if TYPE_CHECKING:
    from amenable.data.render import Renderer

T = TypeVar("T", bound=Demonstration | Preference)
Say = Callable[[str], None]
Texts = tuple[str, ...]

FORMAT = 1
"""Of the files of an entry; a change makes every entry anew."""

MAX_BYTES = 20 * 10**9
"""Size of all entries together; when a new one brings them above it, those used longest ago go."""

_DAY_S = 24 * 3600.0
MAX_UNUSED_S = 90 * _DAY_S
"""Entries that nothing has used for this long go when a new one is made."""

MIN_ROWS = 2000
"""Fewer rows are tokenized in memory, in about a second, and leave no entry."""

QUIET_WAIT_S = 3.0
"""How long a process waits for another's tokens before it says so."""

_ROWS_AT_ONCE = 256
_PROBE = Prompt(messages=(Message(Speaker.USER, "Probe: 1 é 你"),), id="probe", group="probe")


class TokenGroups(Sequence[PromptGroup]):
    """The prompt groups of n rows, each with the same number of completions.

    Args:
        ids: all token ids, int32, prompts and completions in turn.
        offsets: [n · texts + 1] where each text begins in `ids`.
        texts: prompt and completions of a row: 2 or 3.
    """

    def __init__(
        self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], texts: int
    ) -> None:
        self._ids, self._offsets, self._texts = ids, offsets, texts

    def __len__(self) -> int:
        return (len(self._offsets) - 1) // self._texts

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each row, its prompt counted once."""
        return np.diff(self._offsets[:: self._texts])

    @overload
    def __getitem__(self, index: int) -> PromptGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptGroup]: ...
    def __getitem__(self, index: int | slice) -> PromptGroup | list[PromptGroup]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        ends = self._offsets[row * self._texts : (row + 1) * self._texts + 1].tolist()
        ids = self._ids[ends[0] : ends[-1]].tolist()
        prompt, *completions = (
            ids[start - ends[0] : end - ends[0]] for start, end in pairwise(ends)
        )
        return PromptGroup(prompt, completions)


@dataclass(frozen=True)
class TokenCache:
    """Gives the token ids of a split, from memory, from the disk, or made now.

    Args:
        folder: where entries lie; shared by runs and processes.
        renderer: of the run.
        say: takes one line of progress.
    """

    folder: Path
    renderer: Renderer
    say: Say
    _opened: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)

    def demonstrations(self, rows: RowFile[Demonstration]) -> TokenGroups:
        """One group a demonstration, with its output as the completion.

        Raises:
            DataError: the template refuses a prompt, or alone does not fit.
        """
        return self._groups("demonstrations", rows, lambda row: (row.output_text,), 2)

    def preferences(self, rows: RowFile[Preference]) -> TokenGroups:
        """One group a pair, the chosen candidate first.

        Raises:
            DataError: the template refuses a prompt, or alone does not fit.
        """
        return self._groups("preferences", rows, lambda row: (row.chosen, row.rejected), 3)

    def _groups(
        self, kind: str, rows: RowFile[T], texts_of: Callable[[T], Texts], texts: int
    ) -> TokenGroups:
        made = self._tokenized(rows, texts_of)
        if len(rows) < MIN_ROWS:
            return _in_memory(made, texts)
        entry = self.folder / self._key(kind, rows)
        try:
            with _locked(entry, self.say):
                self._opened.add(entry)
                found = self._open(entry, len(rows), texts)
                if found is None:
                    self.say(f"tokenizing {len(rows):,} {kind} (once: the ids are kept)")
                    _write(entry, made, len(rows), texts)
                    found = _mapped(entry, len(rows), texts)
                    with suppress(OSError):
                        evict(self.folder, keep=self._opened)
                with suppress(OSError):
                    os.utime(entry / "tokens.json")
        except StorageError as error:
            self.say(f"{error} The token ids are kept in memory for this stage.")
            return _in_memory(self._tokenized(rows, texts_of), texts)
        return found

    def _open(self, entry: Path, rows: int, texts: int) -> TokenGroups | None:
        if not entry.exists():
            return None
        try:
            return _mapped(entry, rows, texts)
        except (DataError, OSError, KeyError, TypeError, ValueError) as error:
            self.say(f"{entry} is damaged ({error}); its tokens are made again")
            return None

    def _key(self, kind: str, rows: RowFile[Any]) -> str:
        """32 hexadecimal digits of everything that the ids depend on."""
        renderer, tokenizer = self.renderer, self.renderer.tokenizer
        parts = {
            "format": FORMAT,
            "kind": kind,
            "rows": rows.digest(),
            "tokenizer": _content(tokenizer),
            "chat_template": str(tokenizer.chat_template),
            "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id],
            "settings": [
                renderer.instruction,
                renderer.system_message,
                renderer.max_prompt_tokens,
                renderer.max_completion_tokens,
                renderer.chat_template,
            ],
            "code": [Path(file).read_text("utf-8") for file in (render.__file__, __file__)],
            "versions": [version("transformers"), version("tokenizers")],
            # Whatever else: a template may tell the date, and some refuse a prompt of one turn.
            "probe": [self._prompt_or_refusal(_PROBE), self._prompt_or_refusal(rows[0].prompt)],
            "probe_completion": renderer.completion_ids(_PROBE.text),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _prompt_or_refusal(self, prompt: Prompt) -> list[int] | str:
        """Ids of a prompt, or why there are none; that a row has none is told when it is made."""
        try:
            return self.renderer.prompt_ids(prompt)
        except DataError as error:
            return str(error)

    def _tokenized(
        self, rows: RowFile[T], texts_of: Callable[[T], Texts]
    ) -> Iterator[list[list[int]]]:
        """Of each row the ids of its prompt and of each completion; some rows in one call."""
        renderer = self.renderer
        end, longest = int(renderer.tokenizer.eos_token_id), renderer.max_completion_tokens
        rest = iter(rows)
        while part := list(islice(rest, _ROWS_AT_ONCE)):
            whole = renderer.encode_prompts([renderer.prompt_text(row.prompt) for row in part])
            texts = [renderer.completion_source(text) for row in part for text in texts_of(row)]
            encoded = iter(renderer.encode_all(texts))
            for row, prompt in zip(part, whole, strict=True):
                own = islice(encoded, len(texts) // len(part))
                kept = [[*ids, end][:longest] for ids in own]
                yield [renderer.fit_prompt(row.prompt, prompt), *kept]


def evict(folder: Path, *, keep: Collection[Path]) -> None:
    """Removes entries unused for long, then those used longest ago, until the rest is small enough.

    A process that has mapped an entry keeps what it has mapped.

    Args:
        folder: of the cache.
        keep: entries that stay whatever they weigh: those that the caller has opened.

    Raises:
        OSError: the folder cannot be read.
    """
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it meanwhile
            if path.name.startswith("."):
                _remove_left_over(path)
            else:
                entries.append(((path / "tokens.json").stat().st_mtime, _size(path), path))
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if path not in keep and (total > MAX_BYTES or time.time() - used > MAX_UNUSED_S):
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def _remove_left_over(path: Path) -> None:
    """Removes what a killed process was writing: nothing has been added to it for a day."""
    if not path.is_dir():
        return
    written = max((f.stat().st_mtime for f in path.iterdir()), default=path.stat().st_mtime)
    if time.time() - written > _DAY_S:
        shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _in_memory(made: Iterator[list[list[int]]], texts: int) -> TokenGroups:
    ids, offsets = array("i"), array("q", [0])
    for row in made:
        for text in row:
            ids.extend(text)
            offsets.append(len(ids))
    return TokenGroups(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64), texts)


def _write(entry: Path, made: Iterator[list[list[int]]], rows: int, texts: int) -> None:
    """Writes an entry, whole or not at all; a few rows are in memory at a time."""
    offsets, checksum = array("q", [0]), 0
    with atomic_dir(entry) as folder:
        with (folder / "ids.bin").open("wb") as file:
            for row in made:
                for text in row:
                    offsets.append(offsets[-1] + len(text))
                    data = array("i", text).tobytes()
                    checksum = zlib.crc32(data, checksum)
                    file.write(data)
        (folder / "offsets.bin").write_bytes(offsets.tobytes())
        facts = {"rows": rows, "texts": texts, "checksum": zlib.crc32(offsets.tobytes(), checksum)}
        write_json(folder / "tokens.json", facts)


def _mapped(entry: Path, rows: int, texts: int) -> TokenGroups:
    """The entry's arrays, read when they are used.

    Raises:
        DataError, OSError, KeyError, TypeError, ValueError: it is damaged.
    """
    facts = read_json(entry / "tokens.json")
    if (facts["rows"], facts["texts"]) != (rows, texts):
        raise DataError(f"it has {facts['rows']} rows of {facts['texts']} texts")
    checksum = _checksum(entry / "offsets.bin", _checksum(entry / "ids.bin"))
    if checksum != facts["checksum"]:
        raise DataError("its checksum differs")
    offsets = np.memmap(entry / "offsets.bin", np.int64, mode="r")
    ids = np.memmap(entry / "ids.bin", np.int32, mode="r")
    return TokenGroups(ids, offsets, texts)


def _checksum(path: Path, before: int = 0) -> int:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            before = zlib.crc32(block, before)
    return before


def _content(tokenizer: Any) -> str:
    """Everything that a tokenizer knows, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())} {tokenizer.init_kwargs}"


@contextmanager
def _locked(entry: Path, say: Say) -> Iterator[None]:
    """Holds the entry's lock: one process writes, the others wait and find it done.

    Sixteen locks serve all entries, and are never removed: a lock file that is removed while a
    process waits for it would let two in.
    """
    path = entry.with_name(f".lock-{entry.name[0]}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=QUIET_WAIT_S)
        except Timeout:
            say(f"waiting for another process that is tokenizing rows (it holds {path})")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
