"""The table of gradients: each algorithm's setting, and the expectation of its estimator.

Every formula is written out once more from its paper, without the losses that training uses. A
gradient is that of the loss, so it points away from what the algorithm wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amenable.lab.expected_gradients import (
    Enumerated,
    Factor,
    Unit,
    expectation,
    masses_of_groups,
    outcomes,
)

Estimator = Callable[[Enumerated, "Cell"], Tensor]
"""[D] the expected gradient of the loss."""

_STD_EPS, _VARIANCE_EPS = 1e-4, 1e-8
_GROUP = 3
_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the table.

    Args:
        algorithm: a name of the algorithm table.
        name: which settings of it.
        expected: the enumerated gradient.
        bias: how the mean differs from the gradient of the objective.
        keys: dotted recipe keys.
        group: completions of a prompt.
        prompts: prompts of an update.
        batches: gradients that are recorded; enough to notice a KL weight that is off by a fifth.
        temperature: of sampling and of every log-probability.
        exact_critic: PPO's critic is replaced by the expected returns.
    """

    algorithm: str
    name: str
    expected: Estimator
    bias: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    group: int = _GROUP
    prompts: int = _PROMPTS
    batches: int = 100
    temperature: float = 1.0
    exact_critic: bool = False

    @property
    def label(self) -> str:
        """Names the check."""
        return f"{self.algorithm}, {self.name}"


def of_objective(enumerated: Enumerated, cell: Cell) -> Tensor:
    """Minus the gradient of E r - beta KL, through the probabilities: no score-function trick."""
    return -enumerated.objective_gradient()


def of_groups(
    advantages: Callable[[Tensor], Tensor],
    *,
    per_token: bool = False,
    kl_in_reward: bool = False,
    limit: bool = False,
    pull: str = "k3",
) -> Estimator:
    """Advantages within groups over a fixed denominator, and a KL term of the loss: exact.

    Args:
        advantages: [G, ...] from scores [G, ...].
        per_token: a completion's tokens are averaged (GRPO, GSPO), not summed.
        kl_in_reward: the sequence KL is subtracted from the score, and the loss has none.
        limit: sums are divided by the longest completion's tokens (Dr. GRPO).
        pull: the estimator of the KL in the loss.
    """

    def expected(enumerated: Enumerated, cell: Cell) -> Tensor:
        size = 1 / enumerated.lengths if per_token else torch.ones_like(enumerated.lengths)
        weights = size[:, None] * enumerated.mask
        units = []
        for prompt, mass in enumerate(enumerated.masses):
            scores = _scores(enumerated, prompt, kl_in_reward)
            own = advantages(outcomes(scores, cell.group))
            terms = [(own, weights)]
            if not kl_in_reward:
                terms.append((torch.ones_like(own), weights * _pulls(enumerated, prompt, pull)))
            units.append(Unit(masses_of_groups(mass, cell.group), terms))
        over = cell.group * (enumerated.mask.shape[1] if limit else 1)
        factors = [_constant(-1 / over), _constant(enumerated.beta / over)]
        return expectation(enumerated, units, factors[: len(units[0].terms)], cell.prompts)

    return expected


def of_token_mean(enumerated: Enumerated, cell: Cell) -> Tensor:
    """DAPO: advantages in deviations of the group over all tokens of groups that differ."""
    units = []
    for prompt, mass in enumerate(enumerated.masses):
        scores = outcomes(enumerated.rewards[prompt], cell.group)
        differ = (scores != scores[0]).any(0)
        tokens = outcomes(enumerated.lengths, cell.group).sum(0) * differ
        terms = [(in_deviations(scores), enumerated.mask.double())]
        units.append(Unit(masses_of_groups(mass, cell.group), terms, [tokens]))
    return expectation(enumerated, units, [lambda m: -1 / m[0]], cell.prompts)


def of_whitened_groups(enumerated: Enumerated, cell: Cell) -> Tensor:
    """REINFORCE++ with baseline: centred in the group, whitened over the batch's tokens; k2."""
    units = []
    for prompt, mass in enumerate(enumerated.masses):
        own = centred(outcomes(enumerated.rewards[prompt], cell.group))
        lengths = outcomes(enumerated.lengths, cell.group)
        ones, mask = torch.ones_like(own), enumerated.mask.double()
        pull = mask * _pulls(enumerated, prompt, "k2")
        scalars = [lengths.sum(0), (own * lengths).sum(0), (own**2 * lengths).sum(0)]
        units.append(
            Unit(
                masses_of_groups(mass, cell.group),
                [(own, mask), (ones, mask), (ones, pull)],
                scalars,
            )
        )
    factors = [*_whitening(), lambda m: enumerated.beta / m[0]]
    return expectation(enumerated, units, factors, cell.prompts)


