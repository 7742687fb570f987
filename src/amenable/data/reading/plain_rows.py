"""Whether a decoded record is a plain native row: one that needs no look by the full reader.

Each predicate is True only if the format `native` makes exactly one typed row of the record,
without a fault and without a coercion; a property test holds it to that. False says nothing: the
full reader decides. Texts are taken to be Unicode, as those of every container are; what a reader
function yields has to go the full way. They take 1 to 2 microseconds a row, the full reader 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from amenable.data.formats.format import Kind
from amenable.data.formats.native import choice_of_strength
from amenable.data.reading.records import Json
from amenable.data.schemas import Choice


def is_plain_preference(values: Json) -> bool:
    """Whether the record is a preference with `input_text` and nothing to complain of."""
    get = values.get
    asked, first, second = get("input_text"), get("candidate_0"), get("candidate_1")
    if not (type(asked) is type(first) is type(second) is str):
        return False
    if first == second or not (asked.strip() and first.strip() and second.strip()):
        return False
    choice = get("choice")
    if type(choice) not in _OF_CHOICES or choice not in (0, 1, "tie"):
        return False
    return len(values) == 4 or _others_are_plain(values, _OF_PREFERENCES)


def is_plain_demonstration(values: Json) -> bool:
    """Whether the record is a demonstration with `input_text` and nothing to complain of."""
    if not (_is_text(values.get("input_text")) and _is_text(values.get("output_text"))):
        return False
    return len(values) == 2 or _others_are_plain(values, _OF_PROMPTS)


def is_plain_prompt(values: Json) -> bool:
    """Whether the record is a prompt with `input_text` and nothing to complain of."""
    if not _is_text(values.get("input_text")):
        return False
    return len(values) == 1 or _others_are_plain(values, _OF_PROMPTS)


PLAIN: Mapping[Kind, Callable[[Json], bool]] = {
    "demonstrations": is_plain_demonstration,
    "preferences": is_plain_preference,
    "prompts": is_plain_prompt,
}
"""The predicate of each kind."""


def _others_are_plain(values: Json, checks: Mapping[str, Callable[[object, Json], bool]]) -> bool:
    """Whether every key that has a check passes it; other keys are kept as they are."""
    for key, value in values.items():
        check = checks.get(key)
        if check is not None and not check(value, values):
            return False
    return True


def _is_text(value: object) -> bool:
    return type(value) is str and bool(value.strip())


def _is_name(value: object, _: Json) -> bool:
    return type(value) is str and bool(value)


def _is_weight(value: object, _: Json) -> bool:
    return _is_margin(value, _) and value != 0


def _is_margin(value: object, _: Json) -> bool:
    if type(value) is float:
        return 0 <= value < math.inf
    # whole numbers beyond the floats are the full reader's to judge
    return type(value) is int and 0 <= value < 2**53


def _is_strength(value: object, values: Json) -> bool:
    if type(value) is not int or not 1 <= value <= 9:
        return False
    return choice_of_strength(value) is Choice(values["choice"])


def _never(_: object, __: Json) -> bool:
    """Conversations go the full way."""
    return False


_OF_CHOICES = frozenset({int, str})
_OF_PROMPTS: dict[str, Callable[[object, Json], bool]] = {
    "id": _is_name,
    "group": _is_name,
    "messages": _never,
    "context": _never,
}
_OF_PREFERENCES: dict[str, Callable[[object, Json], bool]] = {
    **_OF_PROMPTS,
    "weight": _is_weight,
    "margin": _is_margin,
    "annotator": _is_name,
    "strength": _is_strength,
}
