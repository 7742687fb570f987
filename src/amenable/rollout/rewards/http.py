"""An HTTP service as a reward."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from amenable.config.rewards import RewardPart
from amenable.data.schemas import Prompt
from amenable.errors import RecipeError
from amenable.masking import shown_name
from amenable.rollout.rewards.types import Failed, Verdict
from amenable.rollout.rewards.verdicts import one_line, read_verdicts, told

_LARGEST_ANSWER = 64 * 2**20
_FIRST_PAUSE_S = 0.5
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, and take the token elsewhere."""

    def redirect_request(self, *given: Any) -> None:
        """Follows none."""


class HttpReward:
    """One POST a roll-out batch.

    Sent: {"prompts": [N texts], "completions": [N texts], "rows": [N objects]}. Expected:
    {"scores": [N items], "reasons": [N texts, or null]}, where an item is a number, null for no
    score, or a list of steps [end, score]; `reasons` may be left out.

    Args:
        part: the section of the recipe.
        key: of the source in the recipe, for messages.

    Raises:
        RecipeError: the environment variable of the token is not set.
    """

    def __init__(self, part: RewardPart, key: str = "policy.reward") -> None:
        self._part = part
        self._who = f"{key} = {shown_name(part.source)!r}"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if part.token_env:
            token = os.environ.get(part.token_env, "")
            if not token:
                raise RecipeError(
                    f"{self._who}: the environment variable {part.token_env} (token_env) is not"
                    " set; export it before the run"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """[N] verdicts; a service that does not answer fails all of them.

        Raises:
            StageError: its answer does not have the shape above.
        """
        body = json.dumps(
            {
                "prompts": [prompt.text for prompt in prompts],
                "completions": list(texts),
                "rows": [dict(prompt.meta) for prompt in prompts],
            },
            default=str,
        ).encode()
        try:
            answer = self._ask(body)
        except _NoAnswer as error:
            return [Failed(str(error))] * len(texts)
        return self._read(answer, texts)

    def _read(self, answer: Any, texts: Sequence[str]) -> list[Verdict]:
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        verdicts = read_verdicts(scores, texts, self._who)
        reasons = answer.get("reasons") if isinstance(answer, dict) else None
        if not isinstance(reasons, list) or len(reasons) != len(texts):
            return verdicts
        return [
            Failed(one_line(reason)) if isinstance(verdict, Failed) and reason else verdict
            for verdict, reason in zip(verdicts, reasons, strict=True)
        ]

    def _ask(self, body: bytes) -> Any:
        """The decoded answer, after as many tries as the recipe allows."""
        for attempt in range(self._part.retries + 1):
            if attempt:
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                return self._ask_once(body)
            except _NoAnswer as error:
                last = error
                if not error.passing:
                    break
        raise last

    def _ask_once(self, body: bytes) -> Any:
        request = urllib.request.Request(self._part.source, data=body, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self._part.timeout_s) as response:
                content = response.read(_LARGEST_ANSWER + 1)
        except HTTPError as error:
            error.close()
            reason = one_line(f"HTTP {error.code} {error.reason}")
            raise _NoAnswer(reason, error.code in _TRY_AGAIN) from error
        except URLError as error:
            raise _NoAnswer(one_line(error.reason), True) from error
        except TimeoutError as error:
            raise _NoAnswer(f"no answer in {self._part.timeout_s:g} s", True) from error
        except (OSError, HTTPException) as error:
            raise _NoAnswer(told(error), True) from error
        if len(content) > _LARGEST_ANSWER:
            raise _NoAnswer(f"the answer has more than {_LARGEST_ANSWER} bytes", False)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _NoAnswer(f"the answer is no JSON ({told(error)})", False) from error


class _NoAnswer(Exception):
    """`passing` says that another try may help."""

    def __init__(self, reason: str, passing: bool) -> None:
        super().__init__(reason)
        self.passing = passing
