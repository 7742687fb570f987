"""Names of data to streams of bytes: local files, globs, URLs, hub data sets.

    rows.jsonl, ~/data/rows.jsonl.gz     a local file
    data/*.jsonl, data/**/*.parquet      a glob: its files in sorted order
    s3://…, gs://…, https://…, hf://…    what fsspec opens, globs included
    hub:OWNER/NAME[/CONFIG][:SPLIT]      a data set of the Hugging Face hub; also hub:FOLDER

Passwords and the queries of signed URLs are never shown: errors use `Source.shown`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amenable.data.reading.remote import (
    expand_url,
    is_url,
    need_package,
    open_url,
    state_of_url,
)
from amenable.errors import DataError
from amenable.masking import shown_name, without_secrets

__all__ = [
    "HubName",
    "Source",
    "find_sources",
    "find_usable",
    "hub_name",
    "is_url",
    "open_source",
    "state_of",
    "without_secrets",
]

HUB = "hub:"
"""How the name of a hub data set begins."""

GZIP_MAGIC = b"\x1f\x8b"

_ENDING = re.compile(r"(?:\.(?:jsonl|ndjson|json|csv|tsv|parquet))?(?:\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set to read."""

    name: str
    """As the user gave it, or as the glob found it; may hold a password: show `shown`."""
    label: str
    """What default ids of its rows begin with."""

    @property
    def shown(self) -> str:
        """The name without password and query, for messages and reports."""
        return shown_name(self.name)

    @property
    def local(self) -> Path | None:
        """The file on the local disk; None if it is elsewhere."""
        return None if self.is_hub or is_url(self.name) else _local(self.name)

    @property
    def is_pipe(self) -> bool:
        """Whether it is local and can be read once only, as `<(zcat rows.jsonl.gz)`."""
        return self.local is not None and self.local.exists() and not self.local.is_file()

    @property
    def is_hub(self) -> bool:
        """Whether it is a hub data set, which has records but no bytes to open."""
        return self.name.startswith(HUB)


@dataclass(frozen=True, slots=True)
class HubName:
    """The parts of `hub:OWNER/NAME[/CONFIG][:SPLIT]`; `dataset` may be a local folder."""

    dataset: str
    config: str | None
    split: str


def find_sources(names: Sequence[str | Path]) -> list[Source]:
    """One source for each file or data set, in the order given; a glob's files sorted.

    Args:
        names: paths, globs, URLs and hub names; see the top of this file.

    Raises:
        DataError: a name is malformed, nothing is there, a folder is named, a file is named twice,
            or a package that is needed to read it is not installed.
    """
    found = [name for given in names for name in _expand(str(given))]
    seen: set[str] = set()
    labels: set[str] = set()
    sources = []
    for name in found:
        if (place := _place(name)) in seen:
            raise DataError("the file is given twice; name it once", path=shown_name(name))
        seen.add(place)
        label = _free(_stem(name), labels)
        labels.add(label)
        sources.append(Source(name, label))
    return sources


def find_usable(
    names: Sequence[str | Path], fault: Callable[[DataError], None] = lambda error: None
) -> list[Source]:
    """As `find_sources`; of a name that leads to no source `fault` is told, and others are used."""
    try:
        return find_sources(names)
    except DataError:
        usable: list[str | Path] = []
        for name in names:
            try:
                find_sources([*usable, name])
            except DataError as error:
                fault(error)
            else:
                usable.append(name)
        return find_sources(usable)


def state_of(source: Source) -> str:
    """A short text that changes when a remote file does, as far as its server tells.

    That is its size, time and checksums; of a folder given as `hub:FOLDER` the sizes and times of
    its files. Of a data set on the hub it is only the name: the hub tells a revision only when
    asked, and a run that goes on without the network must not look like one with other data.
    Name a file of one revision (`hf://datasets/OWNER/NAME@REVISION/…`) where that matters.

    Raises:
        DataError: the file cannot be reached.
    """
    if source.is_hub:
        folder = Path(hub_name(source.name).dataset)
        return f"{source.name} {_state_of_folder(folder)}" if folder.is_dir() else source.name
    return f"{source.shown} {state_of_url(source.name)}"


