"""The over-optimisation lab in small: the same stages, a few updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from amenable.cli.main import app
from amenable.errors import UsageError
from amenable.lab.letter_world import LETTERS, GoldNetwork
from amenable.lab.overoptimization import (
    Checkpoint,
    SeedResult,
    Settings,
    run_seed,
)
from amenable.lab.overoptimization_report import passed, picture, table

SMALL = Settings(pairs=60, updates=4, every=2, selection_prompts=16, test_prompts=128)


@pytest.fixture(scope="module")
def small() -> SeedResult:
    return run_seed(SMALL, 3)


def test_every_checkpoint_is_measured_on_prompts_of_its_own(small: SeedResult) -> None:
    rows = small.checkpoints
    assert [row.updates for row in rows] == [0, 2, 4]
    assert rows[0].kl == pytest.approx(0.0, abs=1e-6), "the start is the reference"
    assert rows[0].gold == pytest.approx(0.0, abs=0.3), "gold has mean 0 on the start"
    assert rows[-1].kl > 0.01
    assert rows[-1].proxy > rows[0].proxy
    assert all(0 <= share <= 1 for share in small.regret.values())
    best = max(rows, key=lambda row: row.selection_gold)
    assert small.chosen == {
        "gold": best.updates,
        "second": max(rows, key=lambda row: row.selection_second).updates,
        "last": 4,
    }


def test_best_of_n_climbs_the_proxy(small: SeedResult) -> None:
    proxies = [row["proxy"] for row in small.best_of_n]
    assert proxies == sorted(proxies)
    assert proxies[-1] > proxies[0]


def test_the_same_seed_gives_the_same_figures(small: SeedResult) -> None:
    again = run_seed(SMALL, 3)
    assert replace(again, wall_s=0.0) == replace(small, wall_s=0.0)


def test_gold_depends_on_prompt_text_and_seed_alone() -> None:
    one, same, other = GoldNetwork(1), GoldNetwork(1), GoldNetwork(2)
    texts = ["", *LETTERS, "abc", "cba", "aabbccdd"]
    assert [one("abcd", text) for text in texts] == [same("abcd", text) for text in texts]
    assert one("abcd", "abc") != other("abcd", "abc")
    assert one("abcd", "abc") != one("efgh", "abc"), "the prompt counts"
    assert one("abcd", "abc") != one("abcd", "cba"), "the order counts"
    one.standardise(["abcd"] * len(texts), texts)
    scores = [one("abcd", text) for text in texts]
    assert (np.mean(scores), np.std(scores)) == pytest.approx((0.0, 1.0))


def made(golds: list[float], chosen: int, regret: float) -> SeedResult:
    rows = [
        Checkpoint(
            updates=n,
            kl=float(n),
            proxy=float(n),
            gold=gold,
            second=0.0,
            selection_gold=gold,
            selection_second=0.0,
        )
        for n, gold in enumerate(golds)
    ]
    return SeedResult(
        seed=0,
        proxy_accuracy=0.6,
        checkpoints=rows,
        best_of_n=[{"n": 1, "kl": 0.0, "proxy": 0.0, "gold": 0.0}],
        turning_point=None,
        chosen={"gold": chosen, "second": chosen, "last": len(golds) - 1},
        regret={"gold": regret, "second": regret, "last": regret},
        wall_s=1.0,
    )


def test_the_verdict_asks_for_a_fall_and_a_good_choice_on_four_of_five() -> None:
    good = made([0.0, 0.5, 1.0, 0.9, 0.6, 0.5, 0.4, 0.3], 2, 0.0)
    rises = made([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 7, 0.0)
    bad_choice = made([0.0, 0.5, 1.0, 0.9, 0.6, 0.5, 0.4, 0.3], 5, 0.5)
    assert good.falls
    assert not rises.falls
    assert passed([good] * 5)
    assert passed([good] * 4 + [bad_choice])
    assert not passed([good] * 3 + [bad_choice] * 2)
    assert not passed([good] * 3 + [rises] * 2)


def test_table_and_picture_tell_of_every_seed() -> None:
    results = [made([0.0, 0.5, 1.0, 0.9, 0.6, 0.4], 2, 0.0), made([0.0, 1.0, 0.5, 0.4], 0, 1.0)]
    text = table(results)
    assert "gives away at most 10 % on 1" in text
    drawn = picture([replace(result, seed=seed) for seed, result in enumerate(results)])
    assert drawn.count("<g transform") == 2
    assert "seed 1" in drawn


def test_an_algorithm_without_samples_is_refused() -> None:
    found = CliRunner().invoke(app, ["lab", "overoptimize", "--algorithm", "dpo"])
    assert isinstance(found.exception, UsageError)
    assert "does not sample" in str(found.exception)
