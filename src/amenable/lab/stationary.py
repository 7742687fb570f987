"""Where policy gradients rest that have no closed form: the zero of their expected gradient.

For a policy that is free at every prefix s, the expected gradient with respect to the logit of
token a is d(s, a) (Q(s, a) - sum_b pi(b | s) Q(s, b)), with d the probability of passing (s, a) and

    Q(s, a) = E[w(y) c(y, s, a) | y passes (s, a)],   c = advantage(y) - coef (1 - ref / pi)(a | s)

where w is what a token of y counts in the loss, the advantage is the algorithm's in expectation
over the rest of the batch, and the second term of c is the gradient of the k3 penalty. It vanishes
where Q is the same for every token of a prefix. Nothing of `amenable.losses` is used.

P prompts, S completions of each, T tokens; s prefixes, A tokens that may follow one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amenable.errors import NumericsError
from amenable.lab.optima import World, normalised
from amenable.lab.problems import EOS_ID, Floats, Problem

_STEPS = 200_000
_RATE = 0.3
_REST = 1e-9

Advantage = Callable[[Floats, Floats, Floats], Floats]
"""[P, S] expected advantages from (log-probabilities [P, S], rewards [P, S], lengths [S])."""


@dataclass(frozen=True)
class Tree:
    """The completions as paths.

    Args:
        prefix: [S, T] number of the prefix before each token.
        token: [S, T] number of the token, 0 is the end of sequence.
        mask: [S, T] True at real tokens.
        prefixes: how many.
        tokens: how many may follow a prefix.
    """

    prefix: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    prefixes: int
    tokens: int

    @classmethod
    def of(cls, problem: Problem) -> Tree:
        """Of a problem's completions, in their order."""
        numbers = {t: n for n, t in enumerate(problem.texts) if len(t) < problem.max_tokens}
        shape = (len(problem.texts), problem.max_tokens)
        prefix, token = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, bool)
        for row, text in enumerate(problem.texts):
            for column, number in enumerate(problem.completion_ids(text)):
                prefix[row, column] = numbers[text[:column]]
                token[row, column] = number - EOS_ID
                mask[row, column] = True
        return cls(prefix, token, mask, len(numbers), len(problem.letters) + 1)

    @property
    def lengths(self) -> Floats:
        """[S] tokens."""
        counts: Floats = self.mask.sum(1).astype(np.float64)
        return counts

    def passing(self, values: Floats) -> Floats:
        """[s, A] sum over the completions that pass of their [S] or [S, T] values."""
        spread = np.broadcast_to(values.reshape(len(values), -1), self.mask.shape)
        sums = np.zeros((self.prefixes, self.tokens))
        np.add.at(sums, (self.prefix[self.mask], self.token[self.mask]), spread[self.mask])
        return sums

    def conditionals(self, logprobs: Floats) -> Floats:
        """[s, A] next-token log-probabilities of the policy with these sequence ones."""
        passing = self.passing(np.exp(logprobs))
        return normalised(np.log(passing))

    def sequences(self, conditionals: Floats) -> Floats:
        """[S] log-probabilities of whole completions."""
        sums: Floats = np.where(self.mask, conditionals[self.prefix, self.token], 0.0).sum(1)
        return sums


def stationary_policy(
    world: World, advantage: Advantage, *, coef: float, by_length: bool
) -> Floats:
    """[P, S] log-probabilities of the policy at which the expected gradient is zero.

    Args:
        world: reference and rewards.
        advantage: in expectation over the other completions of the batch.
        coef: weight of the per-token k3 penalty in the loss.
        by_length: a token counts 1 / length of its completion; else 1.
    """
    tree = Tree.of(world.problem)
    weight = 1 / tree.lengths if by_length else np.ones_like(tree.lengths)
    start = np.array([tree.conditionals(row) for row in world.reference])
    policy = start.copy()
    for _ in range(_STEPS):
        logprobs = np.array([tree.sequences(row) for row in policy])
        advantages = advantage(logprobs, world.rewards, tree.lengths)
        moves = [
            _move(tree, *own, weight, coef)
            for own in zip(start, policy, np.exp(logprobs), advantages, strict=True)
        ]
        left = max(gradient for _, gradient in moves)
        if left < _REST:
            return logprobs
        policy = normalised(policy + _RATE * np.array([move for move, _ in moves]))
    raise NumericsError(
        f"the expected gradient did not come to rest: {left:.2g} is left after {_STEPS} steps; "
        f"raise the KL weight {coef:g}"
    )


def _move(
    tree: Tree,
    start: Floats,
    policy: Floats,
    mass: Floats,
    advantages: Floats,
    weight: Floats,
    coef: float,
) -> tuple[Floats, float]:
    """[s, A] the step of one prompt's logits, and the largest entry of its gradient."""
    passing, weighted = tree.passing(mass), tree.passing(mass * weight)
    pull = np.exp(start - policy)  # ref / pi
    gains = tree.passing(mass * weight * advantages)
    quality = (gains - coef * weighted * (1 - pull)) / passing
    lead = quality - (np.exp(policy) * quality).sum(1, keepdims=True)
    stiffness = coef * weighted / passing * np.maximum(pull, 1.0)
    return lead / stiffness.max(1, keepdims=True), float(np.abs(passing * lead).max())


def against_one(logprobs: Floats, rewards: Floats, lengths: Floats) -> Floats:
    """GRPO's advantage in groups of two: E over y' of (d / 2) / (|d| / sqrt 2 + 1e-4), d = r - r'.

    Dividing by the deviation leaves little more than the sign of the difference.
    """
    difference = rewards[:, :, None] - rewards[:, None, :]
    scaled = (difference / 2) / (np.abs(difference) / np.sqrt(2) + 1e-4)
    result: Floats = (scaled @ np.exp(logprobs)[:, :, None])[:, :, 0]
    return result


def above_mean(group: int) -> Advantage:
    """Scores less their group's mean, itself included: (1 - 1 / G) (r - E r)."""
    return lambda logprobs, rewards, lengths: (1 - 1 / group) * _centred(logprobs, rewards)


def above_mean_whitened(group: int) -> Advantage:
    """`above_mean` over its deviation among all tokens of a large batch, all prompts together."""

    def advantage(logprobs: Floats, rewards: Floats, lengths: Floats) -> Floats:
        mass, centred = np.exp(logprobs), _centred(logprobs, rewards)
        own = (1 - 1 / group) * centred
        companions = (group - 1) / group**2 * (mass * centred**2).sum(1, keepdims=True)
        tokens = mass * lengths / (mass * lengths).sum()
        second = float((tokens * (own**2 + companions)).sum())
        whitened: Floats = own / np.sqrt(second - float((tokens * own).sum()) ** 2)
        return whitened

    return advantage


def _centred(logprobs: Floats, rewards: Floats) -> Floats:
    """[P, S] rewards less their prompt's mean."""
    centred: Floats = rewards - (np.exp(logprobs) * rewards).sum(1, keepdims=True)
    return centred
