from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from amenable.config.reward import RewardConfig
from amenable.data.collate import PromptGroup
from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker
from amenable.train.rank_loss import (
    RankLoss,
    bootstrap_weights,
    fitted_length_weight,
    tie_parameter,
    tie_share,
)

LENGTHS = (3, 3)


def pair(choice: Choice = Choice.FIRST, name: str = "p", **changes: Any) -> Preference:
    prompt = Prompt(messages=(Message(Speaker.USER, "Is it wet?"),), id=name, group=name)
    texts = {"candidate_0": "Yes.", "candidate_1": "It is not."}
    return Preference(prompt=prompt, choice=choice, **{**texts, **changes})


def test_label_smoothing_mixes_both_orders() -> None:
    """Gap 2: 0.9 · 0.12693 + 0.1 · 2.12693; a margin of 1 moves both orders by 1."""
    loss = RankLoss(label_smoothing=0.1)
    scores = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    small = math.log1p(math.exp(-2.0))
    expected = 0.9 * small + 0.1 * (small + 2.0)
    rows = [pair(), pair(margin=1.0)]
    assert loss(scores, rows, [LENGTHS] * 2).tolist() == pytest.approx([expected] * 2, abs=1e-5)


def test_centring_asks_for_a_mean_of_zero() -> None:
    scores = torch.tensor([[3.0, 1.0]])
    plain, centred = (
        float(RankLoss(centring_coef=coef)(scores, [pair(weight=2.0)], [LENGTHS])[0])
        for coef in (0.0, 0.1)
    )
    assert centred - plain == pytest.approx(2.0 * 0.1 * 16.0, abs=1e-5)


@pytest.mark.parametrize("ties", ["rao-kupper", "davidson"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_equals_tie_as_often_as_the_training_pairs(ties: Any, share: float) -> None:
    loss = RankLoss(ties=ties, tie_parameter=tie_parameter(ties, share))
    scores = torch.zeros(2, 2)
    losses = loss(scores, [pair(Choice.TIE), pair()], [LENGTHS] * 2)
    assert math.exp(-losses[0]) == pytest.approx(share, rel=1e-4)
    assert math.exp(-losses[1]) == pytest.approx((1 - share) / 2, rel=1e-4)


def test_the_share_of_ties_goes_by_weight_and_is_never_none() -> None:
    rows = [pair(Choice.TIE, weight=1.0), pair(weight=3.0)]
    assert tie_share(rows) == pytest.approx(0.25)
    assert tie_share([pair()]) == 0.001
    assert tie_share([pair(Choice.TIE)]) == 0.99
    config = RewardConfig(ties="davidson")
    group = PromptGroup([1], [[2], [3]])
    assert RankLoss.fit(config, rows, [group] * 2).tie_parameter == pytest.approx(2 / 3)


def test_length_weight_is_the_maximum_likelihood() -> None:
    """Three of four choices fall on the longer by 2 tokens: sigmoid(2 w) = 3 / 4."""
    tokens = [(4, 2), (4, 2), (4, 2), (2, 4)]
    rows = [pair() for _ in tokens]
    assert fitted_length_weight(rows, tokens) == pytest.approx(math.log(3) / 2, abs=1e-4)
    tied = [*rows, pair(Choice.TIE)]
    assert fitted_length_weight(tied, [*tokens, (9, 1)]) == pytest.approx(math.log(3) / 2, abs=1e-4)
    assert fitted_length_weight([pair()], [(4, 2)]) == pytest.approx(1.0, abs=1e-3), "bounded"
    assert fitted_length_weight([pair(Choice.TIE)], [(4, 2)]) == 0.0


def test_what_length_explains_the_scores_need_not() -> None:
    """A choice of the longer costs less at equal scores, and teaches less."""
    config = RewardConfig(length_debias=True)
    groups = [PromptGroup([1], [[2, 3, 4, 5], [2, 3]])] * 3 + [PromptGroup([1], [[2, 3], [2] * 4])]
    loss = RankLoss.fit(config, [pair() for _ in groups], groups)
    scores = torch.zeros(2, 2, requires_grad=True)
    losses = loss(scores, [pair(), pair()], [(4, 2), (2, 4)])
    assert losses.tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)], abs=1e-4)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad[:, 0].tolist() == pytest.approx([-0.25, -0.75], abs=1e-4)


def test_bootstraps_are_poisson_and_differ_by_head() -> None:
    rows = [pair(name=f"p{i}") for i in range(2000)]
    drawn = bootstrap_weights(rows, 3, seed=5)
    assert drawn.shape == (2000, 3)
    assert drawn.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.1)
    assert drawn.var(0).tolist() == pytest.approx([1.0] * 3, abs=0.15)
    assert abs(torch.corrcoef(drawn.T)[0, 1].item()) < 0.1
    again = bootstrap_weights(rows[:7], 3, seed=5)
    assert torch.equal(again, drawn[:7]), "a row's draw depends on nothing but the row"
    assert torch.equal(bootstrap_weights(rows[:7], 1, seed=5), torch.ones(7, 1))
