"""Rows as training sees them, token by token: on the terminal, as a page, as JSON.

Loss tokens are underlined or in braces, special tokens framed, cut ones struck: never told by
colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from amenable.data.render import Renderer
from amenable.data.tokens.rows import AnyRow
from amenable.data.tokens.show_page import page
from amenable.data.tokens.shown import (
    PART,
    Part,
    heading_words,
    rows_as_json,
    safe,
    shown_row,
    visible,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["first_of_each_kind", "rows_as_json", "show_html", "show_rows"]

PER_KIND = 3
"""Rows of each kind that are shown by default."""


def first_of_each_kind(rows: Iterable[AnyRow], per_kind: int = PER_KIND) -> list[AnyRow]:
    """The first rows of each kind, kinds one after the other."""
    kinds: dict[type, list[AnyRow]] = {}
    for row in rows:
        own = kinds.setdefault(type(row), [])
        if len(own) < per_kind:
            own.append(row)
    return [row for own in kinds.values() for row in own]


def show_rows(renderer: Renderer, rows: Iterable[AnyRow], console: Console) -> None:
    """Print rows, token by token.

    Without a colour terminal, `|` stands between tokens and brackets take the place of styles.

    Args:
        renderer: of the run.
        rows: all of them are printed; `first_of_each_kind` takes a few.
        console: of rich; plain where it is no terminal or has no colour (`NO_COLOR`).

    Raises:
        DataError: a prompt cannot be rendered.
    """
    from rich.text import Text

    plain = not console.is_terminal or console.no_color or console.color_system is None
    console.print(_legend(plain), soft_wrap=True)
    for row in rows:
        shown = shown_row(renderer, row)
        console.print()
        console.rule(Text(f"{shown.kind} {safe(shown.id)}"), align="left", style="dim")
        for part in (shown.prompt, *shown.completions):
            console.print(_heading(part), soft_wrap=True)
            console.print(_part_text(part, console.width, plain), soft_wrap=True)


def show_html(
    renderer: Renderer, rows: Iterable[AnyRow], title: str = "Rows as training sees them"
) -> str:
    """The same as one self-contained page, in light and dark, that needs no network.

    Raises:
        DataError: a prompt cannot be rendered.
    """
    return page([shown_row(renderer, row) for row in rows], title)


def _legend(plain: bool) -> Text:
    from rich.text import Text

    if plain:
        return Text(
            "a|b two tokens   {a|b} loss   «a» special   [-a|b-] cut away, not seen in training\n"
            f"{_white_space_legend()}"
        )
    return Text.assemble(
        ("prompt, no loss", _style(False, False, False, 0)),
        "   ",
        ("completion, loss", _style(True, False, False, 0)),
        "   ",
        ("special", _style(False, True, False, 0)),
        "   ",
        ("cut away, not seen in training", _style(False, False, True, 0)),
        f"\n{_white_space_legend()}",
    )


def _white_space_legend() -> str:
    return f"· blank   ↵ new line   → tab   {PART} part of a character"


def _heading(part: Part) -> Text:
    from rich.text import Text

    title, facts = heading_words(part)
    return Text.assemble((title, "bold"), "  ", (facts, "dim"))


def _style(loss: bool, special: bool, cut: bool, position: int) -> str:
    """Neighbours differ in shade, so that boundaries can be seen."""
    if cut:
        return "strike dim red"
    if special:
        return "bold reverse underline green" if loss else "bold reverse cyan"
    if loss:
        return f"underline {('green', 'bold green')[position % 2]}"
    return ("default", "cyan")[position % 2]


def _part_text(part: Part, width: int, plain: bool) -> Text:
    """The tokens of a part, broken between tokens at the width of the console."""
    from rich.cells import cell_len
    from rich.text import Text

    text, column = Text("  "), 2
    for position, token in enumerate(part.tokens):
        mark = visible(token.text)
        shown = _bracketed(part, position, mark) if plain else mark
        style = None if plain else _style(part.loss, token.special, token.cut, position)
        first, *rest = shown.split("↵") if "\n" in token.text else [shown]
        if column + cell_len(first) > width and column > 2:
            text.append("\n  ")
            column = 2
        text.append(first, style)
        column += cell_len(first)
        for line in rest:  # what follows a new line inside of a token, too, stands on a new one
            text.append("↵", style)
            text.append("\n  ")
            text.append(line, style)
            column = 2 + cell_len(line)
    text.rstrip()
    return text


def _bracketed(part: Part, position: int, mark: str) -> str:
    """A token with the brackets that begin or end a run of its sort, `|` between two tokens."""
    token = part.tokens[position]
    before = part.tokens[position - 1] if position else None
    after = part.tokens[position + 1] if position + 1 < len(part.tokens) else None
    opening, closing = ("[-", "-]") if token.cut else ("{", "}") if part.loss else ("", "")
    begins = before is None or before.cut != token.cut
    ends = after is None or after.cut != token.cut
    body = f"«{mark}»" if token.special else mark
    return (opening if begins else "|") + body + (closing if ends else "")
