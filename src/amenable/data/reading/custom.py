"""A reader function of the user's own: `file.py:function`, for a shape that no format covers.

It is given the records of one file, as dictionaries, one after the other, and yields native rows,
as dictionaries; or `Drop(reason)`, where it leaves something out on purpose. It may join, flatten
and vote. What it yields is checked like any other row.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from amenable.data.reading.json_records import Json
from amenable.data.reading.read_log import shown
from amenable.data.reading.records import Row
from amenable.data.reading.table_records import _NotJson, plain
from amenable.data.schemas import Drop
from amenable.errors import AmenableError, DataError, RecipeError

Reader = Callable[[Iterable[Json]], Iterable[Json | Drop]]
"""The records of one file in, native rows out."""


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function that a recipe key other than a reader names, in the same two ways.

    Raises:
        RecipeError: there is no such function; names the key.
    """
    try:
        return load_reader(name)
    except RecipeError as error:
        reason = str(error).removeprefix("reader: ").removeprefix(f"{name}: ")
        raise RecipeError(f"{key} = {name!r}: {reason}") from error


def load_reader(name: str) -> Reader:
    """The function of `path/to/file.py:function` or of `module:function`.

    A path is taken from the current directory; a module is looked for there, too, as by
    `python -m`.

    Raises:
        RecipeError: there is no such file, module or function.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise RecipeError(f"reader: {name!r} is no file and function; write my_readers.py:pairs")
    module = _from_file(place, name) if place.endswith(".py") else _imported(place, name)
    found = getattr(module, function, None)
    if not callable(found):
        raise RecipeError(f"reader: {name}: there is no function {function} in {place}")
    if isinstance(found, type):
        raise RecipeError(f"reader: {name}: {function} is a class; name a function")
    reader: Reader = found
    return reader


def _from_file(place: str, name: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise RecipeError(f"reader: {name}: there is no file {path}; correct the path")
    # Under a name of its own: a reader called json.py must not hide the library's module.
    module_name = f"_reader_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their own module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that is run ends by itself
        raise RecipeError(f"reader: {name}: cannot be loaded ({_told(error)})") from error
    return module


def _imported(place: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"reader: {name}: {place} cannot be imported ({_told(error)}); name its file "
            f"instead: path/to/{place.rpartition('.')[2]}.py:{name.rpartition(':')[2]}"
        ) from error


def rows(records: Iterator[Row], name: str, path: str) -> Iterator[Row]:
    """The native rows that the reader makes, each placed where its last record stands.

    Args:
        records: of one file.
        name: of the reader, as in a recipe.
        path: the file, as it is shown.

    Raises:
        DataError: the function failed, or yielded what is no row; names the file, and the line of
            the last record that it took.
    """
    reader, seen = load_reader(name), _Seen(records, path)
    try:
        made = reader(seen.values())
        if isinstance(made, dict | str) or not isinstance(made, Iterable):
            raise DataError(
                f"the reader {name} returned {_what(made)}; expected rows: `yield` each, or return "
                "a list of them",
                path=path,
            )
        yield from _placed(iter(made), seen, name)
    except AmenableError:
        raise
    except (Exception, SystemExit) as error:
        raise seen.fault(f"the reader {name} failed: {_told(error)}") from error


class _Seen:
    """Passes records on and remembers the last."""

    def __init__(self, records: Iterator[Row], path: str) -> None:
        self._records, self._path = records, path
        self.last: Row | None = None
        self.made = 0

    def fault(self, message: str) -> DataError:
        """An error that names the file, and the line of the last record."""
        if self.last is None:
            return DataError(message, path=self._path)
        return self.last.fault(None, message)

    def values(self) -> Iterator[Json]:
        for row in self._records:
            self.last, self.made = row, 0
            yield row.values


def _placed(made: Iterator[Json | Drop], seen: _Seen, name: str) -> Iterator[Row]:
    for item in made:
        if seen.last is None:
            raise seen.fault(f"the reader {name} yielded a row before it took a record")
        if isinstance(item, Drop):
            seen.last.log.drop(item.reason)
            continue
        if not isinstance(item, dict):
            raise seen.fault(
                f'the reader {name} yielded {_what(item)}; expected a dictionary or Drop("reason")'
            )
        seen.made += 1
        values = {key: _plain(value, key, seen, name) for key, value in item.items()}
        if seen.made > 1 and values.get("id") is None:
            values["id"] = f"{seen.last.label}:{seen.last.line}.{seen.made}"
        yield replace(seen.last, values=values)


def _plain(value: object, key: object, seen: _Seen, name: str) -> object:
    """The value in JSON's types; what is none is a fault."""
    assert seen.last is not None
    if not isinstance(key, str):
        raise seen.fault(f"the reader {name} yielded the key {key!r}; expected texts as keys")
    try:
        return plain(value, seen.last.log.coerce)
    except _NotJson as error:
        raise seen.last.fault(
            key, f"the reader {name}: {error}; make it one of JSON's types"
        ) from (error)


def _what(value: object) -> str:
    """The value, if JSON has such, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | int | float | list | dict):
        return shown(value)
    return f"a {type(value).__name__}"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
