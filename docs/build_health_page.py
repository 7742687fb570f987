"""Writes the table of rules into docs/health.md from the rules themselves.

python docs/build_health_page.py            writes the table
python docs/build_health_page.py --check    exit code 1 where the page is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from amenable.health.rules import RULES

PAGE = Path(__file__).parent / "health.md"
START, END = "## The rules\n", "## How often they are right\n"


def table() -> str:
    """The rules as Markdown."""
    rows = [
        "| rule | level | stages | speaks when | usually means | try | threshold from |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rule in RULES:
        cells = [
            f"`{rule.id}`",
            rule.level,
            ", ".join(rule.stages),
            rule.formula,
            rule.means,
            rule.remedy,
            rule.source,
        ]
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def page(now: str) -> str:
    """The whole page with a table of today."""
    before, rest = now.split(START, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{START}\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    now = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(page(now) != now and "docs/health.md is out of date: run this script")
    PAGE.write_text(page(now), encoding="utf-8")
