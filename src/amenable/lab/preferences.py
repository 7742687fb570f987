"""Pairs with noise-free Bradley-Terry labels, and where losses on such pairs are least.

Every completion of a prompt meets others in a connected graph, each pair in both orders, weighted
by the probability that a rater with the true reward in logits would choose so. The mean loss is
then that of infinitely many labels, and its minimum is found here on the logits of all completions,
in float64, with formulas written anew: nothing of `amenable.losses` is used.

S completions of a prompt, n rows of its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from amenable.errors import NumericsError
from amenable.lab.optima import World
from amenable.lab.problems import Floats

_OFFSETS = (1, 6)
"""Each completion, in a shuffled circle, meets its neighbours at these distances."""

_REST = 1e-7
_SEARCH: dict[str, Any] = {
    "method": "L-BFGS-B",
    "options": {"maxiter": 20_000, "maxfun": 50_000, "ftol": 0.0, "gtol": 1e-10, "maxcor": 50},
}


@dataclass(frozen=True)
class PairTable:
    """The rows of one prompt.

    Args:
        chosen: [n] numbers of completions.
        rejected: [n]
        weight: [n] probability of the choice.
    """

    chosen: npt.NDArray[np.int64]
    rejected: npt.NDArray[np.int64]
    weight: Floats


def pair_tables(world: World, flip_rate: float = 0.0) -> list[PairTable]:
    """The rows of each prompt.

    Args:
        world: its rewards are the raters'.
        flip_rate: share of the labels that name the wrong side.
    """
    return [_pairs(rewards, flip_rate, number) for number, rewards in enumerate(world.rewards)]


def _pairs(rewards: Floats, flip_rate: float, seed: int) -> PairTable:
    circle = np.random.default_rng(seed).permutation(len(rewards))
    first = np.concatenate([circle] * len(_OFFSETS))
    second = np.concatenate([np.roll(circle, -offset) for offset in _OFFSETS])
    true = expit(rewards[first] - rewards[second])
    seen = true * (1 - flip_rate) + (1 - true) * flip_rate
    return PairTable(
        chosen=np.concatenate([first, second]),
        rejected=np.concatenate([second, first]),
        weight=np.concatenate([seen, 1 - seen]),
    )


def pair_rows(world: World, tables: list[PairTable]) -> Iterator[dict[str, Any]]:
    """The rows as the data stage writes them."""
    texts = world.problem.texts
    for prompt, table in zip(world.problem.prompts, tables, strict=True):
        rows = zip(table.chosen, table.rejected, table.weight, strict=True)
        for number, (chosen, rejected, weight) in enumerate(rows):
            yield {
                "id": f"{prompt}{number}",
                "group": prompt,
                "input_text": prompt,
                "candidate_0": texts[chosen],
                "candidate_1": texts[rejected],
                "choice": 0,
                "weight": float(weight),
            }


@dataclass(frozen=True)
class Sides:
    """What a loss of pairs may see; tensors [n], float64.

    Args:
        lead: of the chosen side's log-ratio to the reference.
        chosen: its mean log-probability a token.
        rejected: the same of the other side.
    """

    lead: Tensor
    chosen: Tensor
    rejected: Tensor


Loss = Callable[[Sides], Tensor]


def least_loss_policy(world: World, loss: Loss, flip_rate: float = 0.0) -> Floats:
    """[P, S] log-probabilities at which the weighted mean of a loss is least.

    Raises:
        NumericsError: the search did not come to rest.
    """
    texts = world.problem.texts
    lengths = torch.tensor([float(len(world.problem.completion_ids(text))) for text in texts])
    tables = pair_tables(world, flip_rate)
    rows = [
        _least(torch.from_numpy(reference), lengths.double(), table, loss)
        for reference, table in zip(world.reference, tables, strict=True)
    ]
    return np.array(rows)


def _least(reference: Tensor, lengths: Tensor, table: PairTable, loss: Loss) -> Floats:
    a, b = torch.from_numpy(table.chosen), torch.from_numpy(table.rejected)
    weight = torch.from_numpy(table.weight)

    def value_and_gradient(logits: Floats) -> tuple[float, Floats]:
        free = torch.tensor(logits, requires_grad=True)
        policy = log_softmax(free, -1)
        ratio, mean = policy - reference, policy / lengths
        total = (weight * loss(Sides(ratio[a] - ratio[b], mean[a], mean[b]))).sum() / weight.sum()
        (gradient,) = torch.autograd.grad(total, free)
        return float(total.detach()), gradient.numpy()

    found = minimize(value_and_gradient, reference.numpy(), jac=True, **_SEARCH)
    _, gradient = value_and_gradient(found.x)
    if np.abs(gradient).max() > _REST:
        raise NumericsError(
            f"the loss on pairs is not at its least: a gradient of {np.abs(gradient).max():.2g} "
            f"is left ({found.message})"
        )
    result: Floats = log_softmax(torch.from_numpy(found.x), -1).numpy()
    return result


def logistic(beta: float, smoothing: float = 0.0) -> Loss:
    """Of cDPO: -(1 - e) log sigmoid(beta lead) - e log sigmoid(-beta lead)."""
    return lambda sides: (
        (1 - smoothing) * softplus(-beta * sides.lead) + smoothing * softplus(beta * sides.lead)
    )


def squared(beta: float) -> Loss:
    """IPO's: (lead - 1 / (2 beta))^2."""
    return lambda sides: (sides.lead - 1 / (2 * beta)) ** 2


