"""A run folder on an object store: a local working folder, mirrored.

    AMENABLE_HOME/runs/HASH/NAME/     the working folder of a URL
        .mirrored.json                what it knows of its store
    AMENABLE_HOME/copies/HASH/NAME/   what other commands have read of the URL

    URL/.mirror.json      the index: which object holds which file, with size and SHA-256
    URL/.mirror/          new versions of files that the index still names
    URL/.lease.json       who writes (lease.py)
    URL/...               the files, under their own names

The index is what counts, and it is replaced at once: before that the store holds the whole old
folder, afterwards the whole new one. A new file is put under its own name; one that replaces
another is put aside, named by the index, copied to its name within the store and named there by a
second index; what no index names is deleted last. Names that begin with a dot stay where they are:
locks, memories of hashes, and what is being written.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amenable.artifacts import RunFolder, do_nothing, read_json, storage_errors, write_json
from amenable.data.reading.remote import is_url
from amenable.errors import AmenableError, StageError, StorageError, UsageError
from amenable.pipeline.fingerprint import FileHashes
from amenable.pipeline.lease import Lease
from amenable.pipeline.lock import run_lock
from amenable.pipeline.store import Store

__all__ = [
    "MODEL_FILES",
    "REPORT_FILES",
    "Mirror",
    "local_copy",
    "mirrored",
    "output_folder",
    "place",
    "working_folder",
]

_INDEX, _ASIDE, _MEMORY = ".mirror.json", ".mirror/", ".mirrored.json"
_HASHES = ".mirrored-hashes.json"
_RECIPE = "recipe.toml"
_LAST = ("state.json", "numbers.json", "manifest.json", "summary.json", "report.html")
"""Files that tell what others are there."""

_READINGS = 5
_KEEP_ALL = ("*",)


@dataclass(frozen=True)
class Entry:
    """One file of the mirrored folder."""

    size: int
    """Bytes."""

    sha256: str
    """Of the content; empty where nobody has read it yet."""

    at: str = ""
    """Path of the object that holds it; empty: the file's own."""


