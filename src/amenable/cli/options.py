"""Options that several commands share."""

from __future__ import annotations

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
