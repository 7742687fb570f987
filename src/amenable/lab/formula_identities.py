"""Identities of formulas: GAE, KL estimators, Bradley-Terry strengths, DPO's implicit reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amenable.config.preference import PreferenceConfig
from amenable.data.collate import PromptGroup, collate
from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker
from amenable.lab.bench import FAR, Bench, Finding, plain_table
from amenable.lab.places import POINTS
from amenable.lab.problems import PAD_ID, Problem
from amenable.losses import advantages, kl
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role
from amenable.train import pair_losses, pair_reference, reward

Estimator = Callable[[Tensor, Tensor], Tensor]

_STRENGTHS = (1.5, -1.0, 0.25, 0.0, -2.0, 0.75)
"""Logits of six completions."""


def gae_by_hand(bench: Bench) -> Finding:
    """GAE is the lambda-weighted mean of n-step returns, less the value; at 1 all rewards."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 5, 7]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    worst = 0.0
    for gamma, gae_lambda in ((1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.7, 1.0)):
        found, returns = advantages.gae(rewards, values, mask, gamma, gae_lambda)
        for row, length in enumerate(lengths):
            own = _n_step(rewards[row, :length], values[row, :length], gamma, gae_lambda)
            worst = max(worst, float((found[row, :length] - own).abs().max()))
            both = found[row, :length] + values[row, :length]
            worst = max(worst, float((returns[row, :length] - both).abs().max()))
    return Finding(worst, 1e-12, "of reward")


