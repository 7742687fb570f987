"""Tuning the policy on pairs directly, without roll-outs: DPO and its relatives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Settings of the off-policy algorithms: dpo, ipo, cdpo, robust-dpo, kto, simpo and orpo.

    They take the place of the roll-out settings of `[policy]`.
    """

    beta: float = 0.1
    """Weight of the KL term in the objective that is solved (dpo, cdpo, robust-dpo), IPO's tau,
    or how fast KTO's utility saturates; larger stays nearer to the reference."""

    label_smoothing: float = 0.1
    """cdpo: share of the labels taken to be wrong, below 0.5; 0 is DPO."""

    flip_rate: float = 0.1
    """robust-dpo: known probability that a label names the wrong side, below 0.5; 0 is DPO."""

    simpo_beta: float = 2.0
    """simpo: scale of the difference in mean log-probability, so larger than `beta`."""

    simpo_margin: float = 1.0
    """simpo: the paper's gamma, the lead that is asked for, in units of the scaled difference."""

    orpo_weight: float = 0.1
    """orpo: the paper's lambda, weight of the odds-ratio term beside the likelihood."""

    desirable_weight: float = 1.0
    """kto: weight of a desirable completion's loss."""

    undesirable_weight: float = 1.0
    """kto: weight of an undesirable completion's loss."""

    sft_coef: float = 0.0
    """Added to the loss: this times the chosen completion's negative log-likelihood a token. It
    keeps the chosen completions likely, and moves the optimum; 0 leaves it out."""

    epochs: float = 1.0
    """Passes over the pairs."""

    max_steps: int = 0
    """Stop after this many optimizer steps; 0: as many as `epochs` asks."""

    batch_size: int = 16
    """Pairs per optimizer step."""

    learning_rate: float = 5e-5
    """Peak rate of AdamW; falls linearly to 0 after the warm-up."""

    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises from 0."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""

    micro_batch_tokens: int = 0
    """Tokens in one forward pass, gathered to `batch_size`; 0: 2048, or 1024 without LoRA."""

    evaluations: int = 3
    """How often the validation pairs are measured; the best checkpoint is kept."""
