"""Memory that training frees is kept for the next step.

A step allocates and frees the same few gigabytes again and again. The C library of Linux gives
large blocks back to the system at once, and every block asked for anew has to be filled with zeros
and mapped, page by page: on a virtual machine that can cost more than the arithmetic done in it.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_MMAP, _LARGEST_FREE = 2**30, 2**31 - 1  # bytes
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let malloc keep blocks of up to 1 GiB, and up to 2 GiB that are free at its end.

    Returns:
        Whether it does: only with glibc, and not where the environment sets it up already.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    kept = mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP), mallopt(_TRIM_THRESHOLD, _LARGEST_FREE)
    return kept == (1, 1)
