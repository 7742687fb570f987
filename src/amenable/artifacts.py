"""The run folder: its paths, atomic writes and logs; the one module that knows the layout.

    runs/NAME/
      recipe.toml  summary.json  manifest.json  report.html
      data/  models/{sft,reward,tuned}/
      stages/STAGE/  state.json  metrics.jsonl  samples.jsonl  tensorboard/  checkpoints/

A file or folder appears under its name only when it is whole: it is written aside, flushed to
the disk and renamed. Standard library only, but for TensorBoard's writer, imported at first use.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from amenable.errors import DataError, StorageError
from amenable.progress import Deadline, Progress, StopRequest

if TYPE_CHECKING:
    from amenable.config.recipe import Recipe
    from amenable.data.render import Renderer

__all__ = [
    "Deadline",
    "Json",
    "MetricsLog",
    "Progress",
    "RunFolder",
    "StageContext",
    "StopRequest",
    "atomic_dir",
    "is_left_out",
    "read_json",
    "read_jsonl",
    "storage_errors",
    "write_json",
    "write_jsonl",
    "write_text",
    "writes_left_out",
]

Json = dict[str, Any]

_RUN_STAGE = "run the stage that makes it"

_STORAGE_ADVICE = {
    errno.ENOSPC: ("the disk is full", "free some space and run again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run again"),
    errno.EROFS: ("the file system is read-only", "choose another folder with --out"),
    errno.EACCES: ("permission denied", "choose a folder that you may write with --out"),
    errno.EPERM: ("permission denied", "choose a folder that you may write with --out"),
    errno.EEXIST: ("a file is in the way of a folder", "choose another folder with --out"),
    errno.ENOTDIR: ("a file is in the way of a folder", "choose another folder with --out"),
}

_FULL_DISK_WORDS = (os.strerror(errno.ENOSPC), "os error 28", "PytorchStreamWriter failed writing")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a StorageError that names `path`, the reason and a remedy.

    A full disk is recognised as well where a library wraps it in an error of its own.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        refused = write_failure(error)
        if refused is None:
            raise
        raise storage_error(path, refused) from error


def write_failure(error: BaseException) -> OSError | None:
    """The failed write behind `error`: itself, or the full disk that its text tells of."""
    if isinstance(error, OSError):
        return error
    if any(words in str(error) for words in _FULL_DISK_WORDS):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def storage_error(path: Path, error: OSError) -> StorageError:
    """The StorageError that tells the user about `error` while `path` was written."""
    usual = (error.strerror or str(error), "make the folder writable or choose another with --out")
    reason, remedy = _STORAGE_ADVICE.get(error.errno or 0, usual)
    message = f"cannot write {path}: {reason}; {remedy}. Nothing half-written was kept."
    return StorageError(message)


_left_out: Path | None = None


@contextmanager
def writes_left_out(root: Path) -> Iterator[None]:
    """What is written below `root` inside the block is left out, and no error.

    For the ranks that compute along with the one that writes the run folder.
    """
    global _left_out  # of the process, as its rank is
    before, _left_out = _left_out, root.absolute()
    try:
        yield
    finally:
        _left_out = before


def is_left_out(path: Path) -> bool:
    """Whether another rank writes `path`: what would take long to make need not be made."""
    return _left_out is not None and path.absolute().is_relative_to(_left_out)


def write_text(path: Path, text: str) -> None:
    """Writes `text` aside, flushes it to the disk and renames it over `path`.

    Raises:
        StorageError: the disk is full or not writable; what stood at `path` is intact.
    """
    _write_lines(path, (text,))


def write_json(path: Path, obj: object) -> None:
    """Writes `obj` as indented JSON, atomically; NaN and infinity become null.

    Raises:
        StorageError: the disk is full or not writable.
    """
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically: all of `rows` or no file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    _write_lines(path, (_json_line(row) for row in rows))


def read_json(path: Path, remedy: str = _RUN_STAGE) -> Any:
    """The parsed JSON file.

    Args:
        path: of the file.
        remedy: what to do where it is missing.

    Raises:
        DataError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no such file; {remedy}", path=path) from error
    except (OSError, ValueError) as error:
        raise DataError(f"not a readable JSON file ({error})", path=path) from error