@dataclass(frozen=True)
class Index:
    """What the store holds at one moment."""

    revision: str
    files: Mapping[str, Entry]
    leftover: Sequence[str] = ()
    """Objects that are to be deleted."""

    def dumps(self) -> bytes:
        """As JSON."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode()

    @classmethod
    def loads(cls, content: bytes) -> Index:
        """Of what `dumps` gave."""
        found = json.loads(content)
        files = {_inside(path): Entry(**entry) for path, entry in found["files"].items()}
        return cls(found["revision"], files, tuple(found["leftover"]))


REPORT_FILES = ("*.toml", "*.json", "*.jsonl", "*.html", "*.md")
"""What a report is drawn from: no weights."""

MODEL_FILES = ("recipe.toml", "models/sft/*", "models/tuned/*")
"""What a comparison and a benchmark need of a run."""


def place(out: Path | str) -> Path | str:
    """A folder as the user named it: a URL as text, anything else, also `file://…`, as a path."""
    return str(out) if is_url(str(out)) else Path(str(out).removeprefix("file://"))


def working_folder(url: str, kind: str = "runs") -> Path:
    """The local folder that stands for a URL, in the cache."""
    from amenable.models.pull import cache_home

    url = url.rstrip("/")
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_home() / kind / key / (url.rpartition("/")[2] or "run")


def local_copy(
    where: Path | str,
    wanted: Sequence[str] = _KEEP_ALL,
    *,
    or_model: bool = False,
    store: Store | None = None,
) -> Path:
    """A folder to read: itself or, of a URL, a copy in the cache with what is wanted of it.

    Args:
        where: path or URL of a run folder.
        wanted: patterns of paths in it, `models/tuned/*`; `*` stands for any text.
        or_model: a folder with a config.json will do as well; all of it is wanted.
        store: of the URL, for tests.

    Raises:
        UsageError: there is no such folder on the store.
        StorageError: the store refuses or stays away, or the disk is full.
    """
    found = place(where)
    if isinstance(found, Path):
        return found
    store = store or Store(found)
    copy = working_folder(found, "copies")
    with run_lock(RunFolder(copy).lock_path, "copy"):
        for _ in range(_READINGS):  # a run that goes on may replace what is being read
            index = _read_index(store)
            is_model = or_model and "config.json" in index.files
            if not is_model and _RECIPE not in index.files:
                raise UsageError(
                    f"{store.shown}: there is no run folder (no {_RECIPE}); correct the URL"
                )
            if not _bring(store, index, copy, _KEEP_ALL if is_model else wanted):
                return copy
            if _read_index(store).revision == index.revision:
                break
    raise StorageError(f"{store.shown}: objects are missing or altered; run it again")


@contextmanager
def mirrored(
    url: str,
    say: Callable[[str], None],
    wanted: Sequence[str] = _KEEP_ALL,
    *,
    store: Store | None = None,
) -> Iterator[Mirror]:
    """The working folder of a URL, brought up to date, with the right to write there.

    What the block leaves is published at its end. After an error nothing more is published; the
    working folder stays, and the next use of the URL goes on with it.

    Args:
        url: of the folder on a store.
        say: takes lines for the user.
        wanted: patterns of paths, as of `local_copy`; others are neither fetched nor touched.
        store: of the URL, for tests.

    Raises:
        StageError: another process writes there.
        StorageError: the store refuses or stays away, or the disk is full.
        UsageError: the URL holds nothing, but its working folder was mirrored there.
    """
    root = working_folder(url, "runs" if wanted == _KEEP_ALL else "copies")
    with run_lock(RunFolder(root).lock_path):
        mirror = Mirror(store or Store(url), root, say, wanted)
        mirror.open()
        try:
            yield mirror
            mirror.publish()
        finally:
            mirror.close()


@contextmanager
def output_folder(
    out: Path | str, say: Callable[[str], None], kind: str = "run folder"
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder to write, for one writer: itself or, of a URL, its working folder.

    Args:
        out: as the user named it.
        say: takes lines for the user.
        kind: of folder, for messages.

    Yields:
        The local folder, and what brings the store up to date with it.

    Raises:
        StageError, StorageError, UsageError: as `mirrored`.
    """
    where = place(out)
    if isinstance(where, str):
        with mirrored(where, say) as mirror:
            yield mirror.root, mirror.publish
    else:
        with run_lock(RunFolder(where).lock_path, kind):
            yield where, do_nothing


@dataclass
class _Memory:
    """What a working folder knows of its store."""

    path: Path
    revision: str = ""
    """Of the index that it last took or gave."""
    next: str = ""
    """Of the one that it was about to give."""
    lease: str = ""
    """Token of the lease that it last held."""
    known: tuple[str, ...] = field(default=("revision", "next", "lease"), init=False)

    def load(self) -> None:
        with suppress(AmenableError):
            found: Any = read_json(self.path)
            for name in self.known:
                setattr(self, name, str(found.get(name, "")))

    def save(self) -> None:
        write_json(self.path, {name: getattr(self, name) for name in self.known})


