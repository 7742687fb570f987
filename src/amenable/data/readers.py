"""Files to typed rows: strict, streaming, one clear error for the first fault.

The native keys, one JSON object a line, `.jsonl` or `.jsonl.gz`:

    demonstration   input_text, output_text
    preference      input_text, candidate_0, candidate_1, choice (0, 1 or "tie");
                    optional weight, margin, annotator, strength (1 … 9, must agree with choice)
    prompt          input_text

Each kind may have `id` and `group`, and may have `messages` (a list of {role or author, content},
the user's last; optional `context`, which becomes the system message) in place of `input_text`.
Nothing is lost: every other key of the row, `meta` among them, stays in `Prompt.meta` under its own
name, and `*_to_row` puts it back at the top level. Coercions, all of them: empty lines are skipped;
a byte order mark at the start is ignored; an optional key that is null counts as absent; a whole
number as `id`, `group` or `annotator` becomes its text; of a message only speaker and content are
read.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import msgspec

from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.errors import DataError

Json = dict[str, Any]
T = TypeVar("T")

ENDINGS = (".jsonl", ".jsonl.gz")
"""Names of files that can be read."""

SPEAKERS = {speaker.value: speaker for speaker in Speaker}

_PROMPT_KEYS = frozenset({"id", "group", "input_text", "messages", "context"})
_DEMONSTRATION_KEYS = _PROMPT_KEYS | {"output_text"}
_PREFERENCE_KEYS = _PROMPT_KEYS | {
    "candidate_0",
    "candidate_1",
    "choice",
    "weight",
    "margin",
    "annotator",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded line and where it stands; its methods check one key each."""

    values: Json
    path: Path
    line: int
    label: str
    """What default ids of this file begin with."""

    def fault(self, field: str | None, message: str) -> DataError:
        """An error that names file, line and field."""
        return DataError(message, path=self.path, line=self.line, field=field)

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """A needed text; refuses a missing, mistyped or (unless allowed) blank one."""
        if key not in self.values:
            raise self.fault(
                key,
                f"is missing; the row has {_names(self.values)}; add {key!r} or rename its column",
            )
        value = self.values[key]
        if not isinstance(value, str):
            raise self.fault(key, f"found {_shown(value)}; expected a text in quotes")
        if not (may_be_empty or value.strip()):
            raise self.fault(key, "is empty; write its text or remove the row")
        return value

    def name(self, key: str) -> str | None:
        """An optional name: a text, or a whole number read as its text."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.fault(
                key,
                f"found {_shown(value)}; expected a text or a whole number; correct or remove it",
            )
        return str(value)

    def number(self, key: str, *, above_zero: bool) -> float | None:
        """An optional finite number, at least 0 or above it."""
        value = self.values.get(key)
        if value is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        if not fits or value < 0 or (above_zero and value == 0):
            wanted = "above 0" if above_zero else "of 0 or more"
            raise self.fault(
                key, f"found {_shown(value)}; expected a number {wanted}; correct or remove it"
            )
        return float(value)


def read_demonstrations(paths: Sequence[str | Path]) -> list[Demonstration]:
    """Rows of `input_text` and `output_text`, in the order of files and lines.

    Raises:
        DataError: a file is missing, unreadable or empty, or a row is faulty; names file, line,
            field and remedy.
    """
    return _read(paths, _demonstration, lambda row: row.prompt)


def read_preferences(paths: Sequence[str | Path], *, allow_empty: bool = False) -> list[Preference]:
    """Rows of two candidates and a choice, in the order of files and lines.

    `strength` is checked and stays in `prompt.meta`.

    Args:
        paths: files to read.
        allow_empty: accept blank candidates: a model can answer nothing, a data file should not.

    Raises:
        DataError: a file is missing, unreadable or empty, or a row is faulty; names file, line,
            field and remedy.
    """
    return _read(paths, lambda row: _preference(row, allow_empty), lambda row: row.prompt)


def read_prompts(paths: Sequence[str | Path]) -> list[Prompt]:
    """Rows of `input_text`, in the order of files and lines; an `output_text` stays in `meta`.

    Raises:
        DataError: a file is missing, unreadable or empty, or a row is faulty; names file, line,
            field and remedy.
    """
    return _read(paths, lambda row: _prompt(row, _PROMPT_KEYS), lambda prompt: prompt)


def prompt_to_row(prompt: Prompt) -> Json:
    """The row that `read_prompts` reads back as an equal prompt, `meta` at the top level.

    Raises:
        DataError: `meta` has a key that the row needs for itself.
    """
    return _row(prompt, _PROMPT_KEYS, {})


def demonstration_to_row(demonstration: Demonstration) -> Json:
    """The row that `read_demonstrations` reads back as an equal demonstration.

    Raises:
        DataError: `prompt.meta` has a key that the row needs for itself.
    """
    return _row(
        demonstration.prompt, _DEMONSTRATION_KEYS, {"output_text": demonstration.output_text}
    )


def preference_to_row(preference: Preference) -> Json:
    """The row that `read_preferences` reads back as an equal preference.

    A `strength` of a preference whose sides were swapped is turned round with them.

    Raises:
        DataError: `prompt.meta` has a key that the row needs for itself.
    """
    optional = {"margin": preference.margin, "annotator": preference.annotator}
    row = _row(
        preference.prompt,
        _PREFERENCE_KEYS,
        {
            "candidate_0": preference.candidate_0,
            "candidate_1": preference.candidate_1,
            "choice": preference.choice.value,
            **({} if preference.weight == 1.0 else {"weight": preference.weight}),
            **{key: value for key, value in optional.items() if value is not None},
        },
    )
    strength = row.get("strength")
    if isinstance(strength, int) and _choice_of_strength(strength) is preference.choice.swapped():
        row["strength"] = 10 - strength
    return row


def prompt_key(prompt: Prompt) -> str:
    """The default group: 16 hexadecimal digits of what was asked.

    System message, case and white space apart.
    """
    return _key(prompt.messages)


def iter_rows(path: str | Path, label: str | None = None) -> Iterator[Row]:
    """The JSON objects of one file, one line in memory at a time.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file.
        label: what default ids begin with; None: the file's name without its ending.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or a line is not a JSON object.
    """
    path = Path(path).expanduser()
    label = label or _stem(path)
    with _open(path) as file:
        for line, raw in enumerate(_lines(file, path), 1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw and not raw.isspace():
                yield Row(_decode(raw, path, line), path, line, label)


def _read(
    paths: Sequence[str | Path], parse: Callable[[Row], T], prompt_of: Callable[[T], Prompt]
) -> list[T]:
    """Parses every row of every file; refuses an empty file and an id used twice."""
    parsed: list[T] = []
    places: dict[str, Row] = {}
    for path, label in _labelled(paths):
        before = len(parsed)
        for row in iter_rows(path, label):
            item = parse(row)
            name = prompt_of(item).id
            if name in places:
                first = places[name]
                raise row.fault(
                    "id",
                    f"{name!r} was used at {first.path}:{first.line}; give each row its own",
                )
            places[name] = row
            parsed.append(item)
        if len(parsed) == before:
            raise DataError(
                "the file has no rows; write one JSON object a line or leave it out", path=path
            )
    return parsed


def _labelled(paths: Sequence[str | Path]) -> Iterator[tuple[Path, str]]:
    """Each file with what its default ids begin with: its stem, numbered if two share one."""
    labels: set[str] = set()
    resolved: set[Path] = set()
    for number, path in enumerate(Path(path).expanduser() for path in paths):
        if path.resolve() in resolved:
            raise DataError("the file is given twice; name it once", path=path)
        resolved.add(path.resolve())
        label = _stem(path) if _stem(path) not in labels else f"{_stem(path)}#{number + 1}"
        labels.add(label)
        yield path, label


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _open(path: Path) -> IO[bytes]:
    if path.is_dir():
        raise DataError("is a folder; name the files in it", path=path)
    if not path.exists():
        raise DataError(
            f"there is no such file (looked in {path.parent.resolve()}); correct the path",
            path=path,
        )
    if not path.name.endswith(ENDINGS):
        raise DataError(
            f"cannot read this kind of file; expected a name ending in {' or '.join(ENDINGS)}",
            path=path,
        )
    try:
        return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot be opened ({error.strerror}); check its permissions", path=path
        ) from error


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines of the file; what stops the reading becomes a DataError that says where."""
    line = 0
    try:
        for line, raw in enumerate(file, 1):  # noqa: B007 - the count is for the message below
            yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"is not a whole gzip file ({error}); copy it again, or take .gz off its name",
            path=path,
            line=line + 1,
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror}); check the disk", path=path, line=line + 1
        ) from error