def read_jsonl(path: Path, remedy: str = _RUN_STAGE) -> Iterator[Json]:
    """Yields the object of each line that is not blank.

    Args:
        path: of the file.
        remedy: what to do where it is missing.

    Raises:
        DataError: the file is missing, or a line holds no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_object(line, path, number)
    except FileNotFoundError as error:
        raise DataError(f"no such file; {remedy}", path=path) from error


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that replaces `path` when the block ends well.

    An error inside removes the new folder and leaves `path` as it was. Where writes are left out
    (`writes_left_out`) the folder is one of the system's temporary ones, and goes.

    Raises:
        StorageError: the disk is full or not writable.
    """
    if is_left_out(path):
        with tempfile.TemporaryDirectory(prefix="amenable-") as scratch:
            yield Path(scratch)
        return
    aside = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        _remove(aside)
        aside.mkdir(parents=True)
    try:
        with storage_errors(path):
            yield aside
            _flush_tree(aside)
            _replace_dir(aside, path)
    except BaseException:
        _remove(aside)
        raise


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    root: Path

    @property
    def data(self) -> Path:
        """The exact rows used, by split."""
        return self.root / "data"

    @property
    def models(self) -> Path:
        """Hugging Face folders `sft`, `reward`, `tuned`."""
        return self.root / "models"

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.toml"

    @property
    def summary_path(self) -> Path:
        """The result in numbers."""
        return self.root / "summary.json"

    @property
    def manifest_path(self) -> Path:
        """Versions, hardware, seeds and hashes."""
        return self.root / "manifest.json"

    @property
    def report_path(self) -> Path:
        """The page to read."""
        return self.root / "report.html"

    @property
    def lock_path(self) -> Path:
        """Held by the one process that writes."""
        return self.root / ".lock"

    def stage_path(self, name: str) -> Path:
        """The stage's folder, which may not exist."""
        return self.root / "stages" / name

    def stage(self, name: str) -> Path:
        """The stage's folder, made if missing."""
        path = self.stage_path(name)
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def state_path(self, name: str) -> Path:
        """The stage's fingerprint and status."""
        return self.stage_path(name) / "state.json"


