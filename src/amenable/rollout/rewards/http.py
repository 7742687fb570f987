"""An HTTP service as a reward."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from amenable.config.rewards import RewardPart
from amenable.data.schemas import Prompt
from amenable.errors import RecipeError
from amenable.http_post import NoAnswer, post_json
from amenable.masking import shown_name
from amenable.rollout.rewards.types import Failed, Verdict
from amenable.rollout.rewards.verdicts import one_line, read_verdicts

_FIRST_PAUSE_S = 0.5


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
        self._headers = {}
        if part.token_env:
            token = os.environ.get(part.token_env, "")
            if not token:
                raise RecipeError(
                    f"{self._who}: the environment variable {part.token_env} (token_env) is not"
                    " set; export it before the run"
                )
            self._headers["Authorization"] = f"Bearer {token}"

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """[N] verdicts; a service that does not answer fails all of them.

        Raises:
            StageError: its answer does not have the shape above.
        """
        asked = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": list(texts),
            "rows": [dict(prompt.meta) for prompt in prompts],
        }
        part = self._part
        try:
            answer = post_json(
                part.source,
                asked,
                self._headers,
                timeout_s=part.timeout_s,
                retries=part.retries,
                pause_s=_FIRST_PAUSE_S,
            )
        except NoAnswer as error:
            return [Failed(one_line(error))] * len(texts)
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