def _decode(raw: bytes, path: Path, line: int) -> Json:
    try:
        values = msgspec.json.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} is not UTF-8 (0x{raw[error.start]:02x}); save it as UTF-8",
            path=path,
            line=line,
        ) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(
            f"is not valid JSON ({error}): {_clip(raw.decode('utf-8').strip())}; write one whole "
            "JSON object a line",
            path=path,
            line=line,
        ) from error
    if not isinstance(values, dict):
        raise DataError(
            f"found {_shown(values)}; expected a JSON object in braces", path=path, line=line
        )
    return values


def _demonstration(row: Row) -> Demonstration:
    prompt = _prompt(row, _DEMONSTRATION_KEYS)
    return Demonstration(prompt=prompt, output_text=row.text("output_text"))


def _preference(row: Row, allow_empty: bool) -> Preference:
    prompt = _prompt(row, _PREFERENCE_KEYS)
    weight = row.number("weight", above_zero=True)
    return Preference(
        prompt=prompt,
        candidate_0=row.text("candidate_0", may_be_empty=allow_empty),
        candidate_1=row.text("candidate_1", may_be_empty=allow_empty),
        choice=_choice(row),
        weight=1.0 if weight is None else weight,
        margin=row.number("margin", above_zero=False),
        annotator=row.name("annotator"),
    )


