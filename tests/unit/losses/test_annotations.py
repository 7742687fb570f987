"""The shapes that the signatures promise are the shapes that come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from amenable.losses import (
    advantages,
    aggregation,
    direct_preference,
    kl,
    kto,
    likelihood,
    masked,
    policy,
    preference,
    reference_free,
    selection,
    ties,
    value,
)

N, C, V = 2, 3, 5
TOKENS = torch.zeros(N, C)
MASK = torch.ones(N, C, dtype=torch.bool)
ROWS = torch.zeros(N)
COUNTS = torch.ones(N, dtype=torch.int64)
SCALAR = torch.tensor(2.0)
CALLS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (masked.masked_sum, (TOKENS, MASK, 1)),
    (masked.masked_mean, (TOKENS, MASK)),
    (masked.masked_var, (TOKENS, MASK)),
    (masked.masked_whiten, (TOKENS, MASK)),
    (likelihood.token_logprobs, (torch.zeros(N, C, V), torch.zeros(N, C, dtype=torch.int64))),
    (likelihood.token_entropy, (torch.zeros(N, C, V),)),
    (likelihood.sequence_logprobs, (TOKENS, MASK)),
    (likelihood.cross_entropy, (TOKENS, MASK)),
    (likelihood.mean_logprobs, (ROWS, COUNTS)),
    (preference.bradley_terry_loss, (ROWS, ROWS, ROWS)),
    (preference.tie_loss, (ROWS, ROWS)),
    (preference.centring_loss, (ROWS, ROWS)),
    (preference.length_margin, (COUNTS, COUNTS, 0.1)),
    (preference.length_margin, (COUNTS, COUNTS, SCALAR)),
    (direct_preference.dpo_loss, (ROWS, ROWS, ROWS, ROWS, 0.1)),
    (direct_preference.soft_dpo_loss, (ROWS, ROWS, ROWS, ROWS, ROWS, 0.1)),
    (direct_preference.conservative_dpo_loss, (ROWS, ROWS, ROWS, ROWS, 0.1, 0.1)),
    (direct_preference.robust_dpo_loss, (ROWS, ROWS, ROWS, ROWS, 0.1, 0.1)),
    (direct_preference.ipo_loss, (ROWS, ROWS, ROWS, ROWS, 0.1)),
    (reference_free.simpo_loss, (ROWS, ROWS, COUNTS, COUNTS, 2.0, 0.5)),
    (reference_free.odds_ratio_loss, (ROWS, ROWS, COUNTS, COUNTS)),
    (kto.kto_loss, (ROWS, ROWS, ROWS.bool(), SCALAR, 0.1, 1.0, 1.0)),
    (kto.kto_reference_point, (ROWS, ROWS)),
    (ties.rao_kupper_loss, (ROWS, ROWS, ROWS.bool(), 2.0)),
    (ties.davidson_loss, (ROWS, ROWS, ROWS.bool(), SCALAR)),
    (selection.best_of_n, (TOKENS,)),
    (selection.choice_probabilities, (ROWS, ROWS)),
    (selection.sampled_choices, (ROWS, ROWS, ROWS)),
    (aggregation.token_weights, (MASK, "sequence")),
    (policy.ratios, (TOKENS, TOKENS)),
    (policy.ppo_policy_loss, (TOKENS, TOKENS, TOKENS, 0.2)),
    (policy.clipped_tokens, (TOKENS, TOKENS, TOKENS, (0.2, 0.3), 3.0)),
    (policy.sequence_ratios, (TOKENS, TOKENS, MASK)),
    (policy.gspo_policy_loss, (TOKENS, TOKENS, TOKENS, MASK, 0.2)),
    (policy.gspo_clipped_tokens, (TOKENS, TOKENS, TOKENS, MASK, 0.2)),
    (value.value_loss, (TOKENS, TOKENS, TOKENS, 0.2)),
    (value.explained_variance, (TOKENS, TOKENS, MASK)),
    (advantages.shape_rewards, (ROWS, TOKENS, MASK, 0.1)),
    (advantages.gae, (TOKENS, TOKENS, MASK, 1.0, 0.95)),
    (advantages.group_relative, (TOKENS,)),
    (advantages.leave_one_out, (TOKENS,)),
    (advantages.reinforce_plus_plus, (TOKENS, MASK)),
    (kl.k1, (TOKENS, TOKENS)),
    (kl.k2, (TOKENS, TOKENS)),
    (kl.k3, (TOKENS, TOKENS)),
    (kl.kl_loss, (TOKENS, TOKENS, TOKENS)),
    (kl.sequence_kl, (TOKENS, MASK)),
]


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_signatures_hold(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    jaxtyped(function, typechecker=beartype)(*arguments)


def test_a_broken_signature_would_be_noticed() -> None:
    checked = jaxtyped(kl.k1, typechecker=beartype)
    with pytest.raises(TypeCheckError):
        checked(TOKENS, TOKENS[:1])
