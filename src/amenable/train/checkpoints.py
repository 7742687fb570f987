"""Checkpoints of a training stage: numbered folders, each of them whole or not there.

    checkpoints/step-000012/
      GROUP.safetensors   one a group of tensors: weights, optimizer, ...
      numbers.json        what is no tensor
      hashes.json         SHA-256 of the other files

There is no pointer to the newest one that could be wrong: the highest number whose hashes hold is
gone on from. `Checkpoints.write` is the only way in, `Checkpoints.read` the only way out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from amenable.artifacts import atomic_dir, is_left_out, read_json, storage_errors, write_json
from amenable.ranks import group as ranks
from amenable.ranks.sharding import whole_ones

if TYPE_CHECKING:
    from amenable.artifacts import StageContext

Tensors = dict[str, dict[str, Tensor]]
"""By group and name."""

Numbers = dict[str, Any]
"""JSON-able; NaN and infinity come back as None."""

_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(path: Path, tensors: Tensors, numbers: Numbers) -> None:
    """Write named groups of tensors and a JSON object, whole or not at all.

    Of several ranks one writes; the others give their parts of sharded tensors.

    Raises:
        StorageError: the disk is full or not writable; what stood at `path` is intact.
    """
    left_out = is_left_out(path)
    whole = {name: whole_ones(group.items(), keep=not left_out) for name, group in tensors.items()}
    if left_out:
        return
    with atomic_dir(path) as folder:
        for name, group in whole.items():
            save_file({k: v.contiguous() for k, v in group.items()}, folder / f"{name}.safetensors")
        write_json(folder / "numbers.json", {"tensors": sorted(tensors), **numbers})
        digests = {file.name: _digest(file) for file in sorted(folder.iterdir())}
        write_json(folder / "hashes.json", digests)


def fault(path: Path) -> str:
    """Why the checkpoint at `path` is not what was written; empty: it is."""
    try:
        digests = json.loads((path / "hashes.json").read_text(encoding="utf-8"))
        broken = [name for name, digest in digests.items() if _digest(path / name) != digest]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read: {error}"
    if "numbers.json" not in digests:
        return "hashes.json is not what was written"
    return f"{broken[0]} has another SHA-256 than when it was written" if broken else ""


def load_checkpoint(path: Path, say: Callable[[str], None]) -> tuple[Tensors, Numbers] | None:
    """What `save_checkpoint` wrote; None if there is none, or a damaged one, and says so."""
    reason = ranks.led(lambda: fault(path) if path.is_dir() else None)
    if reason is None:
        return None
    if reason:
        say(f"{path} is damaged and is not used: {reason}")
        return None
    return _load(path)


class Checkpoints:
    """The checkpoints of one stage, of which the last few stay.

    Args:
        ctx: the stage; its logs are flushed to the disk before a checkpoint that counts on them.
    """

    def __init__(self, ctx: StageContext) -> None:
        self._ctx, self._config = ctx, ctx.recipe.checkpoint
        self._folder = ctx.out / "checkpoints"
        self._damaged: set[int] = set()
        self._written_at = time.monotonic()
        self._clean()
        self.step = ranks.led(self._newest_whole)
        """Of the newest one that is whole; None: the stage starts afresh."""

    def read(self) -> tuple[Tensors, Numbers] | None:
        """The newest one that is whole; None if there is none."""
        return None if self.step is None else _load(self._path(self.step))

    def due(self) -> bool:
        """Whether the last one is `checkpoint.every_minutes` old."""
        every_s = 60 * self._config.every_minutes
        if not every_s:
            return False
        return ranks.told(every_s <= time.monotonic() - self._written_at)  # by rank 0's clock

    def write(self, step: int, tensors: Tensors, numbers: Numbers) -> None:
        """Add one and remove those that need not stay.

        Args:
            step: optimizer steps or updates that are done; a second one of a step replaces the
                first.
            tensors: by group and name.
            numbers: JSON-able.

        Raises:
            StorageError: the disk is full or not writable; the ones before are intact.
        """
        self._ctx.log.flush()
        save_checkpoint(self._path(step), tensors, numbers)
        self._damaged.discard(step)
        self.step, self._written_at = step, time.monotonic()
        if is_left_out(self._folder):
            return
        whole = [one for one in self._steps() if one <= step and one not in self._damaged]
        for other in set(self._steps()) - set(whole[-self._config.keep_last :]):
            self._remove(self._path(other))
        self._ctx.publish()

    def _newest_whole(self) -> int | None:
        for step in reversed(self._steps()):
            reason = fault(self._path(step))
            if not reason:
                return step
            self._damaged.add(step)
            self._say(f"checkpoint {self._path(step).name} is damaged and is not used: {reason}")
        if self._damaged:
            self._say("no checkpoint is whole: starts afresh")
        elif self._folder.is_dir():
            self._say("no checkpoint was written yet: training starts afresh")
        return None

    def _remove(self, path: Path) -> None:
        """Out of sight first, so that a kill leaves no half of it under its name."""
        hidden = path.with_name(f".{path.name}.removed")
        with storage_errors(path):
            path.replace(hidden)
            shutil.rmtree(hidden)

    def _clean(self) -> None:
        """What a kill has left of a checkpoint that was being written, replaced or removed."""
        if is_left_out(self._folder):
            return
        with storage_errors(self._folder):
            for path in self._folder.glob(".*"):
                replaced = path.with_name(path.stem.removeprefix("."))
                if path.suffix == ".old" and not replaced.exists():
                    path.replace(replaced)
                elif path.is_dir():
                    shutil.rmtree(path)

    def _steps(self) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self._folder.glob("step-*"))
        return sorted(int(name[1]) for name in found if name)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _say(self, text: str) -> None:
        self._ctx.progress.say(f"{self._ctx.stage}: {text}")


def restored(where: str, tensors: Tensors, others: str, nothing_left: bool) -> str:
    """What the user reads when a stage goes on.

    Args:
        where: `sft: step 3 of 10`.
        tensors: that came back.
        others: what came back beside them.
        nothing_left: training is over, and only what follows is done.
    """
    parts = ", ".join(name.replace("_", " ") for name in sorted(tensors))
    end = "; nothing is left to train" if nothing_left else ""
    return f"{where} restored: {parts}, {others}{end}"


def newest_folder(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest number, whose hashes nobody has looked at."""
    found = [path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def _load(path: Path) -> tuple[Tensors, Numbers]:
    numbers: Numbers = read_json(path / "numbers.json")
    return {name: load_file(path / f"{name}.safetensors") for name in numbers["tensors"]}, numbers


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
