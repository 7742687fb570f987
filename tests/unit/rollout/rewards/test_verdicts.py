from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from amenable.errors import StageError
from amenable.rollout.rewards import Failed
from amenable.rollout.rewards.verdicts import one_line, read_verdict, read_verdicts, told

TEXT = "ten letter"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (2, 2.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (torch.tensor(0.25), 0.25),
        (Decimal("1.5"), 1.5),
        ({"score": -1}, -1.0),
        ({"score": 3, "reason": "said all the same"}, 3.0),
        ([[4, 1], (10, 0.5)], ((4, 1.0), (10, 0.5))),
        ([(10, 1), (4, 2)], ((4, 2.0), (10, 1.0))),
        (np.array([[4, 1.0]]), ((4, 1.0),)),
        ({"score": [[0, 1]]}, ((0, 1.0),)),
    ],
)
def test_what_is_a_score(item: Any, expected: object) -> None:
    found = read_verdict(item, TEXT)
    assert found == expected
    assert not isinstance(found, Failed)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (None, "gave no score"),
        (float("nan"), "gave nan"),
        (float("inf"), "gave inf"),
        (np.nan, "gave nan"),
        ("1.0", "gave '1.0', which is no number"),
        (object, "gave <class 'object'>, which is no number"),
        (10**400, "which is no number"),
        (ValueError("too odd"), "ValueError: too odd"),
        (KeyError(), "KeyError"),
        ({"score": None, "reason": "judge was\n away"}, "judge was away"),
        ({"reason": "away"}, "away"),
        ({"score": float("nan")}, "gave nan"),
        ({}, "gave no score"),
        ([], "gave an empty list of steps"),
        ([3], "gave the step 3; a step is [end, score]"),
        ([[1, 2], [3]], "gave the step [3]; a step is [end, score]"),
        ([[11, 1.0]], "gave a step that ends at 11; the text has 10 characters"),
        ([[-1, 1.0]], "gave a step that ends at -1"),
        ([[1.5, 1.0]], "gave a step that ends at 1.5"),
        ([[4, None]], "gave None, which is no number, for the step that ends at 4"),
        ([[4, float("nan")]], "gave nan, for the step that ends at 4"),
    ],
)
def test_what_is_none_says_why(item: Any, reason: str) -> None:
    found = read_verdict(item, TEXT)
    assert isinstance(found, Failed)
    assert reason in found.reason


@pytest.mark.parametrize(
    "given", [torch.tensor([1.0, 2.0]), np.array([1, 2]), (1, 2), {1: 0, 2: 0}.keys()]
)
def test_any_list_of_as_many_will_do(given: Any) -> None:
    assert read_verdicts(given, ["a", "b"], "mine") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "mine must return a list of scores; it returned NoneType"),
        (1.0, "it returned float"),
        ("ab", "it returned str"),
        ({"a": 1, "b": 2}, "it returned dict"),
        ([1.0], "one score for each of the 2 completions; it returned 1"),
        (torch.tensor(1.0), "it returned 1"),
    ],
)
def test_another_answer_stops_the_stage(given: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        read_verdicts(given, ["a", "b"], "mine")


def test_reasons_are_short_and_hold_no_secret() -> None:
    error = OSError("cannot open https://me:pass@host.org/score?token=abc now\nreally")
    assert told(error) == "OSError: cannot open https://host.org/score?… now really"
    assert len(one_line("x" * 10_000)) < 400
