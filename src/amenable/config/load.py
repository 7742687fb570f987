"""TOML and dotted overrides -> Recipe, strictly; and back, with every value written out.

An unknown key, a mistyped value or a contradiction is an error that names file, key and remedy.
Relative data paths are meant from the current directory, as on a command line, not from the
recipe's folder.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import textwrap
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from amenable.config.checks import check_recipe
from amenable.config.recipe import Recipe
from amenable.errors import RecipeError
from amenable.masking import shown_name, shown_value, without_secrets

T = TypeVar("T")

SCHEMA_VERSION = 1

_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}


@dataclass(frozen=True)
class RecipeKey:
    """One key of the recipe, as help and documentation show it."""

    key: str
    """Dotted, as in `--set policy.updates=50`; `a.b[].c` is a key of every section [[a.b]]."""

    type_text: str
    """What a value may be."""

    default: object
    """The value when the recipe does not say."""

    help: str
    """The string under the field."""


def load_recipe(path: Path | str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies overrides on top of it.

    Args:
        path: a TOML file; None starts from the defaults.
        overrides: `a.b=c` texts; `c` is a TOML value or, where text is wanted, bare text.

    Raises:
        RecipeError: no such file, no TOML, an unknown key, a mistyped value or a contradiction.
    """
    where = "--set" if path is None else str(path)
    table = {} if path is None else _read_toml(Path(path))
    _check_version(table, where)
    for override in overrides:
        _apply_override(table, override)
    recipe: Recipe = _build(Recipe, table, where, ())
    check_recipe(recipe, where)
    return recipe


