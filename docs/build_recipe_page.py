"""Writes docs/recipe.md from the recipe's own dataclasses: each key with range, default, help.

    python docs/build_recipe_page.py            writes the page
    python docs/build_recipe_page.py --check    exit code 1 where the page is out of date

Run it after a change in `amenable/config/`; a test compares the page with what this script makes.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from amenable.config.checks import RANGES, Range
from amenable.config.load import RecipeKey, listed_section, recipe_keys
from amenable.config.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"

HEAD = """\
# The recipe

<!-- Made by docs/build_recipe_page.py from amenable/config/. Do not edit: change the help text
under the field and run the script again. -->

A recipe is a TOML file. What it leaves out has the default below; what it misspells is refused,
with the nearest key that exists. The resolved recipe, every value written out, is kept in the run
folder as `recipe.toml`.

```
amenable run recipe.toml --set policy.updates=50 --set data.prompts=more.jsonl
amenable run --keys            # this page in the terminal; --json for programs
```

After `--set` stands a TOML value; a text may go without quotes. `--seed N` is short for
`--set seed=N`. Data paths are meant from the current directory, not from the recipe's folder. One
text stands for a list of one.

Some values must fit together; a recipe that breaks one of these rules is refused before anything
is loaded:

- `name` can name a folder, and `model.base` is not empty;
- `model.quantise` goes with `model.lora.enabled` alone;
- with `data.task = "files"` at least one of `data.prompts`, `data.preferences` and
  `data.demonstrations` is named; with `"docstrings"` of the four kinds only `data.preferences` is;
- a policy stage has a reward: `reward.enabled`, or a ready `policy.reward`;
- a reward model has pairs: `data.preferences`, or a `collect.annotator`;
- `policy.top_p` is 1 and `policy.top_k` is 0: the behaviour policy is the one that is
  differentiated;
- `policy.minibatches` divides `policy.prompts_per_update` × `policy.samples_per_prompt`;
- `evaluate.best_of` is 0 or at least 2;
- `kfp.image` is not empty, `kfp.mount` is a path from `/` on, `kfp.memory` and `kfp.cpu` are
  amounts as Kubernetes has them.
"""


def page() -> str:
    """The page as Markdown."""
    keys = {key.key: key for key in recipe_keys()}
    return HEAD + "".join(_section(Recipe, Recipe(), "", keys))


def _section(cls: Any, default: Any, prefix: str, keys: dict[str, RecipeKey]) -> list[str]:
    """The parts of the page for a section and those inside it, in the dataclass's order."""
    own = [keys[prefix + field.name] for field in fields(cls) if prefix + field.name in keys]
    summary = " ".join((cls.__doc__ or "").split())
    parts = [f"\n## {_title(prefix)}\n\n{summary}\n\n{_table(own, prefix)}"]
    for field in fields(cls):
        value, place = getattr(default, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            parts += _section(type(value), value, f"{place}.", keys)
        elif listed := listed_section(cls, field.name):
            parts += _section(listed, listed(), f"{place}[].", keys)
    return parts


def _title(prefix: str) -> str:
    """The section as TOML has it; `a.b[].` is a list of sections."""
    if not prefix:
        return "Top level"
    place = prefix.removesuffix(".")
    return f"[[{place[:-2]}]]" if place.endswith("[]") else f"[{place}]"


def _table(keys: list[RecipeKey], prefix: str) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        name = key.key.removeprefix(prefix)
        cells = (f"`{name}`", _value(key), f"`{_toml(key.default)}`", " ".join(key.help.split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _value(key: RecipeKey) -> str:
    """What the key may hold, its range behind it."""
    kind = key.type_text.removeprefix("a ").removesuffix(" in quotes")
    kind = re.sub(r'("[^"]+")', r"`\1`", kind)
    allowed = RANGES.get(key.key)
    return f"{kind}, {_range(allowed)}" if allowed else kind


def _range(allowed: Range) -> str:
    low = f"{'above ' if allowed.above else ''}{allowed.low:.12g}"
    if allowed.high == math.inf:
        return low if allowed.above else f"{low} or more"
    return f"{low}{', up' if allowed.above else ''} to {allowed.high:.12g}"


def _toml(value: object) -> str:
    """A default as it would stand in the recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float):
        return f"{value:g}" if "e" in repr(value) or value >= 1e6 else repr(value)
    return str(value)


def main() -> int:
    """Writes the page, or checks it; returns the exit code."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is out of date; run: python docs/build_recipe_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
