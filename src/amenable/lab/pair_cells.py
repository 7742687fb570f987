"""The table of gradients, second part: algorithms that learn from labelled pairs.

Pairs are two independent draws of the policy at hand, labelled by Bradley and Terry with the
rewards as logits. Losses are written out once more from their papers, over all pairs at once, and
differentiated through the enumerated log-probabilities.

P prompts, S completions; a loss is [P, S, S] of (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amenable.lab.expected_gradients import Enumerated
from amenable.lab.gradient_cells import Cell, Estimator

BATCH = 24
"""Pairs of a step."""

SMOOTHING, FLIPS = 0.1, 0.2
SIMPO_BETA, SIMPO_MARGIN = 2.0, 0.5
ORPO_WEIGHT = 0.5

_SIMULATED, _PARTS = 4000, 10
"""Batches, and how often as many, from which KTO's expectation is taken."""


def labelled_mass(enumerated: Enumerated) -> Tensor:
    """[P, S, S] probability that a pair is (chosen, rejected); sums to 1 for each prompt."""
    mass, rewards = enumerated.masses, enumerated.rewards
    wins = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    return 2 * mass[:, :, None] * mass[:, None, :] * wins


def of_labelled_pairs(losses: Callable[[Enumerated], Tensor]) -> Estimator:
    """The mean loss over all labelled pairs: exact, as batches have a fixed number of pairs."""

    def expected(enumerated: Enumerated, cell: Cell) -> Tensor:
        mass = labelled_mass(enumerated)
        return enumerated.gradient_of((mass * losses(enumerated)).sum() / len(mass))

    return expected


def _implied(enumerated: Enumerated) -> Tensor:
    """[P, S, S] beta times the lead in log-ratio."""
    ratios = enumerated.logprobs.sum(2) - enumerated.reference.sum(2)
    return enumerated.beta * (ratios[:, :, None] - ratios[:, None, :])


def _dpo(enumerated: Enumerated) -> Tensor:
    return -_implied(enumerated).sigmoid().log()


def _ipo(enumerated: Enumerated) -> Tensor:
    return (_implied(enumerated) / enumerated.beta - 1 / (2 * enumerated.beta)) ** 2


def _cdpo(enumerated: Enumerated) -> Tensor:
    lead = _implied(enumerated)
    return -(1 - SMOOTHING) * lead.sigmoid().log() - SMOOTHING * (-lead).sigmoid().log()


def _robust(enumerated: Enumerated) -> Tensor:
    lead = _implied(enumerated)
    mixed = -(1 - FLIPS) * lead.sigmoid().log() + FLIPS * (-lead).sigmoid().log()
    return mixed / (1 - 2 * FLIPS)


def _simpo(enumerated: Enumerated) -> Tensor:
    means = enumerated.logprobs.sum(2) / enumerated.lengths
    lead = SIMPO_BETA * (means[:, :, None] - means[:, None, :]) - SIMPO_MARGIN
    return -lead.sigmoid().log()


def _orpo(enumerated: Enumerated) -> Tensor:
    means = enumerated.logprobs.sum(2) / enumerated.lengths
    odds = means - (1 - means.exp()).log()
    lead = odds[:, :, None] - odds[:, None, :]
    return -means[:, :, None] - ORPO_WEIGHT * lead.sigmoid().log()


def of_kto(enumerated: Enumerated, cell: Cell) -> Tensor:
    """KTO, whose reference point is drawn with the batch: the mean over many simulated batches.

    A pair's loss is the mean of sigmoid(-g) of the chosen and sigmoid(g) of the rejected, with
    g = beta (log-ratio - z) and z the batch's mean log-ratio, at least 0, of each next pair's
    completions behind a pair's prompt.
    """
    ratios = enumerated.log_ratios.sum(2)
    prompts, size = ratios.shape
    flat = labelled_mass(enumerated).flatten() / prompts
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(prompts * size, dtype=torch.float64)
    for _ in range(_PARTS):
        drawn = torch.multinomial(
            flat, _SIMULATED * cell.prompts, replacement=True, generator=generator
        ).view(_SIMULATED, cell.prompts)
        prompt, rest = drawn // size**2, drawn % size**2
        sides = torch.stack([rest // size, rest % size])
        point = ratios[prompt, sides.roll(-1, dims=2)].mean((0, 2)).clamp(min=0)
        gain = enumerated.beta * (ratios[prompt, sides] - point[:, None])
        slope = enumerated.beta * gain.sigmoid() * (-gain).sigmoid() / 2
        slope[0] *= -1
        total.index_add_(0, (prompt * size + sides).flatten(), slope.flatten())
    count = _PARTS * _SIMULATED * cell.prompts
    coefficients = (total / count * prompts).view(prompts, size, 1) * enumerated.mask
    return enumerated.gradient(coefficients)


def _cell(algorithm: str, expected: Estimator, bias: str, **keys: float) -> Cell:
    return Cell(
        algorithm=algorithm,
        name="drawn labels",
        expected=expected,
        bias=bias,
        keys={f"policy.preference.{key}": value for key, value in keys.items()},
        prompts=BATCH,
    )


PAIR_CELLS = (
    _cell("dpo", of_labelled_pairs(_dpo), "none for its own loss"),
    _cell("ipo", of_labelled_pairs(_ipo), "none for its own loss"),
    _cell("cdpo", of_labelled_pairs(_cdpo), "labels are taken to be smoothed", label_smoothing=0.1),
    _cell("robust-dpo", of_labelled_pairs(_robust), "labels are taken to be noisy", flip_rate=0.2),
    _cell("kto", of_kto, "the reference point is drawn with the batch: O(1/N)"),
    _cell(
        "simpo",
        of_labelled_pairs(_simpo),
        "none for its own loss",
        simpo_beta=SIMPO_BETA,
        simpo_margin=SIMPO_MARGIN,
    ),
    _cell("orpo", of_labelled_pairs(_orpo), "none for its own loss", orpo_weight=ORPO_WEIGHT),
)
"""The off-policy table."""
