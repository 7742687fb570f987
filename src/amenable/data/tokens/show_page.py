"""The page of `amenable data show --html`: tokens of rows, in one file without scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from amenable.data.tokens.shown import (
    MARKS,
    PART,
    Part,
    ShownRow,
    Token,
    heading_words,
    safe,
    visible,
)

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --raised: #f1eee6; --ink: #1c2024;
  --muted: #59616b; --rule: #e2ded5; --loss: #0b6b60; --loss-a: #dcefe9; --loss-b: #c5e3da;
  --plain-a: #f1eee6; --plain-b: #e3dfd3; --lost: #a33a2a; --mark: #8a8f96; }
@media (prefers-color-scheme: dark) { :root { --paper: #131619; --raised: #1b1f23;
  --ink: #e9e6df; --muted: #a2a9b2; --rule: #2d3238; --loss: #5ecbb8; --loss-a: #15302c;
  --loss-b: #1c413b; --plain-a: #1d2226; --plain-b: #282e34; --lost: #f0917f; --mark: #7c848d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; }
h1 { font: 500 1.75rem/1.2 Georgia, "Liberation Serif", serif; margin: 0 0 1rem; }
h2 { font-size: 1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 .kind { color: var(--muted); font-weight: 400; margin-right: .5rem; }
h3 { font-size: .875rem; font-weight: 600; margin: 1rem 0 .35rem; }
h3 .facts { color: var(--muted); font-weight: 400; margin-left: .75rem; }
h3 .note { border: 1px solid currentColor; border-radius: 1rem; padding: 0 .55rem; font-weight: 400;
  margin-left: .5rem; }
h3 .note.chosen { color: var(--loss); font-weight: 600; }
section { border-top: 1px solid var(--rule); padding: 1.5rem 0 1.75rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.75rem; font-size: .875rem;
  margin: 0 0 1.75rem; color: var(--muted); padding: 0; list-style: none; }
.tokens { font: .875rem/1.95 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  margin: 0; overflow-wrap: anywhere; }
.t { padding: .12em 0; border-radius: 2px; background: var(--plain-a); white-space: pre-wrap;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.t.b { background: var(--plain-b); }
.t.loss { background: var(--loss-a); text-decoration: underline; text-decoration-color: var(--loss);
  text-decoration-thickness: 2px; text-underline-offset: .3em; text-decoration-skip-ink: none; }
.t.loss.b { background: var(--loss-b); }
.t.special { outline: 1.5px solid currentColor; outline-offset: -1px; padding: .12em .25em;
  margin: 0 .15em; font-weight: 600; }
.t.cut, .t.cut.b { background: none; color: var(--lost); text-decoration: line-through;
  text-decoration-color: currentColor; text-decoration-thickness: 1px; }
.t i { font-style: normal; color: var(--mark); }
.t.cut i { color: inherit; }
.legend .tokens { color: var(--ink); }
"""


def page(rows: Sequence[ShownRow], title: str) -> str:
    """Rows as an HTML document."""
    body = "\n".join(map(_row, rows))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{_LEGEND}\n{body}\n</main>\n</body>\n</html>\n"
    )


_NEW_LINE = "<i>↵</i>"
_LEGEND_ITEMS = (
    ('<span class="t">two</span><span class="t b"><i>·</i>tokens</span>', "prompt, no loss"),
    (
        '<span class="t loss">under</span><span class="t b loss">lined</span>',
        "completion, loss",
    ),
    ('<span class="t special">framed</span>', "special token"),
    ('<span class="t cut">struck</span>', "cut away, not seen in training"),
    ("· ↵ →", "blank, new line, tab"),
    (PART, "part of a character"),
)
_LEGEND = "\n".join(
    [
        '<ul class="legend" aria-label="Legend">',
        *(f'<li><span class="tokens">{mark}</span> {text}</li>' for mark, text in _LEGEND_ITEMS),
        "</ul>",
    ]
)


def _row(row: ShownRow) -> str:
    parts = "\n".join(_part(part) for part in (row.prompt, *row.completions))
    return (
        f'<section>\n<h2><span class="kind">{escape(row.kind)}</span>{escape(safe(row.id))}</h2>\n'
        f"{parts}\n</section>"
    )


def _part(part: Part) -> str:
    _, facts = heading_words(part)
    note = f'<span class="note {part.note}">{part.note}</span>' if part.note else ""
    tokens = "".join(_token(token, part.loss, index) for index, token in enumerate(part.tokens))
    tokens = re.sub("(?:<br>)?</span><wbr>$", "</span>", tokens)
    return (
        f'<h3>{escape(part.title)}{note}<span class="facts">{facts}</span></h3>\n'
        f'<p class="tokens">{tokens}</p>'
    )


def _token(token: Token, loss: bool, index: int) -> str:
    text = escape(visible(token.text))
    for mark in MARKS.values():
        text = text.replace(mark, f"<i>{mark}</i>")
    sorts = {"b": index % 2 == 1, "loss": loss and not token.cut, "special": token.special}
    sorts["cut"] = token.cut
    names = " ".join(["t", *(name for name, holds in sorts.items() if holds)])
    lines = text.replace(_NEW_LINE, f"{_NEW_LINE}<br>") if "\n" in token.text else text
    return f'<span class="{names}" title="id {token.id}">{lines}</span><wbr>'
