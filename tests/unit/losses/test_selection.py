from __future__ import annotations

import math

import pytest
import torch

from amenable.losses.selection import best_of_n, choice_probabilities, sampled_choices

LOG = math.log
NAN = float("nan")


def test_best_of_n_by_hand() -> None:
    """The highest; the first of several; the only one; infinities count."""
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0], [-math.inf, -1.0, -2.0]])
    assert best_of_n(scores).tolist() == [1, 0, 1]
    assert best_of_n(scores[:, :1]).tolist() == [0, 0, 0]
    assert best_of_n(torch.tensor([[0.0, math.inf, math.inf]])).tolist() == [1]


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no completion"):
        best_of_n(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="scores of prompt 1 hold NaN"):
        best_of_n(torch.tensor([[1.0, 2.0], [NAN, 3.0]]))
    with pytest.raises(ValueError, match="scores must have 2 dimensions"):
        best_of_n(torch.zeros(3))
    with pytest.raises(ValueError, match="scores must be float32 or float64"):
        best_of_n(torch.zeros(1, 2).half())


def test_probabilities_by_hand() -> None:
    """A lead of log 3 wins 3 times in 4; equals half the time; 200 logits always."""
    first, second = torch.tensor([LOG(3), 0.0, 7.0, 200.0]), torch.tensor([0.0, LOG(3), 7.0, 0.0])
    assert choice_probabilities(first, second).tolist() == pytest.approx([0.75, 0.25, 0.5, 1.0])


def test_choices_are_sampled_by_their_probability() -> None:
    """3/4: the draws 0, 1/4 and 1/2 of 0, 1/4, 1/2, 3/4 choose the first. A draw of 0 never chooses
    what has probability 0.
    """
    first, second = torch.full((4,), LOG(3)), torch.zeros(4)
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.7501])
    assert sampled_choices(first, second, uniform).tolist() == [True, True, True, False]
    assert sampled_choices(second[:1] - 1e4, second[:1], uniform[:1]).tolist() == [False]


def test_the_share_of_choices_is_the_probability() -> None:
    """20,000 seeded draws at 3/4: a share within four standard errors, 0.0122."""
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    choices = sampled_choices(torch.full((20_000,), LOG(3)), torch.zeros(20_000), uniform)
    assert choices.float().mean().item() == pytest.approx(0.75, abs=0.0122)


def test_wrong_pairs_are_refused() -> None:
    scores = torch.zeros(3)
    with pytest.raises(ValueError, match="shapes must be equal"):
        choice_probabilities(scores, scores[:1])
    with pytest.raises(ValueError, match="second must be float32 or float64"):
        choice_probabilities(scores, scores.half())
    with pytest.raises(ValueError, match=r"uniform \(1,\)"):
        sampled_choices(scores, scores, scores[:1])
    with pytest.raises(ValueError, match="uniform must be float32 or float64"):
        sampled_choices(scores, scores, scores.half())
    for bad in (-0.1, 1.0, NAN):
        with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\)"):
            sampled_choices(scores, scores, torch.full((3,), bad))
