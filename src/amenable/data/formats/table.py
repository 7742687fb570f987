"""The table of formats, and which of them a file is."""

from __future__ import annotations

from collections.abc import Sequence

from amenable.data.formats.alpaca import ALPACA
from amenable.data.formats.chats import OPENAI_MESSAGES, OPENAI_PREFERENCE, SHAREGPT
from amenable.data.formats.format import KINDS, Format, Kind
from amenable.data.formats.gcpc import GCPC, GCPC_CHAT
from amenable.data.formats.hh import HH
from amenable.data.formats.native import NATIVE
from amenable.data.formats.oasst import OASST
from amenable.data.formats.rated import (
    BINARIZED,
    HELPSTEER,
    HELPSTEER_PREFERENCE,
    ULTRAFEEDBACK,
)
from amenable.data.formats.summaries import AXIS, SUMMARIZE
from amenable.data.formats.trl import KTO, TRL, TRL_CHAT
from amenable.data.reading.read_log import listed
from amenable.data.reading.records import Row
from amenable.errors import DataError, RecipeError

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        NATIVE,
        SUMMARIZE,
        AXIS,
        OASST,
        SHAREGPT,
        OPENAI_MESSAGES,
        OPENAI_PREFERENCE,
        ULTRAFEEDBACK,
        BINARIZED,
        HELPSTEER_PREFERENCE,
        HELPSTEER,
        ALPACA,
        HH,
        KTO,
        TRL_CHAT,
        TRL,
        GCPC,
        GCPC_CHAT,
    )
}
"""All formats, the most particular keys first. Detection takes the first that fits; no two fit one
record of any of them, so that the order decides nothing but records with the keys of several."""


def find_format(name: str) -> Format:
    """The format of this name.

    Raises:
        RecipeError: there is none.
    """
    found = FORMATS.get(name)
    if found is None:
        known = ", ".join(sorted(FORMATS))
        raise RecipeError(f"format {name!r} is unknown; expected auto or one of {known}")
    return found


def detect(row: Row, kind: Kind | None = None) -> Format:
    """The first format of the table that the record looks like and that has rows of this kind.

    Args:
        row: a record, usually the first of its file.
        kind: None takes any.

    Raises:
        DataError: there is none; names the keys that were found and the ways out.
    """
    fitting = [entry for entry in FORMATS.values() if entry.fits(row.values)]
    for entry in fitting:
        if kind is None or entry.reads(kind):
            return entry
    raise row.fault(None, _unknown(row, kind, fitting))


def _unknown(row: Row, kind: Kind | None, fitting: Sequence[Format]) -> str:
    found = f"the row has {listed(row.values)}"
    if fitting:
        holds = [one for one in KINDS if fitting[0].reads(one)]
        return (
            f"looks like the format {fitting[0].name!r} ({fitting[0].description}), which has "
            f"{' and '.join(holds)} but no {kind}; {found}; name the file under another kind"
        )
    return (
        f"is in no known format of {kind or 'rows'}; {found}; name its columns "
        f"([data.{kind or 'KIND'}.columns]), a format, or a reader function"
    )


def wrong_format(error: DataError, row: Row, read_as: Format, kind: Kind) -> DataError:
    """The fault, with a hint where the record looks like another format than the file's."""
    others = [e.name for e in FORMATS.values() if e is not read_as and e.fits(row.values)]
    if read_as.fits(row.values) or not others:
        return error
    hint = (
        f"; the file is read as {read_as.name!r}, this row looks like {others[0]!r}: "
        "put rows of one format into one file"
    )
    return row.fault(error.field, f"{error.reason}{hint}")


def foreign(row: Row, form: Format) -> DataError | None:
    """The fault of a record in a file of `form` that looks like another format, and not like it.

    Such a record could often be read all the same, but not as what it says: a `label` of KTO, for
    one, would be passed over.
    """
    if form.fits(row.values):
        return None
    other = next((entry.name for entry in FORMATS.values() if entry.fits(row.values)), None)
    if other is None:
        return None
    return row.fault(
        None,
        f"the file was recognised as {form.name!r}, this row looks like {other!r}: put rows of "
        "one format into one file",
    )
