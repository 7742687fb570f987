"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key; may be repeated."),
]
Out = Annotated[
    str | None, typer.Option("--out", metavar="DIR|URL", help="The run folder; also s3://….")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Short for --set seed=N.")]
MaxMinutes = Annotated[
    float | None,
    typer.Option("--max-minutes", metavar="N", help="End well inside N minutes, complete."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ray[://ADDRESS]",
        help="On the Ray cluster at ADDRESS, or on one that is started on this machine.",
    ),
]


def on_this_machine(out: str, kind: str = "folder") -> Path:
    """The path of an --out that takes no URL.

    Raises:
        UsageError: it is one.
    """
    from amenable.errors import UsageError
    from amenable.pipeline.mirror import place

    found = place(out)
    if isinstance(found, str):
        raise UsageError(
            f"--out: takes a {kind} on this machine, no URL; copy it to the store afterwards"
        )
    return found
