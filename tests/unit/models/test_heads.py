from __future__ import annotations

import math

import pytest
import torch

from amenable.models.heads import HeadEnsemble, ScalarHead


def test_score_is_the_weighted_sum_without_bias() -> None:
    head = ScalarHead.from_weight(torch.tensor([[1.0, -2.0, 0.5]]))
    hidden = torch.tensor([[[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]])
    assert head(hidden).tolist() == [[0.0, 0.0]]
    assert head(torch.tensor([3.0, 1.0, 4.0])).item() == 3.0
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_initial_weights_have_the_stated_spread() -> None:
    """Standard deviation 1/sqrt(d + 1); with 40 000 draws its error is about 0.4 %."""
    weight = ScalarHead(40_000, seed=1).weight.detach()
    assert weight.std().item() * math.sqrt(40_001) == pytest.approx(1.0, abs=0.02)
    assert abs(weight.mean().item()) * math.sqrt(40_001) < 0.02
    assert torch.equal(weight, ScalarHead(40_000, seed=1).weight)
    assert not torch.equal(weight, ScalarHead(40_000, seed=2).weight)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    ScalarHead(8, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_from_weight_copies() -> None:
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    head = ScalarHead.from_weight(weight)
    weight.zero_()
    assert head.weight.dtype is torch.float32
    assert head.weight.tolist() == [[1.0] * 4]


def test_head_stays_in_float32_under_autocast() -> None:
    """1 + 2^-12 is no bfloat16 number: a product in half precision would lose it."""
    head = ScalarHead.from_weight(torch.tensor([[1.0, 2.0**-12]]))
    with torch.autocast("cpu", torch.bfloat16):
        score = head(torch.ones(2, dtype=torch.bfloat16))
    assert score.dtype is torch.float32
    assert score.item() == 1 + 2.0**-12


def test_an_ensemble_scores_by_the_mean_of_its_heads() -> None:
    ensemble = HeadEnsemble(8, heads=3, seed=2)
    hidden = torch.randn(5, 8)
    members = ensemble.members(hidden)
    assert members.shape == (5, 3)
    torch.testing.assert_close(ensemble(hidden), members.mean(-1))
    torch.testing.assert_close(ensemble.disagreement(hidden), members.std(-1))
    assert members.std(-1).min() > 0, "the heads start apart"
    again = HeadEnsemble.from_weight(ensemble.weight.detach())
    assert torch.equal(again.weight, ensemble.weight)
    single = ScalarHead.from_weight(ensemble.mean_weight.detach())
    torch.testing.assert_close(single(hidden), ensemble(hidden))
    assert torch.equal(single.members(hidden)[:, 0], single(hidden))
