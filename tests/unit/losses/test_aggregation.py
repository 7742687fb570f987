from __future__ import annotations

import pytest
import torch

from amenable.losses.aggregation import token_weights

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_weights_by_hand() -> None:
    """Lengths 3 and 1, and one row that is no completion. token: 1/4 each; sequence: 1/6 thrice and
    1/2; constant with length 8: 1/16 each.
    """
    expected = {
        "token": [[0.25, 0.25, 0.25], [0.25, 0, 0], [0, 0, 0]],
        "sequence": [[1 / 6, 1 / 6, 1 / 6], [0.5, 0, 0], [0, 0, 0]],
        "constant": [[1 / 16, 1 / 16, 1 / 16], [1 / 16, 0, 0], [0, 0, 0]],
    }
    for aggregation, rows in expected.items():
        weights = token_weights(MASK, aggregation, length=8)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, torch.tensor(rows))


def test_each_is_the_mean_that_it_is_named_for() -> None:
    """Losses 1, 2, 6 and 5: over tokens 14/4, over completions (3 + 5) / 2, of sums (9 + 5) / 2."""
    losses = torch.tensor([[1.0, 2.0, 6.0], [5.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    sums = [
        (token_weights(MASK, aggregation) * losses).sum().item()
        for aggregation in ("token", "sequence", "constant")
    ]
    assert sums == pytest.approx([3.5, 4.0, 7.0])


def test_lengths_that_are_equal_make_them_one() -> None:
    mask = torch.ones(4, 5, dtype=torch.bool)
    token, sequence = token_weights(mask, "token"), token_weights(mask, "sequence")
    torch.testing.assert_close(token, sequence)
    torch.testing.assert_close(token, token_weights(mask, "constant", length=5))


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_an_empty_mask_has_no_weight(aggregation) -> None:
    for mask in (torch.zeros(2, 3).bool(), torch.zeros(0, 3).bool()):
        weights = token_weights(mask, aggregation, dtype=torch.float64)
        assert weights.dtype == torch.float64
        assert not weights.any()


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="mask must be bool"):
        token_weights(MASK.long(), "token")
    with pytest.raises(ValueError, match="mask must have 2 dimensions"):
        token_weights(MASK[0], "token")
    with pytest.raises(ValueError, match="length must be above 0, is 0"):
        token_weights(MASK, "constant", length=0)
    with pytest.raises(ValueError, match=r"aggregation must be 'token', .* is 'mean'"):
        token_weights(MASK, "mean")  # type: ignore[arg-type]
