from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from amenable.config.preference import PreferenceConfig
from amenable.train.pair_losses import LOSSES, Pairs

WITH_TIES = [name for name, row in LOSSES.items() if row.ties]


def some_pairs(tied: Sequence[bool], size: int = 5) -> Pairs:
    generator = torch.Generator().manual_seed(3)
    four = -4 - 3 * torch.rand(4, size, generator=generator, dtype=torch.float64)
    return Pairs(
        policy_chosen=four[0],
        policy_rejected=four[1],
        ref_chosen=four[2],
        ref_rejected=four[3],
        chosen_tokens=torch.tensor([3, 4, 5, 6, 7][:size]),
        rejected_tokens=torch.tensor([5, 5, 2, 3, 9][:size]),
        tied=torch.tensor(tied),
        reference_point=torch.tensor(0.25, dtype=torch.float64),
    )


def other_label(pairs: Pairs) -> Pairs:
    return Pairs(
        *pairs.swapped,
        chosen_tokens=pairs.rejected_tokens,
        rejected_tokens=pairs.chosen_tokens,
        tied=pairs.tied,
        reference_point=pairs.reference_point,
    )


@pytest.mark.parametrize("name", WITH_TIES)
def test_a_tie_is_either_label_with_probability_one_half(name: str) -> None:
    """Its loss is the mean over both labels, so the order of its candidates is immaterial."""
    config, loss = PreferenceConfig(beta=0.7), LOSSES[name].loss
    won, lost = (
        loss(p, config) for p in (some_pairs([False] * 5), other_label(some_pairs([False] * 5)))
    )
    assert float((won - lost).abs().min()) > 1e-3
    ties = some_pairs([True] * 5)
    torch.testing.assert_close(loss(ties, config), (won + lost) / 2)
    torch.testing.assert_close(loss(other_label(ties), config), loss(ties, config))
    mixed = loss(some_pairs([True, False, False, True, False]), config)
    torch.testing.assert_close(mixed[[1, 2, 4]], won[[1, 2, 4]])
    torch.testing.assert_close(mixed[[0, 3]], (won + lost)[[0, 3]] / 2)


def test_a_tie_chooses_nothing_to_be_likely() -> None:
    pairs = some_pairs([True, False, True, False, False])
    chosen = pairs.policy_chosen.tolist()
    expected = [0.0, -chosen[1] / 4, 0.0, -chosen[3] / 6]
    assert pairs.chosen_nll[:4].tolist() == pytest.approx(expected)


def by_hand(name: str, row: tuple[float, ...], tokens: tuple[int, int], z: float) -> float:
    """The loss of one pair from scalars, at beta 0.7, e = 0.2 and the other settings below."""
    pc, pr, rc, rr = row
    lead = (pc - pr) - (rc - rr)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    won, lost = -math.log(sigmoid(0.7 * lead)), -math.log(sigmoid(-0.7 * lead))
    mc, mr = pc / tokens[0], pr / tokens[1]

    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    return {
        "dpo": won,
        "ipo": (lead - 1 / 1.4) ** 2,
        "cdpo": 0.8 * won + 0.2 * lost,
        "robust-dpo": (0.8 * won - 0.2 * lost) / 0.6,
        "kto": (2 * sigmoid(-0.7 * (pc - rc - z)) + 3 * sigmoid(0.7 * (pr - rr - z))) / 2,
        "simpo": -math.log(sigmoid(1.5 * (mc - mr) - 0.4)),
        "orpo": -mc - 0.3 * math.log(sigmoid(math.log(odds(mc) / odds(mr)))),
    }[name]


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_by_hand(name: str) -> None:
    config = PreferenceConfig(
        beta=0.7,
        label_smoothing=0.2,
        flip_rate=0.2,
        simpo_beta=1.5,
        simpo_margin=0.4,
        orpo_weight=0.3,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    pairs = some_pairs([False] * 5)
    tokens = zip(pairs.chosen_tokens.tolist(), pairs.rejected_tokens.tolist(), strict=True)
    rows = zip(*(side.tolist() for side in pairs.four), strict=True)
    expected = [by_hand(name, row, own, 0.25) for row, own in zip(rows, tokens, strict=True)]
    assert LOSSES[name].loss(pairs, config).tolist() == pytest.approx(expected, rel=1e-9)
