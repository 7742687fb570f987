"""Online DPO (Guo et al. 2024, arXiv:2402.04792): pairs of the policy's own samples.

The completions of a prompt are taken two by two; the reward labels each pair under Bradley and
Terry, with scores as logits; the loss is DPO's. The KL weight is DPO's beta.
Shapes: N completions and C tokens of a micro-batch, n pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.losses.direct_preference import soft_dpo_loss
from amenable.losses.likelihood import sequence_logprobs
from amenable.losses.selection import choice_probabilities, sampled_choices
from amenable.ranks import group as ranks
from amenable.rollout.types import uniform_noise
from amenable.train.experience import MicroBatch, Minibatches
from amenable.train.loop import Metrics, Optimizer, add_gradient
from amenable.train.on_policy import run_on_policy
from amenable.train.passes import ADAM_EPS, check_ratio, minibatch_order, policy_rate
from amenable.train.policy_roles import PolicyRoles

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role


def run(ctx: StageContext) -> dict[str, Any]:
    """The `policy` stage with online DPO."""
    return run_on_policy(ctx, OnlineDPOLearner)


class OnlineDPOLearner:
    """The DPO loss on pairs within each prompt's samples."""

    sampler = "policy"
    critic_role: Role | None = None

    def __init__(self, ctx: StageContext, roles: PolicyRoles) -> None:
        config = ctx.recipe.policy
        self._ctx, self._config, self._policy = ctx, config, roles.policy
        self._optimizer = Optimizer(
            roles.policy.trainable_parameters(), eps=ADAM_EPS, max_grad_norm=config.max_grad_norm
        )

    def learn(self, minibatches: Minibatches, update: int, kl_coef: float) -> Metrics:
        """Passes over the pairs of a roll-out batch."""
        rate, loss, correct, pairs = policy_rate(self._config, update), 0.0, 0.0, 0
        norms: list[float] = []
        for epoch in range(self._config.epochs):
            for index in minibatch_order(len(minibatches), self._ctx.recipe.seed, update, epoch):
                micros = minibatches[index]
                count = sum(len(pair_places(micro)) for micro in micros)
                if not count:
                    continue
                found = [0.0, 0.0]
                for micro, counts in self._policy.turns(micros, [m.owner for m in micros]):
                    own = self._gradient(micro, update, kl_coef, count * counts, not norms)
                    found = [a + b for a, b in zip(found, own, strict=True)]
                own_loss, own_correct = ranks.summed(*found)
                loss, correct = loss + own_loss * count, correct + own_correct
                norms.append(self._optimizer.step(rate))
                pairs += count
        return {
            "policy_loss": loss / max(1, pairs),
            "pair_accuracy": correct / max(1, pairs),
            "grad_norm": sum(norms) / max(1, len(norms)),
            "learning_rate": rate,
            "passes": float(self._config.epochs),
            "undone_steps": float(self._optimizer.undone),
        }

    def _gradient(
        self, micro: MicroBatch, update: int, beta: float, pairs: int, first: bool
    ) -> tuple[float, float]:
        """Adds a micro-batch's part; returns its part of the loss, and how many leads are right.

        Of 0 `pairs` in the whole minibatch nothing is added.
        """
        places = pair_places(micro)
        logprobs = self._policy.logprobs(micro.batch, temperature=self._config.temperature).logprobs
        if first and "ratio" not in self._config.gate_skip:
            check_ratio(logprobs.detach(), micro)
        if not (pairs and len(places)):
            if self._policy.sharded:  # whose other ranks pass backwards as well
                (0 * logprobs.sum()).backward()
            return 0.0, 0.0
        a, b = places[:, 0], places[:, 1]
        mask = micro.batch.mask
        new, ref = sequence_logprobs(logprobs, mask), sequence_logprobs(micro.ref_logprobs, mask)
        wanted = self._labels(micro, places, update)
        losses = soft_dpo_loss(new[a], new[b], ref[a], ref[b], wanted, beta)
        loss = add_gradient(losses, None, pairs, lambda pair: self._blame(micro, places, pair))
        lead = (new[a] - new[b] - ref[a] + ref[b]).detach()
        return loss, float(((lead > 0) == (wanted > 0.5)).sum())

    def _labels(self, micro: MicroBatch, places: Tensor, update: int) -> Tensor:
        """[n] probability that the first of a pair is preferred, or 0 and 1 as drawn from it."""
        first, second = micro.scores[places[:, 0]], micro.scores[places[:, 1]]
        if self._config.online_dpo.labels == "soft":
            return choice_probabilities(first, second)
        seed = self._ctx.recipe.seed
        of_pairs = [micro.episodes[place] for place in places[:, 0].tolist()]
        keys = [(seed, update, "label", one.prompt.id, one.sample) for one in of_pairs]
        noise = [float(uniform_noise(key, 1)[0]) for key in keys]
        return sampled_choices(first, second, first.new_tensor(noise)).to(first)

    def _blame(self, micro: MicroBatch, places: Tensor, pair: int) -> None:
        for place in places[pair].tolist():
            self._ctx.progress.blame(f"policy: loss is not finite: {micro.episodes[place]}")

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The optimizer."""
        return {"policy_optimizer": self._optimizer.state()}, {}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Undo `state`."""
        self._optimizer.load_state(tensors["policy_optimizer"])


def pair_places(micro: MicroBatch) -> Tensor:
    """[n, 2] places of the pairs: a prompt's completions two by two; an odd one is left over."""
    places: list[tuple[int, int]] = []
    for own in micro.groups():
        places += [(i, i + 1) for i in range(own.start, own.stop - 1, 2)]
    return torch.tensor(places, dtype=torch.long, device=micro.scores.device).view(-1, 2)