class Mirror:
    """One working folder and its URL, while this process has the right to write there."""

    def __init__(
        self,
        store: Store,
        root: Path,
        say: Callable[[str], None],
        wanted: Sequence[str] = _KEEP_ALL,
    ) -> None:
        self.root, self._store, self._say, self._wanted = root, store, say, wanted
        self._memory = _Memory(root / _MEMORY)
        self._memory.load()
        self._lease = Lease(store, self._memory.lease)
        self._index = Index("", {})
        self._hashes = FileHashes(root / _HASHES)
        self._lost: AmenableError | None = None

    def open(self) -> None:
        """Takes the lease and brings the working folder up to what the store holds.

        A working folder that is ahead of its store, as after a kill, stays ahead; if others have
        written there meanwhile it becomes what they left.
        """
        self._lease.acquire()
        try:
            self._memory.lease = self._lease.token
            self._memory.save()
            self._index = _read_index(self._store)
            ours = (self._memory.revision, self._memory.next)
            if not self._index.revision:
                self._begin()
            elif self._index.revision not in ours:
                self._take_over()
            self._memory.revision = self._index.revision  # it may have been the next
            self._memory.save()
            self._tidy()
        except BaseException:
            self._lease.release()
            raise

    def close(self) -> None:
        """Gives the lease back; after the store was given up it is left to go stale."""
        if self._lost is None:
            self._lease.release()
        else:
            self._lease.abandon()
        with suppress(AmenableError):
            self._hashes.save()

    def publish(self) -> None:
        """Brings the store up to what the working folder holds.

        Raises:
            StageError: another process has taken the folder over.
            StorageError: the store refuses or stays away; once it has, nothing is tried again.
        """
        if self._lost is not None:
            raise self._lost
        try:
            self._publish()
        except AmenableError as error:
            further = "what the other leaves" if isinstance(error, StageError) else "it"
            advice = (
                f"what is done is whole in {self.root}; the same command goes on from {further}"
            )
            self._lost = type(error)(f"{error}; {advice}")
            raise self._lost from error

    def _publish(self) -> None:
        self._check()
        found = self._scan()
        old = self._index.files
        removed = {path for path in old if path not in found and _matches(path, self._wanted)}
        files = {path: entry for path, entry in old.items() if path not in removed}
        gone = [_key(path, old[path]) for path in removed]
        for path in sorted(found, key=lambda path: (Path(path).name in _LAST, path)):
            before = old.get(path)
            if before is not None and before.sha256 == found[path]:
                continue
            at = f"{_ASIDE}{uuid.uuid4().hex}" if before is not None else ""
            size, digest = self._store.upload(self.root / path, at or path, self._check)
            files[path] = Entry(size, digest, at)
            if before is not None and before.at:
                gone.append(before.at)
        if files != old:
            self._commit(files, gone)
        self._settle(gone)

    def _settle(self, gone: Sequence[str]) -> None:
        """Gives what lies aside its own name, and deletes what the index no longer names."""
        aside = {path: entry for path, entry in self._index.files.items() if entry.at}
        for path in sorted(aside, key=lambda path: (Path(path).name in _LAST, path)):
            self._store.copy(aside[path].at, path, self._check)
        if aside:
            settled = {path: Entry(entry.size, entry.sha256) for path, entry in aside.items()}
            gone = [*gone, *(entry.at for entry in aside.values())]
            self._commit({**self._index.files, **settled}, gone)
        for key in gone:
            self._store.delete(key, self._check)

    def _commit(self, files: Mapping[str, Entry], leftover: Sequence[str]) -> None:
        """Replaces the index: from here on the store holds `files`."""
        index = Index(uuid.uuid4().hex, dict(files), tuple(leftover))
        self._memory.next = index.revision
        self._memory.save()
        self._store.write(_INDEX, index.dumps(), before=lambda: self._check(index.revision))
        self._index = index
        self._memory.revision = index.revision
        self._memory.save()

    def _check(self, *coming: str) -> None:
        """Returns while this process alone writes there.

        Args:
            coming: the revision of an index that may be there already, its answer lost.

        Raises:
            StageError: another has the lease, or had it meanwhile and has replaced the index.
        """
        self._lease.check()
        if _read_index(self._store).revision not in (self._index.revision, *coming):
            raise StageError(
                f"{self._store.shown}: another process has written to this run folder meanwhile; "
                "nothing more is written there"
            )

    def _begin(self) -> None:
        """A URL without an index: nothing, or a folder that was copied there by other means."""
        if self._memory.revision and _RECIPE not in self._index.files:
            raise UsageError(
                f"{self._store.shown}: holds nothing, but {self.root} was mirrored there; remove "
                "that folder to start afresh, or copy it to the URL to go on"
            )
        files: Mapping[str, Entry] = {}
        if _RECIPE in self._index.files:
            self._take_over()
            files = {
                path: Entry(self._index.files[path].size, sha) for path, sha in self._scan().items()
            }
        self._commit(files, ())

    def _take_over(self) -> None:
        """Makes the working folder what the index says."""
        self._memory.revision = self._memory.next = ""
        self._memory.save()
        damaged = _bring(self._store, self._index, self.root, self._wanted)
        if damaged:
            self._say(
                f"{self._store.shown}: missing or altered there: {', '.join(damaged[:3])}"
                f"{' and more' if len(damaged) > 3 else ''}; made again where needed"
            )
        self._memory.revision = self._index.revision
        self._memory.save()

    def _tidy(self) -> None:
        """Deletes what an earlier process was about to delete, or had put aside in vain."""
        used = {_key(path, entry) for path, entry in self._index.files.items()}
        for key in {*self._index.leftover, *self._store.sizes(_ASIDE.rstrip("/"))} - used:
            self._store.delete(key, self._check)

    def _scan(self) -> dict[str, str]:
        """SHA-256 of every file of the working folder that is mirrored."""
        found = _files(self.root, self._wanted)
        return {path: self._hashes.digest(self.root / path) for path in found}


