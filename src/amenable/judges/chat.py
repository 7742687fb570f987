"""A chat model behind an OpenAI-compatible service as a judge."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from amenable.errors import UsageError
from amenable.http_post import NoAnswer, post_json
from amenable.judges.template import Template, read_verdict
from amenable.judges.types import Keep, Question, Reply, Verdict
from amenable.masking import without_secrets

_REFUSED = 3  # calls in a row that no other try would mend: all others would fail alike


class ChatJudge:
    """POST to `…/chat/completions`, a question a call, some at a time.

    A reply that gives no verdict is kept as invalid: asking again would pick among replies. A call
    without a reply is tried again and, in the end, left to the next run.

    Args:
        url: of the service, with or without `/chat/completions`.
        model: the service's name of the model.
        template: of the question.
        concurrency: calls in flight.
        timeout_s: of a try.
        retries: further tries after 429, 5xx, a time-out or an answer that is no JSON.
        token_env: environment variable with the bearer token; empty: none is sent.
        max_tokens: of a reply.
        temperature: of its sampling.

    Raises:
        UsageError: the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: Template,
        *,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        retries: int = 5,
        pause_s: float = 0.5,
        token_env: str = "",
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        end = "/chat/completions"
        self._url = url.rstrip("/").removesuffix(end) + end
        self._model, self._template = model, template
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._retries, self._pause_s = retries, pause_s
        self._sampling = {"max_tokens": max_tokens, "temperature": temperature}
        self._headers = {}
        if token_env:
            token = os.environ.get(token_env, "")
            if not token:
                raise UsageError(
                    f"the environment variable {token_env} (the judge's token) is not set; "
                    "export it first"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self.name = model
        self.identity: Mapping[str, Any] | None = {
            "kind": "chat",
            "url": self._url,
            "model": model,
            "template": template.sha256,
            **self._sampling,
        }

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        """Answer each question once; see `Judge`."""
        numbers, lock = iter(range(len(questions))), threading.Lock()
        stop = threading.Event()
        unanswered: list[str] = []
        refused = 0

        def work() -> None:
            nonlocal refused
            while not stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    keep(number, self._reply(questions[number]))
                    refused = 0
                except NoAnswer as error:
                    with lock:
                        unanswered.append(without_secrets(str(error)))
                        refused += not error.passing
                        if refused >= _REFUSED:
                            stop.set()

        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for done in [pool.submit(work) for _ in range(self._concurrency)]:
                    done.result()
            finally:  # stopped by the user, or a reply could not be kept: ask no more
                stop.set()
        return unanswered + [f"not asked after: {unanswered[-1]}" for _ in numbers]

    def _reply(self, question: Question) -> Reply:
        answer = post_json(
            self._url,
            {
                "model": self._model,
                "messages": self._template.messages(question),
                **self._sampling,
            },
            self._headers,
            timeout_s=self._timeout_s,
            retries=self._retries,
            pause_s=self._pause_s,
            junk_passes=True,
        )
        try:
            text = answer["choices"][0]["message"]["content"] or ""
            usage = answer.get("usage") or {}
            tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise NoAnswer(
                f"the answer is no chat completion ({type(error).__name__}: {error})", False
            ) from error
        verdict = read_verdict(text) if isinstance(text, str) else Verdict.INVALID
        return Reply(verdict, str(text), None, *tokens)
