"""What each algorithm's gradient is in expectation, summed over all completions in float64.

Nothing of `amenable.losses` or `amenable.train` is used: token log-probabilities come from the
model's plain forward pass, and the rest is arithmetic on tables.

An estimator is a function of sums over independent units (a prompt's G completions, or one
completion): sum_j V_j h_j(means of scalars), with V_j = mean over units of
sum_i a_i sum_t c_t grad logprob_t. Means over a batch stand in the denominators (a batch's tokens,
its deviation), so the expectation is not h at the means. It is taken to second order:

    E V h = E[V (h + h' . (k - E k) / n + tr(h'' Cov k) / (2 n))],  n units in a batch

which leaves a bias of order 1 / n^2. Where h is constant it is exact.

P prompts, S completions, C tokens of the longest, G completions of a group, K scalars, D weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amenable.lab.problems import PAD_ID, Problem

Factor = Callable[[Tensor], Tensor]
"""A scalar from the means [K] of the scalars."""


@dataclass(frozen=True)
class Enumerated:
    """Every completion of every prompt under policy and reference; float64, nats."""

    logprobs: Tensor
    """[P, S, C] of the policy, with a graph to its weights; 0 behind the end."""

    reference: Tensor
    """[P, S, C]"""

    tokens: Tensor
    """[S, C] ids, the pad token behind the end."""

    rewards: Tensor
    """[P, S]"""

    beta: float
    """Weight of the KL term."""

    weights: Sequence[nn.Parameter]
    """D numbers in all."""

    @property
    def mask(self) -> Tensor:
        """[S, C] True at real tokens."""
        return self.tokens != PAD_ID

    @property
    def masses(self) -> Tensor:
        """[P, S] probabilities of the completions, as constants."""
        return self.logprobs.detach().sum(2).exp()

    @property
    def lengths(self) -> Tensor:
        """[S] real tokens."""
        return self.mask.sum(1).double()

    @property
    def log_ratios(self) -> Tensor:
        """[P, S, C] policy against reference, as constants."""
        return self.logprobs.detach() - self.reference

    def gradient(self, coefficients: Tensor) -> Tensor:
        """[D] mean over prompts of the sum of c grad logprob over all tokens, c [P, S, C]."""
        return self.gradient_of((coefficients * self.logprobs).sum(2).sum(1).mean())

    def gradient_of(self, value: Tensor) -> Tensor:
        """[D] of a scalar of the log-probabilities."""
        parts = torch.autograd.grad(value, list(self.weights), retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(weight) if part is None else part).flatten()
                for weight, part in zip(self.weights, parts, strict=True)
            ]
        )

    def reward_gradient(self) -> Tensor:
        """[D] of E r, through the probabilities themselves."""
        return self.gradient_of((self.logprobs.sum(2).exp() * self.rewards).sum(1).mean())

    def kl_gradient(self) -> Tensor:
        """[D] of KL(policy || reference), through the probabilities themselves."""
        policy = self.logprobs.sum(2)
        return self.gradient_of((policy.exp() * (policy - self.reference.sum(2))).sum(1).mean())

    def objective_gradient(self) -> Tensor:
        """[D] of J = E r - beta KL(policy || reference)."""
        return self.reward_gradient() - self.beta * self.kl_gradient()


def enumerate_tokens(
    problem: Problem, model: PreTrainedModel, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [P, S, C] of every token at a temperature, and their ids [S, C]."""
    ids = [problem.completion_ids(text) for text in problem.texts]
    width = max(map(len, ids))
    targets = torch.tensor([[*own, *[PAD_ID] * (width - len(own))] for own in ids])
    found = []
    for prompt in problem.prompts:
        start = torch.tensor(problem.prompt_ids(prompt)).expand(len(ids), -1)
        logits = model(input_ids=torch.cat([start, targets], 1)).logits.double() / temperature
        predicting = logits[:, start.shape[1] - 1 : -1]
        every = predicting - predicting.logsumexp(2, keepdim=True)
        picked = every.gather(2, targets[..., None])[..., 0]
        found.append(torch.where(targets != PAD_ID, picked, 0.0))
    return torch.stack(found), targets


@dataclass(frozen=True)
class Unit:
    """The independent part of a batch, of one prompt: G completions, each one of S."""

    mass: Tensor
    """[S] * G probability of each outcome."""

    terms: Sequence[tuple[Tensor, Tensor]]
    """(a, c) of each V: weights of the members [G, S, ... S], and of tokens [S, C]."""

    scalars: Sequence[Tensor] = ()
    """[S] * G each."""


def expectation(
    enumerated: Enumerated, units: Sequence[Unit], factors: Sequence[Factor], count: int
) -> Tensor:
    """[D] of the estimator sum_j V_j factor_j(means of scalars), to second order in 1 / count.

    Args:
        enumerated: the tables.
        units: of each prompt; a batch holds as many of each.
        factors: one for each term of the units.
        count: units in a batch.
    """
    scalars = [_flat(unit) for unit in units]
    own_means = [values @ unit.mass.flatten() for values, unit in zip(scalars, units, strict=True)]
    means = torch.stack(own_means).mean(0)
    centred = [values - own[:, None] for values, own in zip(scalars, own_means, strict=True)]
    spread = torch.stack(
        [(c * unit.mass.flatten()) @ c.T for c, unit in zip(centred, units, strict=True)]
    ).mean(0)
    coefficients = torch.zeros_like(enumerated.logprobs.detach())
    for term, factor in enumerate(factors):
        level, slope, bend = _expanded(factor, means)
        mean = level + 0.5 * (bend * spread).sum() / count
        for prompt, unit in enumerate(units):
            shape = unit.mass.shape
            weight = unit.mass * (mean + (slope @ centred[prompt]).view(shape) / count)
            members, tokens = unit.terms[term]
            coefficients[prompt] += _by_completion(weight * members)[:, None] * tokens
    return enumerated.gradient(coefficients)


def _flat(unit: Unit) -> Tensor:
    size = unit.mass.numel()
    return (
        torch.stack([own.flatten() for own in unit.scalars])
        if unit.scalars
        else torch.zeros(0, size, dtype=torch.float64)
    )


def _expanded(factor: Factor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient [K] and second derivatives [K, K]."""
    if not len(means):
        return factor(means), means, means[:, None] * means
    point = means.clone().requires_grad_()
    value = factor(point)
    slope = torch.autograd.functional.jacobian(factor, point)
    return value.detach(), slope, torch.autograd.functional.hessian(factor, point)


def _by_completion(weights: Tensor) -> Tensor:
    """[S] from [G, S, ... S]: sum over all that the other members may be."""
    group = len(weights)
    total = torch.zeros(weights.shape[1], dtype=weights.dtype)
    for member in range(group):
        others = tuple(axis for axis in range(group) if axis != member)
        total += weights[member].sum(others) if others else weights[member]
    return total


def outcomes(values: Tensor, group: int) -> Tensor:
    """[G, S, ... S]: the value of each member, at every outcome, of [S] values."""
    size = len(values)
    return torch.stack(
        [
            values.view([size if axis == member else 1 for axis in range(group)]).expand(
                [size] * group
            )
            for member in range(group)
        ]
    )


def masses_of_groups(masses: Tensor, group: int) -> Tensor:
    """[S] * G probabilities of independent draws."""
    return outcomes(masses, group).prod(0)