def of_returns(*, whitened: bool, exact_critic: bool = False, gae_lambda: float = 1.0) -> Estimator:
    """Tokens' advantages over the batch's tokens: REINFORCE++, and PPO.

    Args:
        whitened: to mean 0 and variance 1 over the batch's tokens.
        exact_critic: values are the expected returns of each prefix; else 0.
        gae_lambda: of the advantages.
    """

    def expected(enumerated: Enumerated, cell: Cell) -> Tensor:
        rewards = token_rewards(enumerated)
        values = prefix_values(enumerated, rewards) if exact_critic else torch.zeros_like(rewards)
        units = []
        mask = enumerated.mask.double()
        for prompt, mass in enumerate(enumerated.masses):
            own = _advantages(rewards[prompt], values[prompt], gae_lambda) * mask
            one = torch.ones(1, len(mass), dtype=torch.float64)
            scalars = [enumerated.lengths, own.sum(1), own.square().sum(1)]
            units.append(Unit(mass, [(one, own), (one, mask)], scalars))
        count = cell.prompts * cell.group
        if whitened:
            return expectation(enumerated, units, _whitening(), count)
        return expectation(enumerated, units, [lambda m: -1 / m[0]], count)

    return expected


def of_pairs(enumerated: Enumerated, cell: Cell) -> Tensor:
    """Online DPO: the loss of every pair, its label in expectation, through the log-ratios."""
    policy, reference = enumerated.logprobs.sum(2), enumerated.reference.sum(2)
    ratios = policy - reference
    leads = enumerated.beta * (ratios[:, :, None] - ratios[:, None, :])
    first = torch.sigmoid(enumerated.rewards[:, :, None] - enumerated.rewards[:, None, :])
    losses = -(first * leads.sigmoid().log() + (1 - first) * (-leads).sigmoid().log())
    mass = enumerated.masses
    return enumerated.gradient_of((mass[:, :, None] * mass[:, None, :] * losses).sum() / len(mass))


def of_best(enumerated: Enumerated, cell: Cell) -> Tensor:
    """Best-of-n: the first of the best, its negative log-likelihood over the best ones' tokens."""
    units = []
    for prompt, mass in enumerate(enumerated.masses):
        scores = outcomes(enumerated.rewards[prompt], cell.group)
        best = scores == scores.max(0).values
        first = (best & (best.cumsum(0) == 1)).double()
        tokens = (outcomes(enumerated.lengths, cell.group) * first).sum(0)
        terms = [(first, enumerated.mask.double())]
        units.append(Unit(masses_of_groups(mass, cell.group), terms, [tokens]))
    return expectation(enumerated, units, [lambda m: -1 / m[0]], cell.prompts)


def centred(scores: Tensor) -> Tensor:
    """[G, ...] scores less their group's mean."""
    return scores - scores.mean(0)


def in_deviations(scores: Tensor) -> Tensor:
    """[G, ...] `centred` over the group's sample deviation."""
    own = centred(scores)
    return own / ((own.square().sum(0) / (len(own) - 1)).sqrt() + _STD_EPS)


def token_rewards(enumerated: Enumerated) -> Tensor:
    """[P, S, C] the k1 penalty at each token, the score at the last one."""
    last = torch.arange(enumerated.mask.shape[1]) == enumerated.lengths[:, None] - 1
    scores = last * enumerated.rewards[:, :, None]
    return scores - enumerated.beta * enumerated.log_ratios


def prefix_values(enumerated: Enumerated, rewards: Tensor) -> Tensor:
    """[P, S, C] expected sum of the rewards from a token on, given all before it."""
    returns = rewards.flip(2).cumsum(2).flip(2)
    mass, before = enumerated.masses, _same_before(enumerated)
    values = torch.zeros_like(returns)
    for place, same in enumerate(before):
        total = mass @ same.T
        values[:, :, place] = (mass * returns[:, :, place]) @ same.T / total.clamp(min=1e-300)
    return values * enumerated.mask


def _same_before(enumerated: Enumerated) -> list[Tensor]:
    """For each place [S, S] 1 where two completions reach it and agree on all tokens before it."""
    tokens = enumerated.tokens
    result = []
    for place in range(tokens.shape[1]):
        agree = (tokens[:, None, :place] == tokens[None, :, :place]).all(2)
        reach = enumerated.mask[:, place]
        result.append((agree & reach[:, None] & reach[None, :]).double())
    return result


def _scores(enumerated: Enumerated, prompt: int, kl_in_reward: bool) -> Tensor:
    rewards = enumerated.rewards[prompt]
    if not kl_in_reward:
        return rewards
    return rewards - enumerated.beta * enumerated.log_ratios[prompt].sum(1)


