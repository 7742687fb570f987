"""The policy stage: which algorithm, how many roll-outs, how far from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The penalty that keeps the policy near the reference."""

    coef: float = 0.05
    """Weight of the per-token KL in the reward (the first one, if adaptive), in reward a nat."""

    adaptive: bool = False
    """Steer the weight so that the sequence KL stays near `target` (Ziegler et al. 2019)."""

    target: float = 6.0
    """Wanted sequence KL in nats, if adaptive."""

    horizon: int = 10_000
    """Episodes over which the controller reacts."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Clipped policy and value losses with generalised advantage estimation."""

    epochs: int = 2
    """Passes over each roll-out batch."""

    minibatches: int = 2
    """Optimizer steps per pass."""

    clip_range: float = 0.2
    """Probability ratios outside 1 ± this give no further gradient."""

    value_clip_range: float = 0.2
    """Values may move by this much from the old ones within one roll-out batch."""

    critic: Literal["adapter", "head"] = "adapter"
    """`adapter`: the critic is a trainable copy of the reward model; `head`: only its scalar head
    learns, on the frozen reward model's states, which one sweep gives together with the scores."""

    critic_learning_rate: float = 3e-4
    """Rate of the critic's adapter and head."""

    critic_epochs: int = 0
    """Passes of the critic over each roll-out batch; 0: as many as the policy makes. With
    `critic = "head"` a pass costs almost nothing."""

    gamma: float = 1.0
    """Discount a token."""

    gae_lambda: float = 0.95
    """Bias-variance trade of the advantages, in [0, 1]."""

    whiten_advantages: bool = True
    """Give the advantages of the whole roll-out batch mean 0 and variance 1."""

    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a completion that was cut off before it ended itself."""

    score_clip: float = 0.0
    """Clip centred scores to ± this; 0 leaves them."""

    max_approx_kl: float = 0.2
    """End the passes over a roll-out batch when the policy has moved by more (nats a token)."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Tuning the policy against a reward."""

    enabled: bool = True
    """Run the stage."""

    algorithm: Literal["ppo"] = "ppo"
    """A row of the algorithm table, `amenable.train.registry`."""

    reward: str = ""
    """A ready reward: a reward-model folder, hub id or `module:function`; empty: the run's own."""

    updates: int = 100
    """Roll-out batches."""

    prompts_per_update: int = 16
    """Prompts in a roll-out batch."""

    samples_per_prompt: int = 4
    """Completions of each prompt; they share one encoding of it."""

    temperature: float = 1.0
    """Sampling temperature; logits are divided by it in every log-probability as well."""

    top_p: float = 1.0
    """Must stay 1: a truncated behaviour policy is not the one that is differentiated."""

    top_k: int = 0
    """Must stay 0, for the same reason."""

    learning_rate: float = 1e-4
    """Policy's rate of AdamW (eps 1e-5); falls linearly to `final_learning_rate_fraction` of it."""

    final_learning_rate_fraction: float = 0.1
    """Share of the rate that is left at the last update."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm, policy and critic apart."""

    micro_batch_tokens: int = 2048
    """Tokens in one forward pass."""

    stop_at_kl: float = 0.0
    """End the stage early when the sequence KL exceeds this many nats; 0 never does."""

    checkpoint_every: int = 5
    """Updates between checkpoints."""

    kl: KLConfig = KLConfig()
    """The KL penalty."""

    ppo: PPOConfig = PPOConfig()
    """PPO's own settings."""
