"""Best-of-n and expert iteration: supervised fine-tuning on each prompt's best sample.

With `sampler = "policy"` every update samples from what the last one made (expert iteration);
with "reference" all samples come from the start, and the policy learns the distribution of the
best of n draws from it. There is no KL penalty: one round is at most log n - (n - 1) / n nats away
(Beirami et al. 2024, arXiv:2401.01879).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.losses.likelihood import cross_entropy
from amenable.losses.selection import best_of_n
from amenable.ranks import group as ranks
from amenable.train.experience import MicroBatch, Minibatches
from amenable.train.loop import Metrics, Optimizer, add_gradient
from amenable.train.on_policy import run_on_policy
from amenable.train.passes import ADAM_EPS, minibatch_order, policy_rate
from amenable.train.policy_roles import PolicyRoles

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role


def run(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage with best-of-n."""
    return run_on_policy(ctx, BestOfNLearner)


class BestOfNLearner:
    """Cross entropy on the tokens of the best completion of each prompt."""

    critic_role: Role | None = None

    def __init__(self, ctx: StageContext, roles: PolicyRoles) -> None:
        config = ctx.recipe.policy
        self.sampler: str = config.best_of_n.sampler
        self._ctx, self._config, self._policy = ctx, config, roles.policy
        self._optimizer = Optimizer(
            roles.policy.trainable_parameters(), eps=ADAM_EPS, max_grad_norm=config.max_grad_norm
        )

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """Passes over the best completions of a roll-out batch."""
        rate, loss, tokens = policy_rate(self._config, update), 0.0, 0
        norms: list[float] = []
        for epoch in range(self._config.epochs):
            for index in minibatch_order(len(minibatches), self._ctx.recipe.seed, update, epoch):
                micros = minibatches[index]
                masks = [best_tokens(micro) for micro in micros]
                count = sum(int(mask.sum()) for mask in masks)
                own, parts = 0.0, list(zip(micros, masks, strict=True))
                for (micro, mask), counts in self._policy.turns(parts, [m.owner for m in micros]):
                    own += self._gradient(micro, mask, count, counts)
                loss += ranks.summed(own)[0] * count
                norms.append(self._optimizer.step(rate))
                tokens += count
        best = [
            float(micro.scores[own].max())
            for m in minibatches
            for micro in m
            for own in micro.groups()
        ]
        return {
            "policy_loss": loss / tokens,
            "best_score": sum(best) / len(best),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": rate,
            "passes": float(self._config.epochs),
            "undone_steps": float(self._optimizer.undone),
        }

    def _gradient(self, micro: MicroBatch, mask: Tensor, tokens: int, counts: bool) -> float:
        temperature, blame = self._config.temperature, self._ctx.progress.blame
        logprobs = self._policy.logprobs(micro.batch, temperature=temperature).logprobs
        losses = counts * cross_entropy(logprobs, micro.batch.mask)
        return add_gradient(
            losses,
            mask,
            tokens,
            lambda row: blame(f"policy: loss is not finite: {micro.episodes[row]}"),
        )

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The optimizer."""
        return {"policy_optimizer": self._optimizer.state()}, {}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        self._optimizer.load_state(tensors["policy_optimizer"])


def best_tokens(micro: MicroBatch) -> Tensor:
    """[N, C] True at the real tokens of each prompt's best completion."""
    best = torch.zeros_like(micro.scores, dtype=torch.bool)
    for own in micro.groups():
        best[own.start + int(best_of_n(micro.scores[own][None])[0])] = True
    return micro.batch.mask & best[:, None]
