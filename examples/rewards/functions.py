"""Reward functions: called once a roll-out batch, with texts and the prompts' extra columns.

policy.reward = "examples/rewards/functions.py:letters_of_keyword"
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


def letters_of_keyword(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float | None]:
    """Share of a completion's characters, blanks apart, that occur in its row's `keyword`.

    None where there are none: that completion has no score and leaves the batch.
    """
    return [_share(text, row["keyword"]) for text, row in zip(completions, rows, strict=True)]


async def letters_of_keyword_async(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[Any]:
    """The same, as one would ask a remote judge: all completions of the batch at once.

    An exception given in place of a score fails that completion alone, with its message.
    """

    async def ask(text: str, row: dict[str, Any]) -> float | None:
        await asyncio.sleep(0)  # here a request would go out
        return _share(text, row["keyword"])

    asked = [ask(text, row) for text, row in zip(completions, rows, strict=True)]
    return await asyncio.gather(*asked, return_exceptions=True)


def words(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[list[tuple[int, float]]]:
    """One score a step: 0.1 for each word that was not there before, on the word's last token."""
    return [_new_words(text) for text in completions]


def _share(text: str, keyword: str) -> float | None:
    letters = "".join(text.lower().split())
    return sum(letter in keyword for letter in letters) / len(letters) if letters else None


def _new_words(text: str) -> list[tuple[int, float]]:
    seen: set[str] = set()
    steps, end = [(0, 0.0)], 0
    for word in text.split():
        end = text.index(word, end) + len(word)
        steps.append((end, 0.0 if word in seen else 0.1))
        seen.add(word)
    return steps
