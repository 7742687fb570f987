from __future__ import annotations

import numpy as np
import pytest

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.evaluate.judged import games, judged, parts
from amenable.judges import Reply, Verdict
from amenable.judges.asking import Look, Pair


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            messages=(Message(Speaker.USER, "word " * (n + 1)),),
            id=f"p{n}",
            group="",
            meta={"tags": ["odd", "all"] if n % 2 else ["all"]},
        )
        for n in range(count)
    ]


def looks(count: int = 40) -> list[Look]:
    """b wins three prompts of four in both orders; the last replies are invalid."""
    found = []
    for n, prompt in enumerate(prompts(count)):
        pair = Pair(prompt, "one two", "one two three")
        for swapped in (False, True):
            b_wins = n % 4 > 0
            verdict = Verdict.FIRST if b_wins == swapped else Verdict.SECOND
            found.append(Look(pair, swapped, Reply(verdict)))
    found[-1] = Look(found[-1].pair, True, Reply(Verdict.INVALID))
    return found


def test_a_comparison_says_who_wins_and_who_says_so() -> None:
    row = judged("base", "tuned", "m", looks(), seed=0, bootstrap_samples=50)
    assert (row["wins"], row["losses"], row["ties"], row["prompts"]) == (29, 10, 0, 39)
    assert row["win_rate"] == pytest.approx(29 / 39)
    assert (row["left_out"], row["invalid"]) == (1, 1 / 80)
    assert row["verdicts"]["invalid"] == 1
    assert sum(row["verdicts"].values()) == 80
    assert row["bias"]["first_wins"] == 0.5
    assert row["bias"]["flips"] == 0
    assert row["bias"]["longer_wins"] == pytest.approx(29 / 39)
    assert (row["mean_length_a"], row["mean_length_b"]) == (2, 3)
    names = [part["slice"] for part in row["slices"]]
    assert names == [
        *(f"prompt length: {name}" for name in ("shortest", "second", "third")),
        *("tag: all", "tag: odd"),
    ], "a quarter of nine prompts is left out"


def test_slices_are_quarters_by_length_and_tags() -> None:
    found = parts(prompts(48))
    assert [int(np.sum(member)) for member in found.values()] == [12, 12, 12, 12, 48, 24]
    assert found["prompt length: longest"].tolist() == [n >= 36 for n in range(48)]
    assert parts(prompts(5)) == {}


def test_looks_are_games() -> None:
    found = games("base", "tuned", looks(4))
    assert [(game.prompt, game.score) for game in found] == [("p0", 0.0), ("p1", 1.0), ("p2", 1.0)]