def _files(root: Path, wanted: Sequence[str]) -> list[str]:
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(path for path in found if not _stays(path) and _matches(path, wanted))


def _stays(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _matches(path: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in wanted)


def _inside(path: str) -> str:
    """Raises ValueError: the path leads out of the folder."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path} leads out of the folder")
    return path


def _key(path: str, entry: Entry) -> str:
    """Path of the object that holds a file."""
    return entry.at or path


def _read_index(store: Store) -> Index:
    """The store's index; without revision where there is none, of the files that lie there.

    Raises:
        StorageError: it is no index.
    """
    content = store.read(_INDEX)
    if content is None:
        sizes = store.sizes()
        return Index("", {p: Entry(size, "") for p, size in sizes.items() if not _stays(p)})
    try:
        return Index.loads(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{store.shown}/{_INDEX}: no index of a run folder ({error})") from error


def _bring(store: Store, index: Index, root: Path, wanted: Sequence[str]) -> list[str]:
    """Makes of `root` what the index says, as far as it is wanted: downloads what differs.

    Returns:
        The files that are missing on the store or not what the index says. They are left out, and
        with one of a checkpoint the whole checkpoint.
    """
    for path in _files(root, wanted):
        if path not in index.files:
            with storage_errors(root / path):
                (root / path).unlink()
    hashes = FileHashes(root / _HASHES)
    damaged: list[str] = []
    for path, entry in sorted(index.files.items()):
        file = root / path
        if not _matches(path, wanted):
            continue
        is_same_size = file.is_file() and file.stat().st_size == entry.size
        if is_same_size and hashes.digest(file) == entry.sha256:
            continue
        digest = store.download(_key(path, entry), file)
        if digest is None or (entry.sha256 and digest != entry.sha256):
            damaged.append(path)
    for path in damaged:
        _drop(root, path, index)
    _remove_empty_folders(root)
    with suppress(AmenableError):
        hashes.save()
    return damaged


def _remove_empty_folders(root: Path) -> None:
    """A store has none, and a stage takes a model's folder for the model."""
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not _stays(folder.relative_to(root).as_posix()):
            with suppress(OSError):  # not empty
                folder.rmdir()


def _drop(root: Path, path: str, index: Index) -> None:
    """Removes a damaged file; of a checkpoint all files."""
    folder, found, rest = path.partition("/checkpoints/")
    whole = f"{folder}{found}{rest.partition('/')[0]}/" if found and "/" in rest else ""
    for other in index.files:
        if other == path or (whole and other.startswith(whole)):
            with storage_errors(root / other):
                (root / other).unlink(missing_ok=True)
