"""Expected values are those of numpy over everything that was seen."""

from __future__ import annotations

import json

import numpy as np
import torch

from amenable.rollout.rewards import Normaliser

NAN = float("nan")


def test_running_normaliser_counts_all_scores_so_far_this_batch_included() -> None:
    rng = np.random.default_rng(0)
    batches = [1e3 + 5 * rng.normal(size=size) for size in (1, 4, 7, 2)]
    normaliser = Normaliser(running=True)
    for number, batch in enumerate(batches, start=1):
        seen = np.concatenate(batches[:number])
        found = normaliser.apply(torch.tensor(batch))
        spread = seen.std() if len(seen) > 1 else 1.0
        np.testing.assert_allclose(found.numpy(), (batch - seen.mean()) / spread, atol=1e-9)
    assert abs(normaliser.mean - np.concatenate(batches).mean()) < 1e-9


def test_equal_scores_are_only_centred() -> None:
    normaliser = Normaliser(running=True)
    assert normaliser.apply(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]
    assert normaliser.spread == 1.0


def test_what_failed_is_not_counted_and_stays_nan() -> None:
    normaliser = Normaliser(running=True)
    found = normaliser.apply(torch.tensor([1.0, NAN, 3.0]))
    assert found[1].isnan()
    assert found[[0, 2]].tolist() == [-1.0, 1.0]  # mean 2, deviation 1
    assert normaliser.apply(torch.tensor([NAN, NAN])).isnan().all()
    assert (normaliser.mean, normaliser.spread) == (2.0, 1.0)


def test_none_changes_nothing() -> None:
    scores = torch.tensor([1.0, NAN, -7.5])
    normaliser = Normaliser(running=False)
    assert normaliser.apply(scores) is scores
    assert (normaliser.mean, normaliser.spread) == (0.0, 1.0)


def test_state_survives_json_and_continues_to_the_bit() -> None:
    first = Normaliser(running=True)
    first.apply(torch.tensor([0.1, 0.7, -2.3]))
    second = Normaliser(running=True)
    second.load_state(json.loads(json.dumps(first.state())))
    more = torch.tensor([4.4, 0.2])
    assert torch.equal(first.apply(more), second.apply(more))


def test_result_keeps_the_type_of_the_scores() -> None:
    assert Normaliser(running=True).apply(torch.tensor([1.0, 2.0])).dtype is torch.float32
