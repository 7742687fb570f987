"""Faults of a single text or row that can be seen without any other row."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from amenable.data.schemas import Choice, Demonstration, Preference, Prompt

LEAK_WORDS = 5
"""Fewest words of an answer whose copy in the prompt counts; chosen here: shorter ones (a name, a
label to pick) stand in prompts by rights."""

SCRIPT_LETTERS = 10
"""Fewest letters by which a text's script is told; chosen here."""

SCRIPT_SAMPLE = 400
"""Characters from the beginning of a text that its script is told by."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile(r"[\u200b\u2060-\u2064\ufeff\u00ad]")
_DIRECTION = re.compile(r"[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")

# The second byte of a two-byte letter, as Latin-1 or Windows-1252 shows it.
_SECOND = r"\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a"
_SECOND += r"\u20ac\u2122"
_MOJIBAKE = re.compile(
    rf"\u00c3[{_SECOND}]|\u00c2[\u00a0-\u00bf]|\u00e2(?:\u20ac|\u0080)[{_SECOND}]"
    r"|\u00ef\u00bb\u00bf|\u00f0\u0178"
)

_MARKUP = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,6}|#x[0-9a-f]{2,6});"
    r"|</?(?:p|br|hr|div|span|a|b|i|em|strong|ul|ol|li|table|tr|td|th|h[1-6]|img|font|blockquote)"
    r"(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)

_LABEL = re.compile(
    r"\W*(chosen|rejected|preferred|dispreferred|better|worse|winner|loser"
    r"|(?:candidate|response|answer|completion|output)[ _]?\(?[01ab2])\)?\W{0,3}:",
    re.IGNORECASE,
)

_ROLE = re.compile(
    r"\A\s*(?:Human|User|Assistant|AI|Bot) ?:|\n[ \t]*(?:Human|User|Assistant) ?:"
    r"|<\|?(?:im_start|im_end|user|assistant|endoftext|eot_id|start_header_id)\|?>"
    r"|</s>|\[/?INST\]|<(?:start|end)_of_turn>"
)

_WORD = re.compile(r"\w")
_ENOUGH_LETTERS = re.compile(rf"(?:[^A-Za-z]*[A-Za-z]){{{SCRIPT_LETTERS}}}")

PLACEHOLDERS = frozenset({"n/a", "na", "none", "null", "nan", "undefined", "todo", "tbd"}) | {
    "[removed]",
    "[deleted]",
    "no answer",
    "no response",
}
"""Answers that often stand for none, casefolded; chosen here."""

PLACEHOLDER_LENGTH = 40
"""Characters that a placeholder has less than, white space and dots around it included."""

TextFault = tuple[str, str]
"""Name of the finding, and the text that shows it."""


def faults_of_text(text: str) -> Iterator[TextFault]:
    """Faults of the characters of one text, each named once."""
    if not text.isprintable():  # line ends and tabs are told from the rest below
        yield from _unprintable(text)
    if "<" in text or "&" in text:
        found = _MARKUP.search(text)
        if found:
            yield "markup", _around(text, found.start())
    if not text.isascii():
        yield from _faults_beyond_ascii(text)


def _unprintable(text: str) -> Iterator[TextFault]:
    if "\r" in text:
        yield "carriage_returns", _around(text, text.index("\r"))
    found = _CONTROL.search(text)
    if found:
        yield "control_characters", _around(text, found.start())


def _faults_beyond_ascii(text: str) -> Iterator[TextFault]:
    if "\ufffd" in text:
        yield "replacement_characters", _around(text, text.index("\ufffd"))
    found = _MOJIBAKE.search(text)
    if found:
        yield "mojibake", _around(text, found.start())
    found = _INVISIBLE.search(text)
    if not found and not _RIGHT_TO_LEFT.search(text):
        found = _DIRECTION.search(text)
    if found:
        yield "invisible_characters", _around(text, found.start())


def _around(text: str, at: int) -> str:
    return text[max(0, at - 20) : at + 60]


def script_of(text: str) -> str | None:
    """The script of most letters of the text's beginning, as `latin`; None for too few letters.

    Han characters and kana are one script here, since Japanese mixes them.
    """
    head = text[:SCRIPT_SAMPLE]
    if head.isascii():
        return "latin" if _ENOUGH_LETTERS.match(head) else None
    letters = [c for c in head if c.isalpha()]
    if len(letters) < SCRIPT_LETTERS:
        return None
    name, count = Counter(map(_script, letters)).most_common(1)[0]
    return name if 2 * count > len(letters) else None


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The first word of the letter's Unicode name, which is its script."""
    name = unicodedata.name(letter, "unknown").split()[0].split("-")[0].lower()
    return {
        "cjk": "han or kana",
        "hiragana": "han or kana",
        "katakana": "han or kana",
        "fullwidth": "latin",
        "feminine": "latin",
        "masculine": "latin",
        "micro": "greek",
    }.get(name, name)


