"""What the tokenizer makes of rows: ids before and after the cut, for the report on tokens.

Texts are tokenized in one call for all rows. Nothing here judges; `token_report` does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from amenable.data.render import Renderer
from amenable.data.schemas import Demonstration, Preference, Prompt
from amenable.data.splits import rank
from amenable.errors import DataError

AnyRow = Prompt | Demonstration | Preference
R = TypeVar("R", bound=AnyRow)


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A completion as text and as ids, before and after the cut.

    Args:
        text: as the row has it.
        whole: ids with end of sequence, however many.
        kept: what training sees.
        joined: ids of the whole prompt and this completion tokenized as one text, without the end
            of sequence; equal to both tokenized apart where no token reaches over the boundary.
    """

    text: str
    whole: list[int]
    kept: list[int]
    joined: list[int]


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row's prompt and completions.

    Args:
        row: the typed row.
        prompt_text: the rendered prompt before any cut.
        whole: its ids, however many.
        kept: what training sees; empty where `fault` says why there is nothing.
        completions: none, the demonstration's output, or candidate 0 and candidate 1.
        fault: why the prompt cannot be rendered within `max_prompt_tokens`, else empty.
    """

    row: AnyRow
    prompt_text: str
    whole: list[int]
    kept: list[int]
    completions: tuple[TokenizedText, ...]
    fault: str = ""

    @property
    def id(self) -> str:
        """The row's id."""
        return prompt_of(self.row).id


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that the chat template refuses."""

    id: str
    message: str


def prompt_of(row: AnyRow) -> Prompt:
    """The prompt of any row."""
    return row if isinstance(row, Prompt) else row.prompt


def completions_of(row: AnyRow) -> tuple[str, ...]:
    """No text, the demonstration's output, or candidate 0 and candidate 1."""
    if isinstance(row, Demonstration):
        return (row.output_text,)
    return (row.candidate_0, row.candidate_1) if isinstance(row, Preference) else ()


def draw(rows: Iterable[R], limit: int) -> tuple[list[R], int]:
    """At most `limit` rows by the hash of their ids, in hash order, and how many there were.

    The draw depends on the ids alone: not on a seed nor on the order of the rows. At most `limit`
    rows are held in memory.
    """
    count = 0

    def counted() -> Iterable[R]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    drawn = heapq.nsmallest(limit, counted(), key=lambda row: rank(prompt_of(row).id, "tokens"))
    return drawn, count


def tokenize_rows(
    renderer: Renderer, rows: Sequence[AnyRow]
) -> tuple[list[TokenizedRow], list[RefusedRow]]:
    """Rows with the ids of their prompts and completions, and those the template refuses."""
    rendered: list[tuple[AnyRow, str]] = []
    refused: list[RefusedRow] = []
    for row in rows:
        try:
            rendered.append((row, renderer.prompt_text(prompt_of(row))))
        except DataError as error:
            refused.append(RefusedRow(prompt_of(row).id, str(error)))
    prompts = renderer.encode_prompts([text for _, text in rendered])
    sources = [
        (text, renderer.completion_source(text))
        for row, _ in rendered
        for text in completions_of(row)
    ]
    owners = [text for row, text in rendered for _ in completions_of(row)]
    completions = renderer.encode_all([source for _, source in sources])
    joined = renderer.encode_prompts(
        [prompt + source for prompt, (_, source) in zip(owners, sources, strict=True)]
    )
    eos = int(renderer.tokenizer.eos_token_id)
    texts = iter(
        TokenizedText(text, [*ids, eos], [*ids, eos][: renderer.max_completion_tokens], together)
        for (text, _), ids, together in zip(sources, completions, joined, strict=True)
    )
    made: list[TokenizedRow] = []
    for (row, text), whole in zip(rendered, prompts, strict=True):
        own = tuple(next(texts) for _ in completions_of(row))
        try:
            kept, fault = renderer.fit_prompt(prompt_of(row), whole), ""
        except DataError as error:
            kept, fault = [], str(error)
        made.append(TokenizedRow(row, text, whole, kept, own, fault))
    return made, refused
