"""A Python function as a reward."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from amenable.data.reading.custom import load_function
from amenable.data.schemas import Prompt
from amenable.rollout.rewards.types import Failed, Verdict
from amenable.rollout.rewards.verdicts import read_verdicts, told


class FunctionReward:
    """`module:function` or `file.py:function`, called once a roll-out batch.

    It is given `prompts` and `completions` (texts) and `rows` (of each prompt, the keys that
    Amenable does not use), and returns one item a completion: a number; a list of steps
    [end, score]; None, NaN or an exception where there is no score; or a dictionary of `score`
    and `reason`. It may be `async def`; an event loop is made for each batch.

    Args:
        name: of the function.
        key: of the recipe, for messages.

    Raises:
        RecipeError: there is no such function.
    """

    def __init__(self, name: str, key: str = "policy.reward") -> None:
        self._who = f"{key} = {name!r}"
        self._function = load_function(name, key)

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """[N] verdicts; an exception fails all of them.

        Raises:
            StageError: it returned no list, or one of another length.
        """
        try:
            given = _finished(
                self._function(
                    prompts=[prompt.text for prompt in prompts],
                    completions=list(texts),
                    rows=[dict(prompt.meta) for prompt in prompts],
                )
            )
            if hasattr(given, "__next__"):  # a generator, which raises only when it is read
                given = list(given)
        except Exception as error:  # whatever the user's code may raise
            return [Failed(f"{told(error)}{_place(error)}")] * len(texts)
        return read_verdicts(given, texts, self._who)


def _finished(given: Any) -> Any:
    """What a coroutine returns; anything else as it is."""
    if not inspect.iscoroutine(given):
        return given
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(given)
    with ThreadPoolExecutor(max_workers=1) as pool:  # inside somebody's loop, as in a notebook
        return pool.submit(asyncio.run, given).result()


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
