"""URLs to streams of bytes through fsspec, whose every failure is told without secrets."""

from __future__ import annotations

import importlib.util
import io
import re
from typing import Any

from amenable.errors import DataError
from amenable.http_post import TRY_AGAIN
from amenable.masking import shown_name, without_secrets

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::)")
_HTTP = ("http", "https")

_STATE = frozenset(
    {
        *("size", "mtime", "lastmodified", "updated", "created", "etag", "contentmd5", "md5hash"),
        *("digest", "crc32c", "generation", "versionid", "blobid"),
    }
)
"""What filesystems call that which changes with a file, in letters alone."""

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "hf": "HF_TOKEN, or `hf auth login`",
    "http": "user and password in the URL, ~/.netrc or a signed URL; none of them is shown",
    "https": "user and password in the URL, ~/.netrc or a signed URL; none of them is shown",
}


def is_url(name: str) -> bool:
    """Whether fsspec opens it, not the local disk."""
    return bool(_URL.match(name)) and not name.startswith("file://")


def expand_url(name: str) -> list[str]:
    """The URL itself, or the files that it matches if it is a pattern, sorted.

    Raises:
        DataError: nothing matches, or the place cannot be reached.
    """
    system, path = filesystem(name)
    is_http = _protocol(name) in _HTTP  # where ? begins a query
    pattern = path.partition("?")[0] if is_http else path.replace("?", "*")
    if not re.search(r"[*\[]", pattern):
        return [name]
    try:
        files = sorted(
            system.unstrip_protocol(str(file))
            for file, info in system.glob(path, detail=True).items()
            if info.get("type") != "directory"
        )
        if not files and not is_http and system.exists(path):
            return [name]
    except Exception as error:  # every filesystem has its own errors
        raise _unreachable(name, error) from None
    if not files:
        raise DataError(
            "no file matches; correct the pattern, or name the files one by one if the place "
            "cannot list them",
            path=shown_name(name),
        )
    return files


def open_url(name: str) -> io.BufferedReader:
    """The bytes at a URL; over HTTP they are read from beginning to end only.

    Raises:
        DataError: it cannot be opened. Reading raises OSError, whatever the place.
    """
    system, path = filesystem(name)
    is_http = _protocol(name) in _HTTP
    # Over HTTP one request from beginning to end: not every server answers ranges.
    how: dict[str, Any] = {"block_size": 0} if is_http else {}
    try:
        remote = system.open(path, "rb", **how)
    except Exception as error:  # every filesystem has its own errors
        raise _unreachable(name, error) from None
    return io.BufferedReader(_Remote(remote, can_seek=not is_http), 2**20)


def state_of_url(name: str) -> str:
    """Size, time and checksums of a remote file, as far as its server tells.

    Raises:
        DataError: the file cannot be reached.
    """
    system, path = filesystem(name)
    try:
        known = system.info(path)
    except Exception as error:  # every filesystem has its own errors
        raise _unreachable(name, error) from None
    told = {word: str(known[key]) for key in known if (word := _letters(key)) in _STATE}
    return str(sorted(told.items()))


def _letters(key: str) -> str:
    """`Last-Modified`, `LastModified` and `last_modified` as one word."""
    return re.sub(r"[^a-z0-9]", "", key.lower())


class _Remote(io.RawIOBase):
    """A remote file whose every failure is an OSError without secrets."""

    def __init__(self, file: Any, can_seek: bool) -> None:
        self._file = file
        self._can_seek = can_seek
        self._error: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._can_seek

    def readinto(self, buffer: Any) -> int:
        if self._error:  # a file that broke off must not look as if it ended
            raise self._error
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # every filesystem has its own errors
            self._error = _as_os_error(error)
            raise self._error from None
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if not self._can_seek:
            raise io.UnsupportedOperation("seek")
        try:
            return int(self._file.seek(offset, whence))
        except Exception as error:  # every filesystem has its own errors
            raise _as_os_error(error) from None

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _as_os_error(error: Exception) -> OSError:
    return OSError(5, _one_line(error))


def filesystem(name: str, **options: Any) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path within it.

    Args:
        name: the URL.
        options: of the filesystem.

    Raises:
        DataError: the URL is malformed, or a package that it needs is not installed.
    """
    need_package("fsspec", name, extra="remote")
    fsspec = importlib.import_module("fsspec")
    try:
        if _protocol(name) in _HTTP:
            fsspec.get_filesystem_class("https")
            aiohttp = importlib.import_module("aiohttp")
            # fsspec's own limit is five minutes for the whole file; ~/.netrc and proxies count.
            waits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
            options["client_kwargs"] = {"timeout": waits, "trust_env": True}
            options["encoded"] = "%" in name
        system, path = fsspec.core.url_to_fs(name, **options)
    except ImportError as error:
        raise DataError(
            f"{_protocol(name)}:// needs a package that is not installed ({error}); "
            'pip install "amenable[remote]"',
            path=shown_name(name),
        ) from error
    except Exception as error:  # every filesystem has its own errors
        raise _unreachable(name, error) from None
    return system, str(path)


def need_package(package: str, name: str, extra: str) -> None:
    """Refuses a name that cannot be read without a package.

    Raises:
        DataError: the package is not installed; names the extra that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f'needs the package {package}, which is not installed; pip install "amenable[{extra}]"',
            path=shown_name(name),
        )


def access_refused(name: str, error: BaseException) -> str:
    """What to say of an error that is a lack of access, with the remedy; empty if it is none."""
    status, why = _answer(error)
    if status in (401, 403) or isinstance(error, PermissionError) or "credential" in why.lower():
        protocol = _protocol(name)
        how = _CREDENTIALS.get(protocol, f"what fsspec's documentation of {protocol}:// names")
        answer = f"the server answers {status}, access denied" if status else f"no access: {why}"
        return f"{answer}; give credentials by {how}"
    return ""


def may_pass(error: BaseException) -> bool:
    """Whether another try may help: there was no answer, or one that a busy server gives."""
    status, _ = _answer(error)
    if status is not None:
        return status in TRY_AGAIN
    return not isinstance(error, FileNotFoundError | FileExistsError | NotImplementedError)


def reason(error: BaseException) -> str:
    """Why, in one line without secrets: the first cause of an error."""
    return _answer(error)[1]


def _answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status, if there was an answer, and the first cause in one line."""
    chain = _chain(error)
    return next(filter(None, map(_status, chain)), None), _one_line(chain[-1])


def _unreachable(name: str, error: Exception) -> DataError:
    """What to say when a URL cannot be opened or listed."""
    protocol, shown = _protocol(name), shown_name(name)
    status, why = _answer(error)
    if refused := access_refused(name, error):
        return DataError(refused, path=shown)
    if status == 404 or (isinstance(error, FileNotFoundError) and protocol not in _HTTP):
        answer = "the server answers 404: " if status else ""
        return DataError(f"{answer}there is no such file; correct the URL", path=shown)
    if isinstance(error, IsADirectoryError):
        return DataError("is a folder; name the files in it", path=shown)
    if status is not None:
        return DataError(
            f"the server answers {status}; try again later, or fetch the file by other means",
            path=shown,
        )
    return DataError(f"cannot be reached ({why}); check the URL and the network", path=shown)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of one of the libraries beneath fsspec tells."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) and status >= 300 else None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _one_line(error: BaseException) -> str:
    text = without_secrets(str(error)).strip() or type(error).__name__
    return text.splitlines()[0]


def _protocol(name: str) -> str:
    return re.split("://|::", name, maxsplit=1)[0].lower()
