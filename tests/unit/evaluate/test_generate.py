from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.evaluate.generate import generate
from amenable.rollout.types import Request, Rollout, Sampling

PROMPTS = [
    Prompt(messages=(Message(Speaker.USER, text),), id=f"id-{text}", group=text)
    for text in ("a", "bbb", "cc")
]


class EchoEngine:
    """Completes n prompt tokens with the tokens 1 to n; ends where n is odd."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: Any = None
    ) -> list[Rollout]:
        self.requests += requests
        for _ in requests:
            if on_progress is not None:
                on_progress(1)
        return [
            Rollout(
                r.prompt_ids, tuple(range(1, len(r.prompt_ids) + 1)), len(r.prompt_ids) % 2 == 1
            )
            for r in requests
        ]


class EchoRenderer:
    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return [7] * len(prompt.text)

    def completion_text(self, ids: Sequence[int]) -> str:
        return "-".join(map(str, ids))


def answers(engine: Any, **more: Any) -> Any:
    renderer: Any = EchoRenderer()
    return generate(engine, renderer, PROMPTS, Sampling(max_new_tokens=4), seed=5, **more)


def test_answers_come_in_order_with_text_length_and_end() -> None:
    found = answers(EchoEngine())
    told = [(a.completion.text, a.completion.tokens, a.completion.ended) for a in found]
    assert told == [("1", 1, True), ("1-2-3", 3, True), ("1-2", 2, False)]
    assert [a.completion.prompt for a in found] == PROMPTS
    assert [a.rollout.completion_ids for a in found] == [(1,), (1, 2, 3), (1, 2)]


def test_the_noise_is_named_by_seed_and_prompt_alone() -> None:
    """Two systems asked the same question draw the same numbers."""
    one, other = EchoEngine(), EchoEngine()
    answers(one)
    answers(other)
    assert [request.key for request in one.requests] == [request.key for request in other.requests]
    assert one.requests[0].key == (5, "generate", "id-a", 0)
    assert len({request.key for request in one.requests}) == 3


def test_progress_is_handed_on() -> None:
    heard: list[int] = []
    answers(EchoEngine(), on_progress=heard.append)
    assert heard == [1, 1, 1]
