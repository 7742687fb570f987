"""Prompt templates of judges: files with a version, known by their hash.

A template is a TOML file: `system` and `user` for a judge that writes, `short` for one whose next
token is read. {{prompt}}, {{first}} and {{second}} stand for the texts; nothing in a text is read
as a place.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import UsageError
from amenable.judges.types import Question, Verdict

FOLDER = Path(__file__).parent / "templates"
_PLACE = re.compile(r"\{\{(prompt|first|second)\}\}")
_VERDICT = re.compile(r"verdict\W*(both[\s-]*bad|tie|[ab12])\b", re.IGNORECASE)
_SAID = {
    "a": Verdict.FIRST,
    "1": Verdict.FIRST,
    "b": Verdict.SECOND,
    "2": Verdict.SECOND,
    "tie": Verdict.TIE,
}


@dataclass(frozen=True)
class Template:
    """How a question is put."""

    name: str
    system: str
    user: str
    short: str
    sha256: str
    """Of the file."""

    def messages(self, question: Question) -> list[dict[str, str]]:
        """The question as a chat."""
        system, user = _filled(self.system, question), _filled(self.user, question)
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def short_prompt(self, question: Question) -> Prompt:
        """The question to which the next token is the answer, A or B."""
        text = _filled(self.short, question)
        return Prompt(messages=(Message(Speaker.USER, text),), id="question", group="")


def read_verdict(text: str) -> Verdict:
    """The last "Verdict: …" of a reply; INVALID where there is none."""
    found = _VERDICT.findall(text.replace("*", ""))
    if not found:
        return Verdict.INVALID
    return _SAID.get(found[-1].lower(), Verdict.BOTH_BAD)


def template_names() -> list[str]:
    """Of the templates that come with Amenable."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_template(name: str) -> Template:
    """A template that comes with Amenable, or a file.

    Raises:
        UsageError: there is no such template, or a part or a place is missing.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        content = path.read_bytes()
        table = tomllib.loads(content.decode())
    except FileNotFoundError as error:
        raise UsageError(
            f"{name!r} is no judge's template; name one of {', '.join(template_names())}, or a "
            ".toml file"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable template ({error})") from error
    for part in ("system", "user", "short"):
        if not isinstance(table.get(part), str):
            raise UsageError(f"{path}: {part}: must be a text")
    for part in ("user", "short"):
        if missing := {"prompt", "first", "second"} - set(_PLACE.findall(table[part])):
            places = ", ".join(f"{{{{{place}}}}}" for place in sorted(missing))
            raise UsageError(f"{path}: {part}: lacks {places}")
    return Template(
        name=path.stem,
        system=table["system"].strip(),
        user=table["user"].strip(),
        short=table["short"].strip(),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _filled(text: str, question: Question) -> str:
    texts = {
        "prompt": question.prompt.text,
        "first": question.first,
        "second": question.second,
    }
    return _PLACE.sub(lambda place: texts[place[1]], text)
