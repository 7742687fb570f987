"""What a machine can hold and compute: a table of accelerators, and the machine at hand.

FLOP/s are dense bfloat16 with float32 accumulation, memory in GiB as the makers mean their GB,
bandwidth of the card's memory. Sources: NVIDIA's data sheets of RTX 4090 (Ada whitepaper v2.1,
appendix A), A100 80GB SXM, H100 SXM and H200 SXM, L4.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from amenable.errors import UsageError
from amenable.models.load import resolve_dtype
from amenable.pipeline.manifest import available_cores

_GIB = 2**30
_CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")
_CORE_FP32, _CORE_BF16 = 60e9, 300e9  # a core with AVX-512 or AVX2; with AMX
_CORE_BANDWIDTH = 10e9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where a run would take place."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    """Of one card, or that this process may use."""
    flops: float
    """Matrix products a second of one card, or of all cores, in the run's precision."""
    bandwidth: float
    """Bytes a second of one card's memory."""
    cards: int = 1

    def dtype(self, name: str) -> torch.dtype:
        """The compute precision that `model.dtype` means here."""
        if self.kind == "cuda" and name == "auto":
            return torch.bfloat16
        return resolve_dtype(name)


def _card(name: str, gib: float, teraflops: float, gb_s: float) -> Hardware:
    return Hardware(
        name=name,
        kind="cuda",
        memory_bytes=int(gib * _GIB),
        flops=teraflops * 1e12,
        bandwidth=gb_s * 1e9,
    )


CARDS = {
    card.name: card
    for card in (
        _card("l4", 24, 121, 300),
        _card("rtx4090", 24, 165, 1008),
        _card("a100", 80, 312, 2039),
        _card("h100", 80, 989, 3350),
        _card("h200", 141, 989, 4800),
    )
}


def hardware(name: str = "") -> Hardware:
    """The machine that a name means: empty for this one, `cpu`, a card, or `8xh100` and the like.

    Raises:
        UsageError: no such name.
    """
    if not name:
        return _own_card() or _own_cores()
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", name.lower())
    count, kind = (found[1], found[2]) if found else (None, name)
    if kind == "cpu" and count is None:
        return _own_cores()
    if kind not in CARDS:
        raise UsageError(
            f"--hardware {name!r} is unknown; take cpu, {', '.join(CARDS)}, or several cards as in "
            "8xh100"
        )
    return replace(CARDS[kind], name=name.lower(), cards=int(count or 1))


def memory_limit() -> int:
    """Bytes that this process may use: the machine's memory, or its control group's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUPS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(limits)


def resident_bytes() -> int:
    """What this process takes now; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _own_cores() -> Hardware:
    cores = available_cores()
    fast = resolve_dtype("auto") is torch.bfloat16
    return Hardware(
        name="cpu",
        kind="cpu",
        memory_bytes=memory_limit(),
        flops=cores * (_CORE_BF16 if fast else _CORE_FP32),
        bandwidth=cores * _CORE_BANDWIDTH,
    )


def _own_card() -> Hardware | None:
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    words = set(re.split(r"[^a-z0-9]+", facts.name.lower().replace("rtx ", "rtx")))
    like = next((card for name, card in CARDS.items() if name in words), CARDS["l4"])
    return replace(like, name=facts.name, memory_bytes=int(facts.total_memory))