def build_section(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """One section from plain values, under the same rules as in a recipe.

    Raises:
        RecipeError: an unknown key or a mistyped value; `where` begins its message.
    """
    section: T = _build(cls, values, where, ())
    return section


def recipe_beside(model: Path | str) -> Recipe:
    """The recipe of the run that a model folder belongs to, or the defaults."""
    if isinstance(model, Path) and model.resolve().parent.name == "models":
        path = model.resolve().parents[1] / "recipe.toml"
        if path.exists():
            return load_recipe(path)
    return Recipe()


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every value, defaults included; `load_recipe` reads it back equal."""
    import tomli_w

    return tomli_w.dumps(recipe_to_dict(recipe))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts of TOML's own types; tuples become lists."""
    table: dict[str, Any] = _lists(asdict(recipe))
    return table


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value under its dotted key, in the order of the dataclasses.

    A list of sections is one value, a list of dicts.
    """
    return dict(_flatten(recipe_to_dict(recipe), ""))


def recipe_keys() -> list[RecipeKey]:
    """Every key that a recipe may hold, with type, default and help."""
    return list(_describe(Recipe, Recipe(), ""))


def listed_section(cls: Any, name: str) -> Any:
    """The section of which a field is a list, [[like.this]]; None where it is no such list."""
    return _listed(_hints(cls)[name])


@cache
def field_help(cls: type) -> dict[str, str]:
    """The string under each field of a config dataclass, by field name.

    Those that it inherits come first. Source order is kept; a field without such a string is left
    out.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for parent in cls.__bases__:
        found |= field_help(parent) if is_dataclass(parent) else {}
    for field_node, text_node in zip(body.body, body.body[1:], strict=False):
        match field_node, text_node:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = inspect.cleandoc(text)
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        remedy = f"give a path from the current directory, {Path.cwd()}"
        raise RecipeError(f"{path}: no such recipe file; {remedy}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: this is a folder; name the .toml file in it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no valid TOML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error


def _check_version(table: Mapping[str, Any], where: str) -> None:
    version = table.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise RecipeError(
            f"{where}: schema_version: {shown_value(version)!r} is unknown; this Amenable reads"
            f" version {SCHEMA_VERSION}: set schema_version = {SCHEMA_VERSION} and check the keys,"
            " or install the Amenable that wrote the recipe"
        )


def _apply_override(table: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = _key_parts(dotted.strip())
    shown = without_secrets(f"{dotted}{equals}{shown_name(text)}")
    if not equals or not keys or isinstance(keys[-1], int):
        example = "--set policy.updates=50"
        raise RecipeError(f"--set {shown!r}: no KEY=VALUE; write for example {example}")
    wanted = _field_type(keys)
    inner: Any = table
    for depth, key in enumerate(keys[:-1], start=1):
        inner = _inner(inner, key, _field_type(keys[:depth]), shown)
    last = keys[-1]
    if not isinstance(inner, dict):
        raise RecipeError(_no_section(shown, str(keys[-2]), inner))
    value = _parse_value(text.strip())
    value = text.strip() if wanted is str and not isinstance(value, str) else value
    if isinstance(inner.get(last), dict):
        value = {**inner[last], **_section(value, wanted)} if _short(wanted) else value
    inner[last] = value


def _key_parts(dotted: str) -> list[str | int]:
    """`a.b[0].c` as its names and numbers; empty where it is no such key."""
    parts: list[str | int] = []
    for part in dotted.split("."):
        found = re.fullmatch(r"([\w-]+)(?:\[(\d+)\])?", part)
        if found is None:
            return []
        parts += [found[1], int(found[2])] if found[2] else [found[1]]
    return parts


def _inner(outer: Any, key: str | int, wanted: Any, shown: str) -> Any:
    """The section, or list of sections, under `key`; put there where it is not yet."""
    if isinstance(key, int):
        if wanted is None or not isinstance(outer, list):
            raise RecipeError(f"--set {shown!r}: [{key}] must follow a list of sections")
        if key > len(outer):
            raise RecipeError(f"--set {shown!r}: the recipe has {len(outer)} such, from [0] on")
        if key == len(outer):
            outer.append({})
        found = outer[key]
    else:
        if not isinstance(outer, dict):
            raise RecipeError(_no_section(shown, key, outer))
        found = _section(outer.get(key, [] if _listed(wanted) else {}), wanted)
        outer[key] = found
    if not isinstance(found, dict | list):
        raise RecipeError(_no_section(shown, str(key), found))
    return found


def _no_section(shown: str, key: str, found: Any) -> str:
    if isinstance(found, list):
        return f"--set {shown!r}: say which of the sections is meant: [0] is the first"
    return f"--set {shown!r}: {key} is a value in the recipe, not a section"


def _short(cls: Any) -> str:
    """The field that a value in place of a whole section is meant for; empty: none."""
    return getattr(cls, "shorthand", "")


def _section(value: Any, cls: Any) -> Any:
    """The value as a section, where the section can be given by one of its fields alone."""
    return {_short(cls): value} if _short(cls) and not isinstance(value, dict) else value


def _parse_value(text: str) -> Any:
    """`text` as a TOML value, or as it stands if it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _field_type(keys: Sequence[str | int]) -> Any:
    """The type of the field with this key; None for an unknown one."""
    current: Any = Recipe
    for key in keys:
        if isinstance(key, int):
            current = _listed(current)
        elif is_dataclass(current):
            current = _hints(current).get(key)
        else:
            return None
    return current


def _listed(wanted: Any) -> Any:
    """The section of which `wanted` is a list, [[like.this]]; None where it is no such list."""
    inner = typing.get_args(wanted)[:1] if typing.get_origin(wanted) is tuple else ()
    return inner[0] if inner and is_dataclass(inner[0]) else None


def _build(cls: Any, table: Mapping[str, Any], where: str, prefix: tuple[str, ...]) -> Any:
    hints = _hints(cls)
    for key in table:
        if key not in hints:
            raise RecipeError(_unknown_key(where, (*prefix, key)))
    return cls(
        **{key: _value(hints[key], value, where, (*prefix, key)) for key, value in table.items()}
    )


def _hints(cls: Any) -> dict[str, Any]:
    return _cached_hints(cls)


@cache
def _cached_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in fields(cls)}


def _value(wanted: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    """`value` as the type `wanted`, or a RecipeError."""
    if is_dataclass(wanted):
        value = _section(value, wanted)
        if not isinstance(value, dict):
            raise _mistyped(where, path, value, f"a section, [{'.'.join(path)}]")
        return _build(wanted, value, where, path)
    if typing.get_origin(wanted) is Literal:
        return _choice(typing.get_args(wanted), value, where, path)
    if section := _listed(wanted):
        return _sections(section, value, where, path)
    if typing.get_origin(wanted) is tuple:
        return _strings(value, where, path)
    return _scalar(wanted, value, where, path)


def _sections(cls: Any, value: Any, where: str, path: tuple[str, ...]) -> tuple[Any, ...]:
    """A list of sections; a single one is taken as a list of one."""
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _mistyped(where, path, value, f"a list of sections, [[{'.'.join(path)}]]")
    return tuple(
        _build(cls, item, where, (*path[:-1], f"{path[-1]}[{number}]"))
        for number, item in enumerate(items)
    )


def _scalar(wanted: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise _mistyped(where, path, value, _TYPE_WORDS[wanted])
    if wanted is float and not math.isfinite(value):
        raise _mistyped(where, path, value, "a finite number")
    return value


def _choice(choices: tuple[Any, ...], value: Any, where: str, path: tuple[str, ...]) -> Any:
    if type(value) is str and value in choices:
        return value
    raise _mistyped(where, path, value, _choice_text(choices))


def _strings(value: Any, where: str, path: tuple[str, ...]) -> tuple[str, ...]:
    """A list of texts; a single text is taken as a list of one."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _mistyped(where, path, value, 'a text or a list of texts, ["a.jsonl", "b.jsonl"]')
    return tuple(items)


def _mistyped(where: str, path: Sequence[str], value: object, wanted: str) -> RecipeError:
    return RecipeError(f"{where}: {'.'.join(path)}: must be {wanted}, not {shown_value(value)!r}")


def _unknown_key(where: str, path: tuple[str, ...]) -> str:
    """The message for a key that no dataclass has, with the nearest one that exists."""
    dotted = re.sub(r"\[\d+\]", "[]", ".".join(path))
    numbers = re.findall(r"\[\d+\]", ".".join(path))
    known = [entry.key for entry in recipe_keys()]
    sections = sorted({key.rsplit(".", 1)[0] for key in known if "." in key})
    near = difflib.get_close_matches(dotted, known + sections, n=1, cutoff=0.6)
    near = near or [key for key in known if key.rsplit(".", 1)[-1] == path[-1]][:1]
    nearest = near[0].replace("[]", numbers[0]) if near and numbers else "".join(near)
    hint = f"did you mean {nearest}?" if near else "remove it"
    shown = ".".join(map(shown_name, path))
    return f"{where}: {shown}: unknown key; {hint} `amenable run --keys` lists every key."


def _describe(cls: Any, default: Any, prefix: str) -> Iterator[RecipeKey]:
    texts = field_help(cls)
    for entry in fields(cls):
        key, value = prefix + entry.name, getattr(default, entry.name)
        if is_dataclass(value):
            yield from _describe(type(value), value, f"{key}.")
        else:
            wanted, section = _hints(cls)[entry.name], _listed(_hints(cls)[entry.name])
            type_text = f"a list of sections, [[{key}]]" if section else _type_text(wanted)
            yield RecipeKey(key, type_text, _lists(value), texts.get(entry.name, ""))
            if section:
                yield from _describe(section, section(), f"{key}[].")


def _type_text(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return _choice_text(typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        return "a list of texts"
    return _TYPE_WORDS[wanted]


def _choice_text(choices: tuple[Any, ...]) -> str:
    return " or ".join(f'"{choice}"' for choice in choices)


def _flatten(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lists(value: Any) -> Any:
    match value:
        case dict():
            return {key: _lists(inner) for key, inner in value.items()}
        case tuple() | list():
            return [_lists(inner) for inner in value]
    return value