def mean_logistic(beta: float, margin: float) -> Loss:
    """SimPO's: -log sigmoid(beta (difference of mean log-probabilities) - margin)."""
    return lambda sides: softplus(margin - beta * (sides.chosen - sides.rejected))


def likelihood_and_odds(weight: float) -> Loss:
    """ORPO's: nats a token of the chosen side, plus -log sigmoid of the log odds ratio."""

    def log_odds(mean: Tensor) -> Tensor:
        return mean - torch.log(-torch.expm1(mean))

    return lambda sides: (
        -sides.chosen + weight * softplus(log_odds(sides.rejected) - log_odds(sides.chosen))
    )


# KTO -----------------------------------------------------------------------------------------


def kto_gap(world: World, policy: Floats) -> float:
    """Share of KTO's loss, at beta 1, that is left between reference and infimum."""
    start, end = _kto_loss(world, world.reference), _kto_infimum(world)
    return (_kto_loss(world, policy) - end) / (start - end)


def _kto_loss(world: World, policy: Floats) -> float:
    """sum_y u_y sigmoid(h_y - z), h = log(policy / reference); u = undesirable less desirable.

    It leaves out what no policy changes. z = max(0, mean h) over every completion behind every
    prompt, as the mismatched pairs of a large batch give it.
    """
    ratio = policy - world.reference
    z = max(0.0, float(ratio.mean()))
    return sum(
        float(_surplus(table, ratio.shape[1]) @ expit(own - z))
        for table, own in zip(pair_tables(world), ratio, strict=True)
    )


def _surplus(table: PairTable, count: int) -> Floats:
    """[S] weight of a completion as the rejected side less that as the chosen one."""
    signed = np.concatenate([table.weight, -table.weight])
    sides = np.concatenate([table.rejected, table.chosen])
    surplus: Floats = np.bincount(sides, signed, count).astype(np.float64)
    return surplus


def _kto_infimum(world: World) -> float:
    """The loss's lower bound over all policies, at z = 0 (a larger z only takes from the good).

    Nothing on the undesirable; among the desirable sum_y g_y x_y / (1 + x_y), x = policy / ref, is
    largest where g_y / (ref_y (1 + x_y)^2) is the same for all that have x_y > 0.
    """
    total = 0.0
    for table, reference in zip(pair_tables(world), world.reference, strict=True):
        gain = np.maximum(0.0, -_surplus(table, len(reference)))
        mass = np.exp(reference)
        low, high = 1e-12, 1e12
        for _ in range(400):
            price = np.sqrt(low * high)
            share = np.maximum(0.0, np.sqrt(gain / (price * mass)) - 1)
            low, high = (price, high) if mass @ share > 1 else (low, price)
        total -= float(gain @ (share / (1 + share)))
    return total
