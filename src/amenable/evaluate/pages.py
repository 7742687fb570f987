"""What all pages share: their frame and its policy, text made safe to read, figures in words.

A page opens from the file system with no network: style sheet, script and charts are inside, and
its content security policy forbids everything else. All text of models and people is escaped by
the template engine; control and direction-changing characters are made visible first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from amenable import __version__
from amenable.evaluate import curves

TEMPLATES = Path(__file__).parent / "templates"

MAX_TEXT = 4000
"""Characters shown of one text."""

_KEPT = {"\n", "\t", "\u200c", "\u200d"}


# Text ----------------------------------------------------------------------------------------


def visible(text: object) -> str:
    """`text` with control, format and direction-changing characters spelled out, e.g. `⟨U+202E⟩`.

    New lines, tabs and the joiners that scripts and emoji need stay. A lone surrogate, which no
    file can hold, is spelled out as well.
    """
    return "".join(_spelled(c) for c in str(text))


def _spelled(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if hidden and character not in _KEPT else character


def clip(text: object, shown: int) -> tuple[str, str, int]:
    """The beginning of a text, what unfolds after it, and how many characters were left out.

    Args:
        text: any text; its hidden characters are spelled out.
        shown: characters to begin with; the cut is moved back to a space where one is near.
    """
    whole = str(text)
    left_out = max(0, len(whole) - MAX_TEXT)
    clean = visible(whole[:MAX_TEXT])
    if len(clean) <= shown + 40:
        return clean, "", left_out
    cut = clean.rfind(" ", shown - 30, shown)
    cut = cut if cut > 0 else shown
    return clean[:cut], clean[cut:], left_out


def one_line(text: object) -> str:
    """`text` for a line of Markdown: no breaks, and nothing that Markdown or HTML would read."""
    clean = " ".join(visible(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in clean)


# Figures -------------------------------------------------------------------------------------


def lookup(summary: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key such as `evaluate.0.win_rate`; None where there is none."""
    return at_pointer(summary, "/" + key.replace(".", "/"))


def at_pointer(document: Any, pointer: str) -> Any:
    """The value under a JSON Pointer such as `/comparisons/0/win_rate`; None where there is none.

    Source: RFC 6901.
    """
    found = document
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(key)] if key.isdigit() and int(key) < len(found) else None
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    return found


def pointer_part(key: str) -> str:
    """A key as it stands in a JSON Pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def show(value: object, style: str = "number") -> str:
    """A value as the page prints it; the styles are the keys below, text passes through."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else visible(value)
    number = float(value)
    text = {
        "percent": lambda: f"{100 * number:.1f}\u00a0%",
        "points": lambda: f"{100 * number:.1f}\u00a0points",
        "bare": lambda: f"{100 * number:.1f}",
        "integer": lambda: f"{number:,.0f}".replace(",", "\u202f"),
        "duration": lambda: _duration(number),
        "p": lambda: "<\u00a00.001" if number < 0.001 else f"{number:.3f}",
        "gb": lambda: f"{number:.1f}\u00a0GB",
        "one": lambda: f"{number:.1f}",
        "fixed": lambda: f"{number:.3f}",
        "number": lambda: curves.number(number),
    }[style]()
    return text.replace("-", "−")


def _duration(seconds: float) -> str:
    """e.g. `4.2 s`, `8 min 31 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def figures_of(
    document: Any, find: Callable[[Any, str], Any] = lookup
) -> Callable[[str, str], Markup]:
    """The templates' way to print a figure of a JSON document, marked with its key and value.

    Args:
        document: `summary.json` or its like.
        find: what a key names in it.
    """

    def figure(key: str, style: str = "number") -> Markup:
        value = find(document, key)
        text = escape(show(value, style))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Markup(f'<span class="none">{text}</span>')
        raw = json.dumps(value)
        return Markup(
            f'<data value="{raw}" data-key="{escape(key)}" data-style="{style}">{text}</data>'
        )

    return figure


# The page's parts ----------------------------------------------------------------------------


def frame() -> dict[str, Any]:
    """What `base.html` needs: style sheet, script, the policy that lets them in, the version."""
    style = template_text("report.css")
    script = template_text("report.js") + template_text("samples.js")
    return {
        "version": __version__,
        "style": Markup(style),  # our own files, which the policy's hashes vouch for
        "script": Markup(script),
        "policy": content_policy(style, script),
    }


def content_policy(style: str, script: str) -> str:
    """Nothing but this page's own style sheet, its own script and its icon."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def template_text(name: str) -> str:
    """A style sheet or script of the pages."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Jinja2 with escaping on for HTML; a name that is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(visible=visible, show=show, one_line=one_line, quoted=_quoted)
    environment.globals.update(clip=clip)
    return environment


def _quoted(text: object) -> str:
    """A YAML string: JSON's, in ASCII."""
    return json.dumps(str(text))
