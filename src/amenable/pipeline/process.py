"""Keeps freed memory in the process, in large pages.

Training on a CPU allocates and frees the same large tensors at every step. glibc gives each
back to the kernel and asks for zeroed pages again; on a small virtual machine first steps
took hundreds of thousands of page faults (docs/log.md). Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = 2**31 - 1
_STEP_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Tell malloc to hold on to freed memory, and torch to ask for huge pages.

    Must run before torch is imported to have its whole effect. User settings in the
    environment win.

    Returns:
        Whether malloc took the settings.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux") or any(
        name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ
    ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, _STEP_BYTES),
        (_M_ARENA_MAX, 1),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)