def open_source(source: Source) -> io.BufferedIOBase:
    """The source's bytes, gzip undone; seekable if the place can seek and it is no gzip.

    Raises:
        DataError: it cannot be opened; says why and what to do. Reading from the stream raises
            OSError, EOFError or zlib.error, whatever the place it comes from.
    """
    stream = open_url(source.name) if is_url(source.name) else _open_file(source)
    try:
        is_gzip = source.name.lower().endswith(".gz") or stream.peek(2)[:2] == GZIP_MAGIC
    except OSError:
        is_gzip = False  # the first read says what is wrong
    if is_gzip:
        return _Gzip(stream)
    return stream


def hub_name(name: str) -> HubName:
    """The parts of a name that begins with `hub:`.

    Raises:
        DataError: it has no such form.
    """
    dataset, colon, split = name.removeprefix(HUB).partition(":")
    folder = Path(dataset).expanduser()
    parts = dataset.split("/")
    is_folder = bool(dataset) and folder.is_dir()
    if is_folder and not (colon and not split):
        return HubName(str(folder), None, split or "train")
    if is_folder or not all(parts) or len(parts) > 3 or (colon and not split):
        raise DataError(
            "is no name of a hub data set; expected hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, either "
            "with :SPLIT behind it, or hub:FOLDER with a folder that exists",
            path=shown_name(name),
        )
    return HubName("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train")


def _expand(name: str) -> list[str]:
    if name.startswith(HUB):
        hub_name(name)
        need_package("datasets", name, extra="hub")
        return [name]
    if is_url(name):
        return expand_url(name)
    path = _local(name)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise _not_opened(name, error) from error
    if exists and not is_folder:
        return [name]
    if is_folder:
        raise DataError("is a folder; name the files in it", path=shown_name(name))
    if glob.has_magic(name):
        files = [file for file in sorted(glob.glob(str(path), recursive=True)) if _is_file(file)]
        if not files:
            raise DataError(
                f"no file matches (looked from {Path.cwd()}); correct the pattern",
                path=shown_name(name),
            )
        return files
    raise _missing(name)


def _open_file(source: Source) -> io.BufferedReader:
    path = _local(source.name)
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        raise DataError("is a folder; name the files in it", path=source.shown) from error
    except FileNotFoundError as error:
        raise _missing(source.name) from error
    except (OSError, ValueError) as error:
        raise _not_opened(source.name, error) from error


class _Gzip(gzip.GzipFile):
    """What is packed in a stream; closes the stream with itself."""

    def __init__(self, stream: io.BufferedReader) -> None:
        super().__init__(fileobj=stream, mode="rb")
        self._stream = stream

    def close(self) -> None:
        super().close()
        self._stream.close()


def _missing(name: str) -> DataError:
    folder = without_secrets(str(_local(name).parent.resolve()))
    return DataError(
        f"there is no such file (looked in {folder}); correct the path", path=shown_name(name)
    )


def _not_opened(name: str, error: Exception) -> DataError:
    why = error.strerror if isinstance(error, OSError) else error
    remedy = "check its permissions" if isinstance(error, PermissionError) else "check the path"
    return DataError(f"cannot be opened ({why}); {remedy}", path=shown_name(name))


def _local(name: str) -> Path:
    return Path(name.removeprefix("file://")).expanduser()


def _is_file(name: str) -> bool:
    return Path(name).exists() and not Path(name).is_dir()


def _state_of_folder(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state = path.stat()
            total.update(
                f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode()
            )
    return total.hexdigest()


def _place(name: str) -> str:
    """Where it is: one text for each of the ways to write a path."""
    if name.startswith(HUB) or is_url(name):
        return name
    return str(_local(name).resolve())


def _stem(name: str) -> str:
    if name.startswith(HUB):
        return re.sub(r"[/:]+", "-", Path(name.removeprefix(HUB).rstrip("/")).name)
    path = re.split("[?#]", shown_name(name), maxsplit=1)[0] if is_url(name) else name
    last = path.rstrip("/").rpartition("/")[2]
    return _ENDING.sub("", last) or last


def _free(stem: str, taken: set[str]) -> str:
    """The stem, numbered if another source has it."""
    label, number = stem, 1
    while label in taken:
        number += 1
        label = f"{stem}#{number}"
    return label
