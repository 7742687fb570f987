"""Where the example recipes are: beside the package in a wheel, at the root of a checkout."""

from __future__ import annotations

from pathlib import Path

from amenable.errors import UsageError

_PACKAGE = Path(__file__).parent


def example(name: str) -> Path:
    """The path of an example recipe.

    Raises:
        UsageError: this installation has none of that name.
    """
    for folder in (_PACKAGE / "examples", _PACKAGE.parents[1] / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"examples/{name} is missing from this installation; install Amenable again")
