from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from amenable.errors import RecipeError
from amenable.rollout.types import Sampling, uniform_noise


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature and top_k >= 0"),
        ({"max_new_tokens": 1, "top_k": -1}, "temperature and top_k >= 0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0.0"),
        ({"max_new_tokens": 1, "top_p": 1.1}, r"top_p must lie in \(0, 1\], not 1.1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"top_p": 0.99}, {"top_k": 50}, {"temperature": 0.0}])
def test_training_refuses_samplers_that_are_not_the_policy(settings: dict[str, Any]) -> None:
    sampling = Sampling(max_new_tokens=4, **settings)
    with pytest.raises(RecipeError, match="set top_p = 1, top_k = 0 and temperature > 0"):
        sampling.check_trainable()


def test_training_takes_pure_samples_at_any_temperature() -> None:
    Sampling(max_new_tokens=4, temperature=0.7).check_trainable()


def test_noise_is_pinned() -> None:
    """The same numbers on every machine and with every version: these were drawn once."""
    noise = uniform_noise((0, "collect", "row-1", 0), 3)
    np.testing.assert_allclose(noise, PINNED, rtol=0, atol=1e-15)


PINNED = [0.780448916977342, 0.8094934713190185, 0.9633021729074225]


def test_noise_depends_on_every_part_of_the_key() -> None:
    keys: list[tuple[int | str, ...]] = [
        (0, 1, "a", 0),
        (1, 1, "a", 0),
        (0, 2, "a", 0),
        (0, 1, "b", 0),
        (0, 1, "a", 1),
        (0, "1", "a", 0),
    ]
    first = [uniform_noise(key, 1)[0] for key in keys]
    assert len(set(first)) == len(keys)


def test_a_longer_completion_begins_with_the_same_noise() -> None:
    key = (0, 1, "a", 0)
    np.testing.assert_array_equal(uniform_noise(key, 50)[:7], uniform_noise(key, 7))


def test_noise_is_uniform_within_and_across_keys() -> None:
    across = [uniform_noise((0, step, "prompt", 0), 1)[0] for step in range(2000)]
    for sample in (uniform_noise((3,), 2000), np.array(across)):
        assert sample.min() >= 0
        assert sample.max() < 1
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
