from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amenable.errors import RecipeError, StageError
from amenable.rollout.rewards import Failed, FunctionReward

from .samples import PROMPTS, TEXTS

Make = Callable[[Callable[..., Any]], FunctionReward]


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A reward from a function, put on the Python path as `my_reward:score`."""

    def make(score: Callable[..., Any]) -> FunctionReward:
        module = types.ModuleType("my_reward")
        module.score = score  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_reward", module)
        return FunctionReward("my_reward:score", "policy.rewards[1].source")

    return make


def test_function_is_given_texts_and_extra_keys(function: Make) -> None:
    seen: dict[str, Any] = {}

    def score(**given: Any) -> list[float]:
        seen.update(given)
        return [0.5, -1, 2, 3.25]

    assert function(score).judge(PROMPTS, TEXTS) == [0.5, -1.0, 2.0, 3.25]
    assert seen == {
        "prompts": ["Is it?", "Is it?", "What of the rain?", "Open the file."],
        "completions": TEXTS,
        "rows": [{"length": 6}, {"length": 6}, {"length": 17}, {"length": 14}],
    }


def test_function_may_refuse_some_and_score_steps_of_others(function: Make) -> None:
    def score(completions: list[str], **_: Any) -> list[Any]:
        return [1.0, None, [[5, 0.5], [20, -1]], ValueError("odd")]

    found = function(score).judge(PROMPTS, TEXTS)
    assert found[0] == 1.0
    assert found[1] == Failed("gave no score")
    assert found[2] == ((5, 0.5), (20, -1.0))
    assert found[3] == Failed("ValueError: odd")


def test_async_function_is_awaited_once_with_the_whole_batch(function: Make) -> None:
    calls: list[int] = []

    async def one(text: str) -> float:
        await asyncio.sleep(0)
        return float(len(text))

    async def score(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return await asyncio.gather(*map(one, completions))

    reward = function(score)
    assert reward.judge(PROMPTS, TEXTS) == [4.0, 9.0, 20.0, 2.0]
    assert reward.judge(PROMPTS[:2], TEXTS[:2]) == [4.0, 9.0]
    assert calls == [4, 2]


def test_async_function_inside_a_running_loop(function: Make) -> None:
    async def score(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    reward = function(score)

    async def notebook() -> object:
        return reward.judge(PROMPTS, TEXTS)

    assert asyncio.run(notebook()) == [1.0] * 4


@pytest.mark.parametrize("is_async", [False, True])
def test_exception_fails_every_completion_with_its_place(function: Make, is_async: bool) -> None:
    def score(**_: Any) -> list[float]:
        raise KeyError("label")

    async def later(**_: Any) -> list[float]:
        return score()

    found = function(later if is_async else score).judge(PROMPTS, TEXTS)
    line = score.__code__.co_firstlineno + 1
    assert found == [Failed(f"KeyError: 'label' (test_functions.py, line {line})")] * 4


def test_wrong_number_of_scores_names_the_recipe_key(function: Make) -> None:
    with pytest.raises(StageError, match=r"policy.rewards\[1\].source = 'my_reward:score' must"):
        function(lambda **_: [1.0]).judge(PROMPTS, TEXTS)


def test_function_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def words(completions, **_):\n    return [len(c.split()) for c in completions]\n"
    )
    assert FunctionReward(f"{file}:words").judge(PROMPTS, TEXTS) == [1.0, 2.0, 5.0, 1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:score", "policy.reward = 'no_such_module:score': .* cannot be imported"),
        ("math:no_such_function", "there is no function no_such_function in math"),
        ("fractions:Fraction", "Fraction is a class; name a function"),
        ("no/such.py:score", "there is no file"),
    ],
)
def test_a_function_that_does_not_exist_is_refused(path: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FunctionReward(path)