def _prompt(row: Row, known: frozenset[str]) -> Prompt:
    messages = _messages(row)
    return Prompt(
        messages=messages,
        id=row.name("id") or f"{row.label}:{row.line}",
        group=row.name("group") or _key(messages),
        meta={key: value for key, value in row.values.items() if key not in known},
    )


def _messages(row: Row) -> tuple[Message, ...]:
    """`messages` behind `context`, or `input_text` as the one message of the user."""
    given = row.values.get("messages")
    if given is None:
        if row.values.get("context") is not None:
            raise row.fault(
                "context", "is read with messages only; put it into input_text or give messages"
            )
        return (Message(Speaker.USER, row.text("input_text")),)
    if row.values.get("input_text") is not None:
        raise row.fault("messages", "the row has input_text as well; keep one of the two")
    if not isinstance(given, list) or not given:
        raise row.fault(
            "messages", f"found {_shown(given)}; expected a list of {{role, content}} objects"
        )
    messages = [_message(row, number, value) for number, value in enumerate(given)]
    if messages[-1].speaker is not Speaker.USER:
        raise row.fault(
            "messages",
            f"the last message is the {messages[-1].speaker}'s; end with the user's and put the "
            "answer into its own key",
        )
    return (*_context(row, messages[0]), *messages)


def _message(row: Row, number: int, value: object) -> Message:
    field = f"messages[{number}]"
    if not isinstance(value, dict):
        raise row.fault(field, f"found {_shown(value)}; expected an object with role and content")
    key = "author" if "author" in value else "role"
    speaker = value.get(key)
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        found = (
            f"found {_shown(speaker)}"
            if key in value
            else f"is missing; the message has {_names(value)}"
        )
        raise row.fault(f"{field}.{key}", f"{found}; expected {', '.join(map(repr, SPEAKERS))}")
    content = value.get("content")
    if not isinstance(content, str) or not content.strip():
        raise row.fault(
            f"{field}.content", f"found {_shown(content)}; expected a text that is not empty"
        )
    return Message(SPEAKERS[speaker], content)


def _context(row: Row, first: Message) -> tuple[Message, ...]:
    if row.values.get("context") is None:
        return ()
    if first.speaker is Speaker.SYSTEM:
        raise row.fault(
            "context", "messages begin with a system message already; keep one of the two"
        )
    return (Message(Speaker.SYSTEM, row.text("context")),)


def _choice(row: Row) -> Choice:
    value = row.values.get("choice")
    if isinstance(value, bool) or value not in (0, 1, "tie") or isinstance(value, float):
        found = "is missing" if "choice" not in row.values else f"found {_shown(value)}"
        raise row.fault(
            "choice", f'{found}; expected 0 or 1 (a number, the preferred candidate) or "tie"'
        )
    choice = Choice(value)
    strength = row.values.get("strength")
    if strength is None:
        return choice
    if isinstance(strength, bool) or not isinstance(strength, int) or not 1 <= strength <= 9:
        raise row.fault(
            "strength", f"found {_shown(strength)}; expected a whole number from 1 to 9"
        )
    if _choice_of_strength(strength) is not choice:
        raise row.fault(
            "strength",
            f"{strength} contradicts choice {_shown(value)}: 1 to 4 prefer candidate_0, 5 is a "
            "tie, 6 to 9 prefer candidate_1; correct one of them",
        )
    return choice


def _choice_of_strength(strength: int) -> Choice:
    if strength == 5:
        return Choice.TIE
    return Choice.FIRST if strength < 5 else Choice.SECOND


def _row(prompt: Prompt, reserved: frozenset[str], own: Json) -> Json:
    """`id`, `group`, the conversation, the kind's own keys, then the prompt's meta."""
    clash = sorted(reserved & set(prompt.meta))
    if clash:
        raise DataError(
            f"row {prompt.id!r}: meta may not hold {clash[0]!r}, a key of the row itself; rename it"
        )
    row: Json = {"id": prompt.id, "group": prompt.group}
    if [message.speaker for message in prompt.messages] == [Speaker.USER]:
        row["input_text"] = prompt.text
    else:
        row["messages"] = [
            {"role": turn.speaker.value, "content": turn.content} for turn in prompt.messages
        ]
    return {**row, **own, **prompt.meta}


def _key(messages: tuple[Message, ...]) -> str:
    turns = (
        f"{turn.speaker}\n{turn.content}" for turn in messages if turn.speaker is not Speaker.SYSTEM
    )
    normalised = "\0".join(" ".join(turn.split()).casefold() for turn in turns)
    return hashlib.sha256(normalised.encode()).hexdigest()[:16]


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False


def _names(values: Json) -> str:
    return _clip(", ".join(map(repr, values))) or "no keys"


def _shown(value: object) -> str:
    """The value as JSON, cut short, and its kind in JSON's words."""
    kinds = {
        bool: "a truth value",
        str: "a text",
        list: "a list",
        dict: "an object",
        type(None): "nothing",
    }
    return f"{_clip(msgspec.json.encode(value).decode())} ({kinds.get(type(value), 'a number')})"


def _clip(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
