"""What can be wrong between rows and a tokenizer: each check names the rows it met.

A check is a function from tokenized rows to ids; `CHECKS` says what each finding means and what to
do about it. A check that stops a run (`error`) is certain: the run would fail, or could not train
to stop. One that is about all rows is certain only where all were looked at. All others leave the
decision to the reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from amenable.data.content.findings import EXAMPLES, example
from amenable.data.render import Renderer
from amenable.data.schemas import Message
from amenable.data.tokens.rows import TokenizedRow, TokenizedText, prompt_of

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """What a finding says.

    Args:
        text: what was found; `{count}`, `{of}`, `{kind}` and values of the check are filled in.
        means: what follows from it.
        remedy: what to do.
        warn_at: share of the rows from which on it is a warning, below it a note; above 1: always
            a note.
        error: it stops a run.
        of_all: it says what no row does; of a draw it is a warning, as a row not drawn may do it.
    """

    text: str
    means: str
    remedy: str
    warn_at: float = 0.0
    error: bool = False
    of_all: bool = False


CHECKS: dict[str, Check] = {
    "template_refuses": Check(
        "the chat template refuses {count} of {of} {kind}: {detail}",
        "The run would stop at the first of these rows.",
        "Change the turns of these rows, leave out the system message, or set "
        "model.chat_template = false.",
        error=True,
    ),
    "prompt_does_not_fit": Check(
        "{count} of {of} {kind} do not fit even without their text: {detail}",
        "The run would stop at the first of these rows: only the last user text is ever cut.",
        "Raise data.max_prompt_tokens, or shorten instruction, system message or history.",
        error=True,
    ),
    "completion_cut_to_nothing": Check(
        "{count} of {of} {kind} have a completion of which the cut leaves no token",
        "A completion without tokens cannot be trained on.",
        "Raise data.max_completion_tokens.",
        error=True,
    ),
    "eos_never_trained": Check(
        "no completion of the {of} {kind} ends with an end-of-sequence token: all are cut",
        "A model trained on them never learns to stop; every roll-out runs to its limit.",
        "Raise data.max_completion_tokens, or leave out long answers.",
        error=True,
        of_all=True,
    ),
    "eos_never_in_pairs": Check(
        "no candidate of the {of} {kind} ends with an end-of-sequence token: all are cut",
        "The reward model sees no finished answer and cannot tell one from a broken-off one.",
        "Raise data.max_completion_tokens, or leave out long answers.",
    ),
    "prompt_cut": Check(
        "{count} of {of} {kind} have a prompt above {limit} tokens and lose {tokens} tokens",
        "The end of the user's text is cut away; a question that stands there is lost.",
        "Raise data.max_prompt_tokens ({suggested} would cut at most 1 %), or shorten the texts.",
        warn_at=0.01,
    ),
    "completion_cut": Check(
        "{count} of {of} {kind} have a completion above {limit} tokens and lose {tokens} tokens",
        "A cut completion has no end-of-sequence token: training shows how to go on, not to stop.",
        "Raise data.max_completion_tokens ({suggested} would cut at most 1 %), or leave out long "
        "answers.",
        warn_at=0.01,
    ),
    "cut_loses_ending": Check(
        "{count} of {of} {kind} end with {detail}, as most rows do, and lose it to the cut",
        "The cut takes away the part of the prompt that says what is asked.",
        "Put it into data.instruction, which is never cut, or raise data.max_prompt_tokens.",
    ),
    "cut_loses_marker": Check(
        "{count} of {of} {kind} lose the instruction or the mark where the answer begins",
        "The model is asked to answer without the mark or the instruction it was trained with.",
        "Raise data.max_prompt_tokens; please report the tokenizer as a fault.",
    ),
    "pairs_equal_once_cut": Check(
        "{count} of {of} {kind} differ only in what the cut takes away",
        "Both candidates are the same tokens: their scores are equal and the choice is noise.",
        "Raise data.max_completion_tokens, or leave out these pairs.",
    ),
    "pairs_equal_in_tokens": Check(
        "{count} of {of} {kind} have two candidates of the same tokens, cut or not",
        "Their scores are equal whatever is learnt; the choice is noise.",
        "Leave out these pairs.",
    ),
    "eos_inside_completion": Check(
        "{count} of {of} {kind} have a completion whose own text holds an end-of-sequence token",
        "Training shows text after the end; a roll-out stops at it. Often a template was applied "
        "before: the mark at the end is then trained twice.",
        "Remove the mark from the texts.",
    ),
    "special_token_in_text": Check(
        "{count} of {of} {kind} spell a special token in their text and it is read as one: "
        "{detail}",
        "Such a text can end its turn and begin another; whoever wrote it speaks for the system.",
        "Remove or break up the mark; a row that was rendered before should be given as messages.",
    ),
    "boundary_differs": Check(
        "{count} of {of} {kind} are tokenized otherwise when prompt and completion are one text: "
        "{detail}",
        "Training and roll-out use both apart and agree with each other; the base model saw "
        "the joined form.",
        "Remove white space at the beginning of completions, or use the chat template.",
        warn_at=0.05,
    ),
    "bos_doubled": Check(
        "{count} of {of} {kind} begin with the beginning-of-sequence token {detail} twice",
        "The base model has never seen two; its first predictions are off.",
        "Remove the token from the texts or from the chat template.",
    ),
    "bos_missing": Check(
        "{count} of {of} {kind} do not begin with {detail}, which this tokenizer puts before text",
        "The base model was trained with it and can be far off without it.",
        "Use a chat template that writes it, or put it at the beginning of the texts.",
    ),
    "message_dropped": Check(
        "the chat template leaves a message out of {count} of {of} {kind}: {detail}",
        "The model never sees what stands in it.",
        "Put the text into the user's message or data.instruction, or mend the template.",
    ),
    "white_space_changed": Check(
        "the chat template changes white space in messages of {count} of {of} {kind}: {detail}",
        "Code and tables may be read otherwise than they were written; outer blanks seldom matter.",
        "Nothing where only outer blanks are taken; else mend the template.",
        warn_at=0.05,
    ),
    "unknown_tokens": Check(
        "{count} of {of} {kind} have characters that the tokenizer does not know: {detail}",
        "They all become the same token and cannot be told apart or written.",
        "Clean the texts, or use a model whose tokenizer has bytes.",
        warn_at=0.01,
    ),
    "round_trip_differs": Check(
        "{count} of {of} {kind} do not come back from the tokenizer as they were: {detail}",
        "Judges, reports and reward functions see the decoded text, not the row's.",
        "Normalise the texts before use, or use another base model.",
        warn_at=0.01,
    ),
    "no_generation_prompt": Check(
        "asked for a generation prompt, the chat template leaves out {detail} before the answer",
        "The prompt ends with the user's turn: the model may go on speaking for the user.",
        "Use a template that heeds add_generation_prompt.",
    ),
    "template_boundary": Check(
        "the chat template writes an answered conversation otherwise than prompt and answer: "
        "{detail}",
        "What is trained is not what the template makes of the same turns elsewhere.",
        "Nothing where the template adds an empty thinking part on purpose; else mend it.",
    ),
    "end_of_turn": Check(
        "the chat template ends an answer with {detail}, which does not end a roll-out",
        "The base model says it first: completions would run on until their limit.",
        "Add it to eos_token_id in the model's generation_config.json.",
    ),
    "template_date": Check(
        "the chat template writes today's date into prompts",
        "The same run gives other tokens on another day.",
        "Set data.system_message where that replaces it, or fix the date in the template.",
        warn_at=2.0,
    ),
    "eos_missing": Check(
        "the tokenizer names no end-of-sequence token",
        "Stopping cannot be trained: no completion can be ended.",
        "Set eos_token in tokenizer_config.json.",
        error=True,
    ),
    "eos_not_stopping": Check(
        "completions are trained to end with {detail}, which does not end a roll-out",
        "No roll-out would ever stop where training ends.",
        "Add it to eos_token_id in the model's generation_config.json.",
        error=True,
    ),
    "pad_is_bos": Check(
        "the pad token {detail} is also the beginning-of-sequence token",
        "Programs that find padding by its id take the first token of a row for padding.",
        "Set another pad_token in tokenizer_config.json.",
    ),
}
"""Every finding of the token report."""


def finding(
    name: str,
    kind: str,
    rows: Sequence[tuple[str, str]],
    of: int,
    *,
    drawn: bool = False,
    **values: object,
) -> Json:
    """One finding in the shape of the content checks (`findings.Finding.to_json`).

    Args:
        name: key of `CHECKS`.
        kind: `prompts`, `demonstrations`, `preferences`, or `tokenizer` for what no row decides.
        rows: id and prompt text of the rows it was found in.
        of: rows that were looked at.
        drawn: these are not all rows there are.
        **values: what the text and the remedy name.
    """
    check = CHECKS[name]
    count = 1 if kind == "tokenizer" else len(rows)
    share = count / max(1, of)
    level = "warning" if share >= check.warn_at else "note"
    if check.error and not (check.of_all and drawn):
        level = "error"
    words = {"count": count, "of": of, "kind": f"{kind} looked at" if drawn else kind, **values}
    return {
        "name": name,
        "level": level,
        "sets": [kind],
        "count": count,
        "of": of,
        "share": share,
        "examples": [example(place, text) for place, text in rows[:EXAMPLES]],
        "text": check.text.format(**words) + ".",
        "means": check.means,
        "try": check.remedy.format(**words),
    }


def ids_where(rows: Sequence[TokenizedRow], test: Callable[[TokenizedRow], bool]) -> list[str]:
    """Ids of the rows that pass a test."""
    return [row.id for row in rows if test(row)]


def differing_tokens(row: TokenizedRow, text: TokenizedText) -> tuple[list[int], list[int]] | None:
    """Ids that differ when prompt and completion are tokenized apart and as one; None: none do."""
    apart = [*row.whole, *text.whole[:-1]]
    if apart == text.joined:
        return None
    shortest = min(len(apart), len(text.joined))
    start = 0
    while start < shortest and apart[start] == text.joined[start]:
        start += 1
    end = 0
    while end < shortest - start and apart[-1 - end] == text.joined[-1 - end]:
        end += 1
    return apart[start : len(apart) - end], text.joined[start : len(text.joined) - end]


def changed_messages(renderer: Renderer, row: TokenizedRow) -> tuple[list[Message], list[Message]]:
    """Messages that the template dropped, and those whose white space it changed."""
    dropped: list[Message] = []
    respaced: list[Message] = []
    if not renderer.templated:
        return dropped, respaced
    for message in renderer.messages(prompt_of(row.row)):
        if message.content in row.prompt_text:
            continue
        same_words = " ".join(message.content.split()) in " ".join(row.prompt_text.split())
        (respaced if same_words else dropped).append(message)
    return dropped, respaced


def special_pattern(renderer: Renderer) -> re.Pattern[str] | None:
    """Matches every spelling that the tokenizer reads as a special token; None: it has none."""
    tokens = renderer.tokenizer.added_tokens_decoder.values()
    names = {t.content for t in tokens if t.special and t.content.strip()}
    names |= {str(name) for name in renderer.tokenizer.all_special_tokens}
    if not names:
        return None
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def special_tokens_in(
    renderer: Renderer, pattern: re.Pattern[str], texts: Sequence[str]
) -> list[str]:
    """Special tokens that are spelt in texts and encoded as such, in order of appearance."""
    spelt = dict.fromkeys(name for text in texts for name in pattern.findall(text))
    if not spelt:
        return []
    ids = {i for text in renderer.encode_all(list(texts)) for i in text}
    return [name for name in spelt if renderer.tokenizer.convert_tokens_to_ids(name) in ids]


def shared_ending(texts: Sequence[str], least: float = 0.5) -> str:
    """The last line, or a last word with a colon, that at least this share of texts ends with.

    Empty where there is none, or fewer than four texts to tell it from.
    """
    stripped = [text.rstrip() for text in texts]
    words = [text.split()[-1] if text.split() else "" for text in stripped]
    lines = [text.rpartition("\n")[2].strip() if "\n" in text else "" for text in stripped]
    for endings, wanted in ((lines, lambda e: 0 < len(e) <= 200), (words, lambda e: e[-1:] == ":")):
        counts: dict[str, int] = {}
        for ending in endings:
            if wanted(ending):
                counts[ending] = counts.get(ending, 0) + 1
        best = max(counts, key=lambda e: counts[e], default="")
        if best and len(texts) >= 4 and counts[best] >= least * len(texts):
            return best
    return ""
