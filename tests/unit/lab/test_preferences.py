from __future__ import annotations

import numpy as np
import pytest

from amenable.lab.optima import kl, normalised, pi_star
from amenable.lab.preferences import (
    kto_gap,
    least_loss_policy,
    likelihood_and_odds,
    logistic,
    mean_logistic,
    pair_rows,
    pair_tables,
    squared,
)
from amenable.lab.problems import PROBLEMS

from .conftest import SMALL, OpenWorld


def test_pairs_connect_all_completions_in_both_orders(opened: OpenWorld) -> None:
    world, _ = opened(PROBLEMS[1])
    for table in pair_tables(world):
        seen = {(a, b): w for a, b, w in zip(*vars(table).values(), strict=True)}
        assert all(seen[b, a] == pytest.approx(1 - w) for (a, b), w in seen.items())
        reached, front = {0}, {0}
        while front:
            front = {b for a, b in seen if a in front} - reached
            reached |= front
        assert len(reached) == len(world.problem.texts)


def test_rows_name_the_chosen_first_and_carry_its_probability(opened: OpenWorld) -> None:
    world, _ = opened(SMALL)
    rows = list(pair_rows(world, pair_tables(world)))
    row = rows[3]
    places = [SMALL.texts.index(row[f"candidate_{side}"]) for side in (0, 1)]
    lead = world.rewards[0][places[0]] - world.rewards[0][places[1]]
    assert row["choice"] == 0
    assert row["weight"] == pytest.approx(1 / (1 + np.exp(-lead)))


def test_dpo_on_exact_labels_has_pi_star_for_its_minimum(opened: OpenWorld) -> None:
    """Rafailov et al. 2023: the search finds what theory says, from another direction."""
    world, _ = opened(PROBLEMS[1])
    found = least_loss_policy(world, logistic(world.problem.beta))
    assert kl(found, world.pi_star) < 1e-8


def test_flipped_labels_move_the_minimum(opened: OpenWorld) -> None:
    world, _ = opened(PROBLEMS[1])
    found = least_loss_policy(world, logistic(world.problem.beta), flip_rate=0.1)
    assert kl(found, world.pi_star) > 0.01


def test_ipo_on_all_pairs_tends_to_its_closed_form(opened: OpenWorld) -> None:
    """Azar et al. 2023: ref(y) exp(P(y better than mu) / tau), where every pair is there."""
    world, _ = opened(SMALL)
    count, tau = len(SMALL.texts), 0.3
    assert count == 7, "neighbours at 1 and 6 of 7 are one ring"
    found = least_loss_policy(world, squared(tau))
    for row, (table, policy) in enumerate(zip(pair_tables(world), found, strict=True)):
        # on a ring each lead is (p - 1/2) / tau, less what the leads of the whole ring miss 0 by
        ratio = policy - world.reference[row]
        edges = np.arange(count)
        leads = ratio[table.chosen[edges]] - ratio[table.rejected[edges]]
        wanted = (table.weight[edges] - 0.5) / tau
        assert np.allclose(leads, wanted - wanted.mean(), atol=1e-6)


@pytest.mark.parametrize("loss", [mean_logistic(2.0, 1.0), likelihood_and_odds(0.5)])
def test_no_small_move_lowers_the_loss(opened: OpenWorld, loss: object) -> None:
    """The minimum is one: random moves of the logits never end lower (checked through a search)."""
    world, _ = opened(SMALL)
    found = least_loss_policy(world, loss)  # type: ignore[arg-type]
    again = least_loss_policy(world, loss)  # type: ignore[arg-type]
    assert np.array_equal(found, again)
    assert np.allclose(np.exp(found).sum(1), 1)
    assert kl(world.reference, found) > 0.01


def test_kto_gap_is_one_at_the_reference_and_falls_towards_the_boundary(opened: OpenWorld) -> None:
    world, _ = opened(PROBLEMS[1])
    assert kto_gap(world, world.reference) == pytest.approx(1)
    good = world.rewards > np.median(world.rewards, axis=1, keepdims=True)
    gaps = [
        kto_gap(world, normalised(world.reference + np.where(good, 0.0, -push)))
        for push in (0.5, 2.0, 6.0)
    ]
    assert 1 > gaps[0] > gaps[1] > gaps[2] > 0


def test_nothing_undercuts_kto_s_infimum(opened: OpenWorld) -> None:
    """Random policies, and the closed form for another reward, stay above the bound."""
    world, _ = opened(SMALL)
    generator = np.random.default_rng(0)
    for scale in (0.5, 2.0, 8.0, 30.0):
        for _ in range(50):
            noise = generator.standard_normal(world.reference.shape)
            assert kto_gap(world, normalised(world.reference + scale * noise)) > 0
    assert kto_gap(world, pi_star(world.reference, world.rewards, 0.001)) > 0