class _ScalarWriter(Protocol):
    def add_scalar(
        self, tag: str, scalar_value: float, global_step: int, walltime: float
    ) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Observer(Protocol):
    """Hears every row of a stage's figures."""

    def see(self, step: int, figures: Mapping[str, float]) -> None:
        """A row that has just been written."""
        ...

    def begin(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """The rows that stand in the log when the stage begins or resumes."""
        ...


class MetricsLog:
    """The figures of one stage: `metrics.jsonl`, `samples.jsonl` and TensorBoard.

    A row is on its way to the disk when `write` returns; one torn by a kill is dropped when the
    log is opened again, and `wall_s` goes on from the last row.
    """

    def __init__(
        self,
        stage: str,
        folder: Path,
        *,
        tensorboard: bool = True,
        observer: Observer | None = None,
    ):
        """Opens the logs in `folder` without writing anything yet.

        Args:
            stage: the prefix of the metric names.
            folder: the stage's folder.
            tensorboard: copy the figures to `tensorboard/`, whose tags carry no prefix.
            observer: hears every row once it is written, and what it raises goes to the writer.
        """
        self._observer = observer
        self._stage = stage
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.tensorboard_path = folder / "tensorboard"
        self._tensorboard = tensorboard
        self._writer: _ScalarWriter | None = None
        self._restart_clock()

    def write(self, step: int, **figures: float) -> None:
        """Appends the figures of one step.

        Args:
            step: optimizer step or update, from 0.
            figures: quantity=value, without the stage's prefix; NaN is kept as null.

        Raises:
            StorageError: the disk is full or not writable.
        """
        values = {name: float(value) for name, value in figures.items()}
        wall_s = round(self._offset_s + time.monotonic() - self._start, 3)
        named = {f"{self._stage}/{name}": value for name, value in values.items()}
        append_jsonl(self.metrics_path, [{"step": int(step), "wall_s": wall_s, **named}])
        self._draw(int(step), values)
        if self._observer is not None:
            self._observer.see(int(step), values)

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to `samples.jsonl`.

        Raises:
            StorageError: the disk is full or not writable.
        """
        append_jsonl(self.samples_path, rows)

    def flush(self) -> None:
        """Waits until all that was written is on the disk.

        Raises:
            StorageError: the disk is full or not writable.
        """
        for path in (self.metrics_path, self.samples_path):
            if path.exists() and not is_left_out(path):
                with storage_errors(path), path.open("rb") as file:
                    os.fsync(file.fileno())

    def rows(self) -> list[Json]:
        """Every row of `metrics.jsonl`; a torn last line is left out."""
        return whole_rows(self.metrics_path)

    def truncate(self, after_step: int) -> None:
        """Forgets everything after `after_step`, which a resumed stage will write again.

        Args:
            after_step: the last step that stays; -1 forgets all.

        Raises:
            StorageError: the disk is full or not writable.
        """
        self.close()
        if is_left_out(self.metrics_path):
            return
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                rows = (row for row in whole_rows(path) if row.get("step", 0) <= after_step)
                write_jsonl(path, rows)
        _remove(self.tensorboard_path)
        self._restart_clock()
        prefix = f"{self._stage}/"
        kept = []
        for row in self.rows():
            values = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            kept.append((row["step"], {k: v for k, v in values.items() if v is not None}))
            self._draw(*kept[-1])
        if self._observer is not None:
            self._observer.begin(kept)

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _restart_clock(self) -> None:
        rows = self.rows()
        self._offset_s = float(rows[-1]["wall_s"]) if rows else 0.0
        self._start = time.monotonic()

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        if not self._tensorboard:
            return
        if self._writer is None:
            self._writer = _open_tensorboard(self.tensorboard_path)
            if self._writer is None:
                self._tensorboard = False
                return
        with storage_errors(self.tensorboard_path):
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step, time.time())
            self._writer.flush()


def do_nothing() -> None:
    return None


@dataclass(frozen=True)
class StageContext:
    """What a stage is given; every stage is `run(ctx) -> its section of summary.json`."""

    recipe: Recipe
    """The resolved recipe."""

    folder: RunFolder
    """Where inputs lie and artifacts go."""

    stage: str
    """The stage's name, a row of `pipeline/stages.py`."""

    log: MetricsLog
    """Figures and samples of this stage."""

    progress: Progress
    """What the user sees."""

    deadline: Deadline
    """This stage's share of --max-minutes; training stops well when it is exceeded."""

    stop: StopRequest = field(default_factory=StopRequest)
    """Whether a signal wants the run to end; training stops after a step, with a checkpoint."""

    refresh_report: Callable[[], None] = do_nothing
    """Rewrites `report.html` from what the folder holds now, and now and then publishes.

    A page that cannot be drawn raises nothing. Raises StageError or StorageError: the folder is
    mirrored to a store that another process has taken over, or that stays away.
    """

    publish: Callable[[], None] = do_nothing
    """To be called when a checkpoint is whole: a run folder on an object store follows."""

    open_renderer: Callable[[], Renderer] | None = None
    """Opens the base model's tokenizer, without weights, for stages that load no model."""

    @property
    def out(self) -> Path:
        """The stage's folder."""
        return self.folder.stage(self.stage)


def plain(obj: object) -> object:
    """`obj` in JSON's own types: paths as text, array scalars as numbers, NaN as None."""
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [plain(value) for value in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if obj is None or isinstance(obj, str | int):
        return obj
    if hasattr(obj, "tolist"):
        return plain(obj.tolist())
    return str(obj)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _parse_object(line: str, path: Path, number: int) -> Json:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"no JSON ({error})", path=path, line=number) from error
    if not isinstance(row, dict):
        raise DataError("a line must hold one JSON object", path=path, line=number)
    return row


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    if is_left_out(path):
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("w", encoding="utf-8", newline="\n") as file:
                for line in lines:
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            _flush_dir(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows; a line that a kill has torn is cut off first.

    Raises:
        StorageError: the disk is full or not writable.
    """
    if is_left_out(path):
        return
    text = "".join(_json_line(row) for row in rows)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)


def _drop_torn_line(path: Path) -> None:
    """Cuts the file after its last newline; a whole file is only looked at in its last byte."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def whole_rows(path: Path) -> list[Json]:
    """The rows of a file that may end in a torn line, or not be there."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [
        _parse_object(line, path, number)
        for number, line in enumerate(lines[:-1], start=1)
        if line.strip()
    ]


def _open_tensorboard(path: Path) -> _ScalarWriter | None:
    """TensorBoard's writer; None where torch or tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    with storage_errors(path):
        writer: _ScalarWriter = SummaryWriter(log_dir=str(path))
        return writer


def _flush_dir(path: Path) -> None:
    """Makes a rename last a power cut, where the file system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _flush_tree(root: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_dir(root)


def _replace_dir(new: Path, path: Path) -> None:
    """Renames `new` over `path`; between the two renames `path` is missing, never half there."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        path.replace(old)
    new.replace(path)
    _flush_dir(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
