"""The algorithm table: one row for each way to tune a policy; reading it imports no torch.

A new algorithm is a formula in `losses/` and a row below, and a file in `train/` only where its
steps are new: `docs/adding-an-algorithm.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from amenable.config.policy import PolicyConfig

Placement = Literal["reward", "loss", "both", "none"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A way to tune the policy.

    Args:
        run: `module:function` of (StageContext) -> the `policy` section of the summary.
        summary: one line.
        learns_from: "prompts": samples and scores completions of prompts; "preferences": reads
            pairs that exist already, and needs no reward.
        kl: where its paper puts the KL penalty; "none" also where the loss has its own.
        needs_groups: compares the completions of a prompt, so that it needs at least two.
        ignores: keys of [policy] that others read and it does not.
    """

    run: str
    summary: str
    learns_from: Literal["prompts", "preferences"] = "prompts"
    kl: Placement = "none"
    needs_groups: bool = False
    ignores: tuple[str, ...] = ()


_GRADIENT = "amenable.train.policy_gradient:run"
_OFF_POLICY = "amenable.train.off_policy:run"
_RATIOS = ("clip_range", "clip_range_high", "dual_clip", "entropy_coef", "max_approx_kl")

ALGORITHMS = {
    "ppo": Algorithm(
        run="amenable.train.ppo:run",
        summary="clipped policy gradient with a critic",
        kl="reward",
    ),
    "grpo": Algorithm(
        run=_GRADIENT,
        summary="scores relative to the prompt's other samples, in their standard deviations",
        kl="loss",
        needs_groups=True,
    ),
    "dr-grpo": Algorithm(
        run=_GRADIENT,
        summary="GRPO without division by deviation and length",
        kl="loss",
        needs_groups=True,
    ),
    "dapo": Algorithm(
        run=_GRADIENT,
        summary="GRPO a token, clipped wider above, without KL and without prompts of equal scores",
        needs_groups=True,
    ),
    "gspo": Algorithm(
        run=_GRADIENT,
        summary="GRPO with one ratio a completion",
        kl="loss",
        needs_groups=True,
        ignores=("dual_clip",),
    ),
    "rloo": Algorithm(
        run=_GRADIENT,
        summary="REINFORCE with the mean of the prompt's other samples as baseline",
        kl="reward",
        needs_groups=True,
    ),
    "reinforce++": Algorithm(
        run=_GRADIENT,
        summary="REINFORCE with returns whitened over the batch",
        kl="reward",
    ),
    "reinforce++-baseline": Algorithm(
        run=_GRADIENT,
        summary="REINFORCE++ on scores less their prompt's mean",
        kl="loss",
        needs_groups=True,
    ),
    "online-dpo": Algorithm(
        run="amenable.train.online_preference:run",
        summary="the DPO loss on pairs of the policy's own samples, labelled by the reward",
        kl="loss",
        needs_groups=True,
        ignores=(*_RATIOS, "kl.placement", "kl.estimator", "kl.loss_estimator"),
    ),
    "best-of-n": Algorithm(
        run="amenable.train.best_of_n:run",
        summary="supervised fine-tuning on each prompt's best sample (expert iteration)",
        needs_groups=True,
        ignores=(*_RATIOS, "kl.placement", "kl.estimator", "kl.loss_estimator", "kl.controller"),
    ),
    "dpo": Algorithm(
        run=_OFF_POLICY,
        summary="likelihood of the choices under the reward that the policy implies",
        learns_from="preferences",
    ),
    "ipo": Algorithm(
        run=_OFF_POLICY,
        summary="squared distance of the implied margin from its goal",
        learns_from="preferences",
    ),
    "cdpo": Algorithm(
        run=_OFF_POLICY,
        summary="DPO with smoothed labels",
        learns_from="preferences",
    ),
    "robust-dpo": Algorithm(
        run=_OFF_POLICY,
        summary="DPO freed of the bias of labels flipped at a known rate",
        learns_from="preferences",
    ),
    "kto": Algorithm(
        run=_OFF_POLICY,
        summary="desirable and undesirable completions, without pairs",
        learns_from="preferences",
    ),
    "simpo": Algorithm(
        run=_OFF_POLICY,
        summary="DPO on mean log-probabilities with a margin, without a reference",
        learns_from="preferences",
    ),
    "orpo": Algorithm(
        run=_OFF_POLICY,
        summary="fine-tuning on the chosen plus an odds ratio, without a reference",
        learns_from="preferences",
    ),
}


def kl_placement(policy: PolicyConfig) -> Placement:
    """Where the recipe's KL penalty enters; `auto` is the algorithm's own place."""
    placement = policy.kl.placement
    return ALGORITHMS[policy.algorithm].kl if placement == "auto" else placement
