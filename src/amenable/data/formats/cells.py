"""Conversations within a cell of a table of texts (CSV), which has no place for lists."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import msgspec

from amenable.data.reading.records import Row

_KEYS = (
    *("messages", "conversations", "prompt", "completion", "chosen", "rejected"),
    *("preferred_output", "non_preferred_output"),
)
"""Where formats have a list of messages."""

_BEGIN = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|author|from|value)["']\s*:""")


def with_chats(row: Row) -> Row:
    """The row with lists in place of texts that are lists of messages; counted.

    JSON is read, and Python's notation, which pandas writes.

    Raises:
        DataError: a text begins as a list of messages but is none.
    """
    if not row.textual:
        return row
    found = {
        key: _chat(row, key, text)
        for key in _KEYS
        if isinstance(text := row.values.get(key), str) and _BEGIN.match(text)
    }
    return replace(row, values={**row.values, **found}) if found else row


def _chat(row: Row, key: str, text: str) -> list[Any]:
    for decode in (msgspec.json.decode, ast.literal_eval):
        try:
            value = decode(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            row.log.coerce("text of a list of messages read as the list (CSV)")
            return value
    raise row.fault(
        key, "begins as a list of messages but is no JSON; write it with a JSON library"
    )
