"""The objects below one URL of an object store: small ones at once, files in a stream.

What may pass (no connection, a busy server) is tried again, for longer and longer pauses; what will
not (no such bucket, no access) is told at once. No message holds a secret.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from amenable.artifacts import do_nothing, storage_errors
from amenable.data.reading.remote import access_refused, filesystem, may_pass, reason
from amenable.errors import AmenableError, StorageError, UsageError
from amenable.masking import shown_name

WAIT_VARIABLE = "AMENABLE_STORE_WAIT_S"
"""Environment variable: seconds that a store which does not answer is waited for."""

_WAIT_S = 300.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_CHUNK_BYTES = 1 << 20
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}}
"""A server that hangs is given up by `s3fs` after five times of these seconds."""

_WITH_FOLDERS = ("local", "sftp", "ssh", "smb", "hdfs", "webhdfs", "ftp")
"""Protocols of places where a folder must be made before a file in it; in others a bucket would."""

T = TypeVar("T")


class StoreRefuses(StorageError):
    """The store answers, and will not do it: the bucket, the credentials or the URL is wrong."""

    exit_code = 2


class Store:
    """Objects named by paths relative to one URL.

    Args:
        url: of the folder.
        wait_s: how long a store that does not answer is waited for; None: as the environment says.
        system: the fsspec filesystem; None: that of the URL.

    Every method raises StoreRefuses or, where the store stays away, StorageError. Those that take
    `before` call it in every try, just before the request that changes the store; what it raises
    is not tried again.
    """

    def __init__(self, url: str, *, wait_s: float | None = None, system: Any = None) -> None:
        self.url = url.rstrip("/")
        self.shown = shown_name(self.url)
        self._wait_s = _wait() if wait_s is None else wait_s
        protocol = self.url.partition("://")[0].lower()
        options = _S3 if protocol in ("s3", "s3a") else {}
        found, self._root = filesystem(self.url, use_listings_cache=False, **options)
        self._system = system or found
        self._root = self._root.rstrip("/")
        self._makes_folders = protocol in _WITH_FOLDERS

    def waited_for(self, seconds: float) -> Store:
        """The same store, waited for so long."""
        store = copy.copy(self)
        store._wait_s = seconds
        return store

    def read(self, path: str) -> bytes | None:
        """The object's bytes; None if there is none."""

        def read() -> bytes | None:
            try:
                return bytes(self._system.cat_file(self._at(path)))
            except FileNotFoundError:
                return None

        return self._keep_trying(read)

    def write(self, path: str, content: bytes, before: Callable[[], None] = do_nothing) -> None:
        """Puts a small object; what stood there is replaced at once."""

        def write() -> None:
            before()
            self._system.pipe_file(self._at(path), content)

        self._put(write, path)

    def create(self, path: str, content: bytes) -> bool:
        """Puts a small object unless there is one; whether it did.

        On Amazon S3 and what speaks its language with conditional writes the store itself decides
        between two that come at once; elsewhere it is looked at first.
        """

        def create() -> bool:
            try:
                self._system.pipe_file(self._at(path), content, mode="create")
            except FileExistsError:
                return False
            return True

        return self._put(create, path)

    def upload(
        self, file: Path, path: str, before: Callable[[], None] = do_nothing
    ) -> tuple[int, str]:
        """Size and SHA-256 of the bytes of a local file that were put, in a stream."""

        def upload() -> tuple[int, str]:
            source.seek(0)
            digest, size = hashlib.sha256(), 0
            before()
            target = self._system.open(self._at(path), "wb", autocommit=False)
            try:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                target.close()
                before()  # a large file has taken its time
                target.commit()
            except BaseException:
                with suppress(Exception):  # the first error counts
                    target.discard()
                raise
            return size, digest.hexdigest()

        with storage_errors(file), file.open("rb") as source:
            return self._put(upload, path)

    def download(self, path: str, file: Path) -> str | None:
        """The SHA-256 of an object that now lies at `file`, made aside; None if there is none.

        Raises:
            StorageError: also where the local disk cannot take it.
        """

        def download() -> str | None:
            aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
            digest = hashlib.sha256()
            try:
                source = self._system.open(self._at(path), "rb")
            except FileNotFoundError:
                return None
            with source:
                chunks = iter(lambda: source.read(_CHUNK_BYTES), b"")
                with storage_errors(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with aside.open("wb") as target:
                        for chunk in chunks:
                            with storage_errors(file):
                                target.write(chunk)
                            digest.update(chunk)
                    aside.replace(file)
                finally:
                    aside.unlink(missing_ok=True)
            return digest.hexdigest()

        return self._keep_trying(download)

    def copy(self, path: str, to: str, before: Callable[[], None] = do_nothing) -> None:
        """Copies an object within the store."""

        def copy() -> None:
            before()
            try:
                self._system.cp_file(self._at(path), self._at(to))
            except NotImplementedError:
                with (
                    self._system.open(self._at(path), "rb") as source,
                    self._system.open(self._at(to), "wb") as target,
                ):
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)

        self._put(copy, to)

    def delete(self, path: str, before: Callable[[], None] = do_nothing) -> None:
        """Removes an object; one that is not there is none to remove."""

        def delete() -> None:
            before()
            with suppress(FileNotFoundError):
                self._system.rm_file(self._at(path))

        self._keep_trying(delete)

    def sizes(self, under: str = "") -> dict[str, int]:
        """Bytes of every object, by path; of those below the folder `under`, if one is named."""

        def sizes() -> dict[str, int]:
            try:
                found = self._system.find(self._at(under) if under else self._root, detail=True)
            except FileNotFoundError:
                return {}
            prefix = self._root.strip("/") + "/"
            return {
                name.lstrip("/").removeprefix(prefix): int(info.get("size") or 0)
                for name, info in found.items()
                if name.lstrip("/").startswith(prefix)
            }

        return self._keep_trying(sizes)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _put(self, put: Callable[[], T], path: str) -> T:
        """Does what writes an object, in a folder that is made where a place has folders."""

        def prepared() -> T:
            if self._makes_folders:
                self._system.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
            return put()

        return self._keep_trying(prepared)

    def _keep_trying(self, action: Callable[[], T]) -> T:
        start, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return action()
            except AmenableError:  # the local disk, or what came before
                raise
            except Exception as error:  # every filesystem has its own errors
                self._refuse(error)
                tried_s = time.monotonic() - start
                if tried_s + pause > self._wait_s:
                    raise StorageError(
                        f"{self.shown}: the store cannot be reached, tried for {tried_s:.0f} s "
                        f"({reason(error)})"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _refuse(self, error: Exception) -> None:
        """Raises StoreRefuses: another try cannot help."""
        if refused := access_refused(self.url, error):
            raise StoreRefuses(f"{self.shown}: {refused}") from error
        if isinstance(error, FileNotFoundError):
            raise StoreRefuses(
                f"{self.shown}: cannot be written, {reason(error)}; correct the URL, or make the "
                "bucket first"
            ) from error
        if not may_pass(error):
            raise StoreRefuses(f"{self.shown}: the store refuses: {reason(error)}") from error


def _wait() -> float:
    text = os.environ.get(WAIT_VARIABLE, "")
    try:
        return float(text or _WAIT_S)
    except ValueError:
        raise UsageError(f"{WAIT_VARIABLE}: found {text!r}; expected seconds, as 300") from None
