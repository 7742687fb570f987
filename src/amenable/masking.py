"""Takes passwords, signed queries and tokens out of what is shown.

A name that is known to be one URL is taken apart (`shown_name`), so that nothing in it can be
missed. In other texts, such as another library's message, URLs are found by patterns
(`without_secrets`), which rather hide too much than too little.
"""

from __future__ import annotations

import re
from typing import Any

_BEGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+|https?:|(?:https?)?//", re.IGNORECASE)
"""How a URL begins, also one that lacks a slash or a colon by mistake."""

_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|localhost|[^:/?#@]*\.[^:/?#@]*)(?::\d*)?(?=[/?#]|$)")
_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*:/)")

_URL = r"(?:https?:/*|:/+|//)"
_USER = re.compile(rf"({_URL})[^\s/?#'\"]*@", re.IGNORECASE)
_PASSWORD = re.compile(
    rf"({_URL})[^\s/?#@'\":]*:(?!\d*(?:[\s/?#'\"),;:\]…]|$))(?:(?!://)[^\n])*?@(?=[\w\[…-])",
    re.IGNORECASE,
)
_END = r"(?=['\")\]>:;,.]*(?:\s|$))"
_QUERY = re.compile(rf"({_URL}[^\s?]*)\?\S+?{_END}", re.IGNORECASE)
_FRAGMENT = re.compile(rf"({_URL}[^\s#]*)#[^\s=]*=\S*?{_END}", re.IGNORECASE)
_NAMED = re.compile(
    r"([?&#][\w%.-]*(?:token|sig|signature|secret|password|credential|apikey|api_key)[\w%-]*=)"
    rf"(?!…)\S+?{_END}",
    re.IGNORECASE,
)


def shown_name(name: str) -> str:
    """A file's name without secrets: of a URL the password, query and fragment; others whole."""
    parts = [_shown_url(part) for part in _CHAIN.split(name)]
    return "::".join(parts)


def without_secrets(text: str) -> str:
    """The text with passwords, queries and tokens taken out of its URLs."""
    if "/" not in text and "=" not in text:
        return text
    before = ""
    while before != text:  # a password can hold what looks like the end of one
        before = text
        text = _PASSWORD.sub(r"\1", _USER.sub(r"\1", text))
    return _NAMED.sub(r"\1…", _FRAGMENT.sub(r"\1#…", _QUERY.sub(r"\1?…", text)))


def shown_value(value: Any) -> Any:
    """A value of a recipe, to be shown: every text in it as `shown_name`."""
    if isinstance(value, str):
        return shown_name(value)
    if isinstance(value, dict):
        return {shown_name(str(key)): shown_value(item) for key, item in value.items()}
    return [shown_value(item) for item in value] if isinstance(value, list) else value


def _shown_url(name: str) -> str:
    begin = _BEGIN.match(name)
    if begin is None:
        return name
    rest = _behind_password(name[begin.end() :])
    place, mark, _ = rest.partition("?")
    if not mark:
        place, mark, fragment = rest.partition("#")
        if "=" not in fragment:  # a part of the name
            return begin[0] + rest
    return f"{begin[0]}{place}{mark}…"


def _behind_password(rest: str) -> str:
    """What stands behind user and password, in which `/`, blanks and quotes may stand unescaped.

    Not both an `@` and, behind it, a `/`: such a URL reads as one with a shorter password.
    """
    while "@" in rest:
        authority = re.split("[/?#]", rest, maxsplit=1)[0]
        if "@" in authority:
            rest = rest[authority.rindex("@") + 1 :]
        elif ":" in authority and not _HOST_AND_PORT.match(rest):
            rest = rest.partition("@")[2]
        else:
            break
    return rest
