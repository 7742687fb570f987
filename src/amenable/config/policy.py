"""The policy stage: which algorithm, how many roll-outs, how far from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amenable.config.preference import PreferenceConfig
from amenable.config.rewards import RewardPart

GATE_CHECKS = (
    "finite",
    "pad",
    "eos",
    "dropout",
    "ratio",
    "reference",
    "temperature",
    "padding",
    "neighbours",
    "group",
    "roll-out",
    "gradient",
    "reward",
    "critic",
)
"""Of the numerics gate, `amenable.train.gate`."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The penalty that keeps the policy near the reference."""

    coef: float = 0.05
    """Weight of the KL (the first one, if it is steered), in reward a nat; online DPO's beta."""

    placement: Literal["auto", "reward", "loss", "both", "none"] = "auto"
    """Where the penalty enters; `auto`: where the algorithm's paper has it. Only in the reward is
    the regularised optimum the one that the objective states."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the per-token KL in the reward; k1 is unbiased and the only one whose optimum is exact."""

    loss_estimator: Literal["k2", "k3", "weighted-k3"] = "k3"
    """Of the per-token KL in the loss: k3 as GRPO has it; k2 and weighted-k3 have the gradient of
    the KL itself. (k1's gradient is zero in the mean.)"""

    controller: Literal["fixed", "adaptive", "target"] = "fixed"
    """`adaptive` steers the weight so that the sequence KL stays near `target` (Ziegler et al.
    2019); `target` is a Lagrange multiplier: it falls to 0 while the KL is below `target`."""

    target: float = 6.0
    """Wanted (`adaptive`) or largest (`target`) sequence KL in nats."""

    horizon: int = 10_000
    """Episodes over which a controller reacts."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The critic and generalised advantage estimation."""

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

    critic_warmup_updates: int = 0
    """First updates in which only the critic learns."""

    gamma: float = 1.0
    """Discount a token."""

    gae_lambda: float = 0.95
    """Bias-variance trade of the advantages, in [0, 1]."""

    whiten_advantages: bool = True
    """Give the advantages of the whole roll-out batch mean 0 and variance 1."""


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig:
    """Pairs of the policy's own samples, labelled by the reward, and the DPO loss on them."""

    labels: Literal["soft", "sampled"] = "soft"
    """Both follow Bradley and Terry with the scores as logits: `soft` weighs both orders by their
    probability, `sampled` draws one. (The higher score as the winner would diverge.)"""


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """Supervised fine-tuning on the best of each prompt's samples."""

    sampler: Literal["policy", "reference"] = "policy"
    """`policy`: expert iteration, each update samples anew from what the last one made;
    `reference`: one round, every sample comes from the model that the policy started from."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which checkpoint an on-policy stage leaves behind: the last may have gone too far."""

    by: str = "auto"
    """Who scores the answers of the start and of every checkpoint to the validation prompts,
    decoded as in `evaluate`; the best one stays: `annotator` (the simulated one, without its noise)
    or the name of one of `policy.rewards`, such as one of weight 0; `last` measures nothing and
    keeps the last; `auto`: the annotator where it is simulated."""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """vLLM as the engine of roll-outs (docs/vllm.md)."""

    cache_gb: float = 2.0
    """Memory for keys and values, in GB of 1e9 bytes; the weights are held once more beside it."""

    ratio_cap: float = 2.0
    """A token's loss is weighted by the trainer's probability of it over vLLM's, up to this
    (truncated importance sampling); 0 leaves the weight out."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Tuning the policy against a reward, or directly on preferences."""

    enabled: bool = True
    """Run the stage."""

    algorithm: Literal[
        "ppo",
        "grpo",
        "dr-grpo",
        "dapo",
        "gspo",
        "rloo",
        "reinforce++",
        "reinforce++-baseline",
        "online-dpo",
        "best-of-n",
        "dpo",
        "ipo",
        "cdpo",
        "robust-dpo",
        "kto",
        "simpo",
        "orpo",
    ] = "ppo"
    """A row of the algorithm table, `amenable.algorithms`; those from `dpo` on learn from
    preferences directly and are set in `policy.preference`."""

    reward: str = ""
    """A ready reward: a reward-model folder, hub id or `module:function`; empty: the run's own."""

    rewards: tuple[RewardPart, ...] = ()
    """A mix of rewards, one section `[[policy.rewards]]` each, in place of `reward`."""

    max_reward_failures: float = 0.5
    """Largest share of a roll-out batch that may be left out because a reward failed."""

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

    engine: Literal["own", "vllm"] = "own"
    """Who samples the roll-outs of an update; `vllm` needs the extra of that name."""

    merged_rollouts: bool = True
    """With LoRA, sample from a second copy of the base into which the adapter is merged: faster.
    `false` samples with base and adapter as they are, and saves the memory of the copy; on a
    quantised base that is always so."""

    epochs: int = 2
    """Passes over each roll-out batch."""

    minibatches: int = 2
    """Optimizer steps per pass."""

    clip_range: float = 0.0
    """Probability ratios outside 1 ± this give no further gradient; 0: the algorithm's own, 0.2
    (GSPO, whose ratio is a whole completion's: 3e-4 below and 4e-4 above)."""

    clip_range_high: float = 0.0
    """The upper side, where it is another; 0: as `clip_range`, and where that is 0 too, the
    algorithm's own (DAPO: 0.28)."""

    dual_clip: float = 0.0
    """Ratio beyond which a token of negative advantage gives no further gradient; 0: none."""

    max_approx_kl: float = 0.2
    """End the passes over a roll-out batch when the policy has moved by more (nats a token)."""

    entropy_coef: float = 0.0
    """Weight of an entropy bonus, in reward a nat and token."""

    missing_eos: Literal["subtract", "replace", "filter"] = "subtract"
    """A completion that was cut off before it ended itself: `subtract` the penalty from its score,
    `replace` the score by minus the penalty, or leave it out of the batch and every mean."""

    missing_eos_penalty: float = 1.0
    """In units of reward."""

    score_clip: float = 0.0
    """Clip centred scores to ± this; 0 leaves them."""

    disagreement_coef: float = 0.0
    """Subtracted from the own reward model's score, in standard deviations over its heads
    (`reward.heads`): where they disagree, the score is a guess that a policy would exploit."""

    whiten_scores: bool = False
    """Divide the scores of a roll-out batch by their standard deviation; their mean stays."""

    learning_rate: float = 1e-4
    """Policy's rate of AdamW (eps 1e-5); falls linearly to `final_learning_rate_fraction` of it."""

    final_learning_rate_fraction: float = 0.1
    """Share of the rate that the update after the last would have."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm, policy and critic apart."""

    micro_batch_tokens: int = 0
    """Tokens in one forward pass; 0: 2048, or 1024 without LoRA."""

    stop_at_kl: float = 0.0
    """End the stage early when the sequence KL exceeds this many nats; 0 never does."""

    checkpoint_every: int = 5
    """Updates between checkpoints that `selection` may choose; `checkpoint` writes others for a
    resume."""

    gate: bool = True
    """Check the numerics on this very model before the first update; stop where they are off."""

    gate_skip: tuple[str, ...] = ()
    """Checks of the gate that are measured but not held to (docs/gate.md)."""

    kl: KLConfig = KLConfig()
    """The KL penalty."""

    selection: SelectionConfig = SelectionConfig()
    """The choice of a checkpoint."""

    ppo: PPOConfig = PPOConfig()
    """PPO's own settings."""

    online_dpo: OnlineDPOConfig = OnlineDPOConfig()
    """Online DPO's own settings."""

    best_of_n: BestOfNConfig = BestOfNConfig()
    """Best-of-n's own settings."""

    vllm: VllmConfig = VllmConfig()
    """vLLM's settings."""

    preference: PreferenceConfig = PreferenceConfig()
    """DPO and its relatives."""