def _n_step(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """[C] sum over n of (1 - lambda) lambda^(n-1) (n-step return) - V, the rest on the last one."""
    length, result = len(rewards), []
    for start in range(length):
        total, left = 0.0, 1.0
        for steps in range(1, length - start + 1):
            end = start + steps
            own = sum(gamma**k * float(rewards[start + k]) for k in range(steps))
            last = end == length
            own += 0.0 if last else gamma**steps * float(values[end])
            weight = left if last else left * (1 - gae_lambda)
            left -= weight
            total += weight * own
        result.append(total - float(values[start]))
    return torch.tensor(result, dtype=torch.float64)


def kl_estimators(bench: Bench) -> Finding:
    """Over all completions k1 and k3, summed over tokens, have the mean KL(policy || reference)."""
    policy, reference = _both(bench)
    mass = policy.sum(2).exp()
    truth = (mass * (policy - reference).sum(2)).sum(1)
    worst = 0.0
    for estimator in (kl.k1, kl.k3):
        means = _means(mass, policy, reference, estimator)
        worst = max(worst, float((means - truth).abs().max()))
    return Finding(worst, 1e-9, f"nats, of {float(truth.mean()):.3g}")


def k2_bias(bench: Bench) -> Finding:
    """k2's mean is that of half the squared log-ratios: not the KL, and by how much."""
    policy, reference = _both(bench)
    mass = policy.sum(2).exp()
    truth = float((mass * (policy - reference).sum(2)).sum(1).mean())
    wanted = (mass * ((policy - reference) ** 2).sum(2) / 2).sum(1)
    found = _means(mass, policy, reference, kl.k2)
    share = float(found.mean()) / truth - 1
    worst = float((found - wanted).abs().max())
    return Finding(worst, 1e-9, f"nats; k2 is {share:+.1%} off a KL of {truth:.3g}")


def _both(bench: Bench) -> tuple[Tensor, Tensor]:
    return bench.tables[0], plain_table(bench, bench.place.policies[POINTS[0]])[0]


def _means(mass: Tensor, policy: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """[P] mean over completions of the sum over tokens."""
    own = [estimator(*pair) for pair in zip(policy, reference, strict=True)]
    return (mass * torch.stack(own).sum(2)).sum(1)


def bradley_terry(bench: Bench) -> Finding:
    """Trained on every pair, weighted as Bradley-Terry raters choose, scores are the strengths."""
    problem = bench.problem
    prompt = problem.prompts[0]
    texts = problem.texts[: len(_STRENGTHS)]
    groups, rows = [], []
    for one, first in enumerate(_STRENGTHS):
        for two, second in enumerate(_STRENGTHS):
            if one == two:
                continue
            ids = [problem.completion_ids(texts[n]) for n in (one, two)]
            groups.append(PromptGroup(problem.prompt_ids(prompt), ids))
            wins = float(torch.sigmoid(torch.tensor(first - second)))
            rows.append(_preference(prompt, texts[one], texts[two], wins))
    model = deepcopy(bench.place.policies[FAR])
    width = model.config.get_text_config().hidden_size
    role = Role(model, head=ScalarHead(width, seed=0))
    _fit(role, groups, rows)
    batch = collate(
        [PromptGroup(problem.prompt_ids(prompt), [problem.completion_ids(t)]) for t in texts],
        PAD_ID,
    )
    with torch.no_grad():
        scores = role.scores(batch).double()
    strengths = torch.tensor(_STRENGTHS, dtype=torch.float64)
    apart = (scores - scores.mean()) - (strengths - strengths.mean())
    return Finding(float(apart.abs().max()), 0.01, "logits")


def _preference(prompt: str, first: str, second: str, weight: float) -> Preference:
    asked = Prompt(id=prompt, messages=(Message(Speaker.USER, prompt),), group=prompt)
    return Preference(
        prompt=asked, candidate_0=first, candidate_1=second, choice=Choice.FIRST, weight=weight
    )


def _fit(role: Role, groups: Sequence[PromptGroup], rows: Sequence[Preference]) -> None:
    """To the minimum of the stage's own loss, by a quasi-Newton method."""
    weights = role.trainable_parameters()
    optimizer = torch.optim.LBFGS(
        weights,
        max_iter=200,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        found = reward.reward_gradient(role, groups, rows, PAD_ID, 10**6)
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return found["rank_loss"]

    optimizer.step(loss)


def implicit_reward(bench: Bench) -> Finding:
    """At ref exp(r / beta) / Z DPO's gradient is 0, and beta log(policy / ref) is r, but for Z.

    The gradient is over all pairs with Bradley-Terry labels. Only a table can be set to that
    policy; a transformer is left out.
    """
    world, problem = bench.place.world, bench.problem
    if problem.model != "table":
        return Finding(0.0, 0.0, "only of a table")
    start = bench.place.policies[POINTS[0]]
    rewards = torch.from_numpy(world.rewards)
    best = _with_masses(start, problem, torch.from_numpy(world.pi_star).exp())
    at_best, implied = _dpo_gradient(bench, best, start, rewards)
    at_start, _ = _dpo_gradient(bench, start, start, rewards)
    off = problem.beta * implied - rewards
    worst = float((off - off.mean(1, keepdim=True)).abs().max())
    rest = float(at_best.norm() / at_start.norm())
    return Finding(max(worst, rest), 1e-4, f"reward off by {worst:.1g}, gradient {rest:.1g}")


def _with_masses(model: PreTrainedModel, problem: Problem, masses: Tensor) -> PreTrainedModel:
    """A copy of a table whose completions have these probabilities [P, S]."""
    copy = deepcopy(model)
    (weight,) = copy.parameters()
    base = problem.vocab_size
    passing: dict[tuple[int, ...], float] = {}
    for p, prompt in enumerate(problem.prompts):
        for n, text in enumerate(problem.texts):
            ids = (*problem.prompt_ids(prompt), *problem.completion_ids(text))
            for end in range(1, len(ids) + 1):
                passing[ids[:end]] = passing.get(ids[:end], 0.0) + float(masses[p, n])
    with torch.no_grad():
        for ids, mass in passing.items():
            if len(ids) > 1:
                row = sum(token * base**place for place, token in enumerate(ids[:-1]))
                share = torch.tensor(mass / passing[ids[:-1]])
                weight[row, ids[-1] - 1] = share.log()
    return copy


def _dpo_gradient(
    bench: Bench, model: PreTrainedModel, reference: PreTrainedModel, rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """[D] gradient of the stage's loss over all labelled pairs; [P, S] log(policy / reference)."""
    problem, loss = bench.problem, pair_losses.LOSSES["dpo"].loss
    size = len(problem.texts)
    ids = [problem.completion_ids(text) for text in problem.texts]
    model.zero_grad()
    ratios = []
    for p, prompt in enumerate(problem.prompts):
        asked = problem.prompt_ids(prompt)
        # the stage sums up pairs, so each completion comes twice
        twice = collate([PromptGroup(asked, [own, own]) for own in ids], PAD_ID)
        policy = pair_reference.pair_logprobs(Role(model), twice)[:, 0]
        with torch.no_grad():
            ref = pair_reference.pair_logprobs(Role(reference), twice)[:, 0]
        chosen, rejected = (
            grid.flatten()
            for grid in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        )
        tokens = twice.mask.sum(1)[::2]
        pairs = pair_losses.Pairs(
            policy_chosen=policy[chosen],
            policy_rejected=policy[rejected],
            ref_chosen=ref[chosen],
            ref_rejected=ref[rejected],
            chosen_tokens=tokens[chosen],
            rejected_tokens=tokens[rejected],
            tied=torch.zeros(len(chosen), dtype=torch.bool),
            reference_point=torch.zeros(()),
        )
        wins = torch.sigmoid(rewards[p][chosen] - rewards[p][rejected]).float()
        (loss(pairs, PreferenceConfig(beta=problem.beta)) * wins).mean().backward()
        ratios.append((policy - ref).detach().double())
    gradient = torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )
    return gradient, torch.stack(ratios)