def _pulls(enumerated: Enumerated, prompt: int, estimator: str) -> Tensor:
    """[S, C] factor of grad logprob in the gradient of the KL in the loss."""
    difference = enumerated.log_ratios[prompt]
    return difference if estimator == "k2" else 1 - (-difference).exp()


def _advantages(rewards: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """[S, C] sum over later tokens u of lambda^(u - t) (r_u + V_(u + 1) - V_u)."""
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    errors = rewards + following - values
    places = torch.arange(errors.shape[1])
    ahead = places[:, None] - places[None, :]
    weights = torch.where(ahead >= 0, gae_lambda ** ahead.clamp(min=0), 0.0).double()
    return errors @ weights


def _whitening() -> list[Factor]:
    """Of (A grad, grad) with scalars (tokens, sum of A, sum of squares of A)."""

    def scale(means: Tensor) -> Tensor:
        tokens, total, squares = means.unbind()
        variance = squares / tokens - (total / tokens) ** 2
        return torch.rsqrt(variance + _VARIANCE_EPS) / tokens

    return [lambda m: -scale(m), lambda m: m[1] / m[0] * scale(m)]


def _constant(value: float) -> Factor:
    return lambda means: torch.tensor(value, dtype=torch.float64)


PPO = {
    "policy.ppo.value_clip_range": 1e6,
    "policy.ppo.gae_lambda": 1.0,
    "policy.ppo.whiten_advantages": False,
}
_IN_REWARD = {"policy.kl.placement": "reward"}
_RATIO = "over the batch's tokens, whose number is drawn: O(1/N)"
_WHITE = "mean and deviation contain the completion itself: O(1/N)"
_OWN_MEAN = "the group's mean contains the completion: times 1 - 1/G"
_STD = "group deviation: prompts and draws of small spread weigh more"
_PULL = "k3 of each token: KL(ref || policy), and not through what follows"

CELLS = (
    Cell(
        algorithm="ppo",
        name="lambda 1, no critic",
        expected=of_returns(whitened=False),
        bias=_RATIO,
        keys=PPO,
    ),
    Cell(
        algorithm="ppo",
        name="lambda 0.9, exact critic, whitened",
        expected=of_returns(whitened=True, exact_critic=True, gae_lambda=0.9),
        bias=_WHITE,
        keys=PPO | {"policy.ppo.gae_lambda": 0.9, "policy.ppo.whiten_advantages": True},
        exact_critic=True,
    ),
    Cell(algorithm="rloo", name="as published", expected=of_objective, bias="none", batches=200),
    Cell(
        algorithm="rloo",
        name="temperature 0.7",
        expected=of_objective,
        bias="none",
        keys={"policy.temperature": 0.7},
        temperature=0.7,
    ),
    Cell(
        algorithm="reinforce++",
        name="as published",
        expected=of_returns(whitened=True),
        bias=_WHITE,
    ),
    Cell(
        algorithm="reinforce++-baseline",
        name="as published (k2)",
        expected=of_whitened_groups,
        bias=f"{_OWN_MEAN}; {_WHITE}",
        keys={"policy.kl.loss_estimator": "k2"},
    ),
    Cell(
        algorithm="grpo",
        name="as published",
        expected=of_groups(in_deviations, per_token=True),
        bias=f"{_STD}; 1 / length: short completions weigh more; {_PULL}",
    ),
    Cell(
        algorithm="grpo",
        name="KL in the reward",
        expected=of_groups(in_deviations, per_token=True, kl_in_reward=True),
        bias=f"{_STD}; 1 / length: short completions weigh more",
        keys=_IN_REWARD,
    ),
    Cell(
        algorithm="dr-grpo",
        name="as published",
        expected=of_groups(centred, limit=True),
        bias=f"{_OWN_MEAN} / longest; {_PULL}",
    ),
    Cell(
        algorithm="gspo",
        name="as published",
        expected=of_groups(in_deviations, per_token=True),
        bias=f"at ratio 1 GRPO's: {_STD}; 1 / length; {_PULL}",
    ),
    Cell(
        algorithm="dapo",
        name="as published",
        expected=of_token_mean,
        bias=f"{_STD}; no KL; {_RATIO}",
    ),
    Cell(
        algorithm="online-dpo",
        name="soft labels",
        expected=of_pairs,
        bias="none for its own loss, samples held fixed",
        prompts=32,
        group=2,
    ),
    Cell(
        algorithm="online-dpo",
        name="sampled labels",
        expected=of_pairs,
        bias="none for its own loss, samples held fixed",
        prompts=32,
        keys={"policy.online_dpo.labels": "sampled"},
        group=2,
    ),
    Cell(
        algorithm="best-of-n",
        name="n = 3",
        expected=of_best,
        bias=f"its own target, no KL; {_RATIO}",
    ),
)
"""The on-policy table."""
