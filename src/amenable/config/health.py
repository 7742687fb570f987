"""What is done about a run that looks unhealthy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Rules that read the figures while a stage runs (docs/health.md); a message each."""

    stop_on: tuple[str, ...] = ()
    """Rules that end the stage when they speak; `errors` names all that are errors. The last
    checkpoint stays."""

    off: tuple[str, ...] = ()
    """Rules that are not asked."""
