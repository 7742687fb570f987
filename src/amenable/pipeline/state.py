"""What is known of one stage in one run folder: `stages/STAGE/state.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from amenable.artifacts import Json, RunFolder, read_json, write_json
from amenable.errors import AmenableError

Status = Literal["running", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class StageState:
    """Written before a stage starts and after it ended, last of all its files."""

    fingerprint: str
    """Hash of `ingredients`."""

    status: Status
    """`running` as well after a kill."""

    ingredients: dict[str, str] = field(default_factory=dict)
    """What the stage depends on, to say why it runs again."""

    wall_s: float | None = None
    """Seconds of the attempt that ended."""

    peak_rss_gb: float | None = None
    """Highest resident memory during that attempt, 1e9 bytes."""

    summary: Any = None
    """Its section of summary.json."""

    health: list[Json] = field(default_factory=list)
    """Its rows of summary.json's `health`."""

    outputs: dict[str, str] = field(default_factory=dict)
    """Path in the run folder -> SHA-256, of every artifact."""

    shortened: bool = False
    """A time budget ended it early."""

    error: str = ""
    """Why it failed."""

    @property
    def done(self) -> bool:
        """True when its outputs are whole."""
        return self.status == "done"


def read_state(folder: RunFolder, stage: str) -> StageState | None:
    """The stage's state; None when there is none that can be read."""
    known = {entry.name for entry in fields(StageState)}
    try:
        values = read_json(folder.state_path(stage))
        return StageState(**{key: value for key, value in values.items() if key in known})
    except (AmenableError, TypeError, AttributeError):
        return None


def write_state(folder: RunFolder, stage: str, state: StageState) -> None:
    """Writes the stage's state, atomically."""
    write_json(folder.state_path(stage), asdict(state))
