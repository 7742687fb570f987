"""Is a run healthy? Rules that read its figures, while it runs and afterwards."""

from amenable.health.rules import RULES, Finding, Rule
from amenable.health.watch import Watch, check_rows

__all__ = ["RULES", "Finding", "Rule", "Watch", "check_rows"]
