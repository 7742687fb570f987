"""Peak resident memory of a stretch of work."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
_GB = 1e9


def start_peak() -> None:
    """Sets the process's high-water mark back to what is resident now.

    Linux can; elsewhere the mark stays, so that `peak_gb` bounds a later stage from above.
    """
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_gb() -> float:
    """Highest resident memory since `start_peak`, in GB (1e9 bytes)."""
    return round((_high_water_bytes() or _lifetime_peak_bytes()) / _GB, 3)


def _high_water_bytes() -> int:
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _lifetime_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