def normalised(words: list[str]) -> str:
    """White space made single, case folded.

    Args:
        words: the text, split at white space.
    """
    return " ".join(words).casefold()


def faults_of_answers(
    item: Prompt | Demonstration | Preference, asked: Sequence[str], answers: Sequence[str]
) -> Iterator[TextFault]:
    """Faults that show between a row's texts, or in its answers, each named once.

    Args:
        item: the row.
        asked: its prompt's turns, `normalised`, the last one last.
        answers: its answers, `normalised`.
    """
    texts: tuple[str, ...]
    if isinstance(item, Preference):
        texts = (item.candidate_0, item.candidate_1)
        yield from _faults_of_pair(item, *answers)
        is_tie = item.choice is Choice.TIE
        best = None if is_tie else answers[int(item.choice is Choice.SECOND)]
    elif isinstance(item, Demonstration):
        texts = (item.output_text,)
        best = answers[0]
    else:
        return
    for name, is_found in _FAULTS_OF_ONE_ANSWER.items():
        for text in texts:
            if is_found(text):
                yield name, text
                break
    if best is None:
        return
    if best == asked[-1] and isinstance(item, Demonstration):
        yield "output_copies_prompt", best
    elif best.count(" ") >= LEAK_WORDS - 1 and any(best in turn for turn in asked):
        yield "answer_in_prompt", best


def _faults_of_pair(row: Preference, first: str, second: str) -> Iterator[TextFault]:
    if first == second:
        if row.choice is not Choice.TIE:
            yield "same_candidates", row.candidate_0
    elif first and second and (first.startswith(second) or second.startswith(first)):
        yield "prefix_candidates", min(row.candidate_0, row.candidate_1, key=len)


def is_empty(answer: str) -> bool:
    """Whether the answer has no letter, digit or pictograph: an emoji is an answer."""
    return not _WORD.search(answer) and not any(unicodedata.category(c) == "So" for c in answer)


def is_placeholder(answer: str) -> bool:
    """Whether the answer is a word that often stands for none."""
    # A cheap look first: placeholders are short.
    return len(answer) < PLACEHOLDER_LENGTH and answer.strip(" .-\n").casefold() in PLACEHOLDERS


def label_of(answer: str) -> str | None:
    """The label that the answer begins with, as `chosen` or `response1`; None without one."""
    found = _LABEL.match(answer)
    return found and re.sub(r"\W|_", "", found[1]).lower()


def has_role_marker(answer: str) -> bool:
    """Whether the answer has the mark of a turn, such as "Human:" at the start of a line."""
    # A cheap look first: most texts have none of the signs that a mark needs.
    could = ":" in answer or "<" in answer or "[" in answer
    return could and _ROLE.search(answer) is not None


_FAULTS_OF_ONE_ANSWER: dict[str, Callable[[str], bool]] = {
    "empty_answers": is_empty,
    "placeholder_answers": is_placeholder,
    "role_markers": has_role_marker,
}
