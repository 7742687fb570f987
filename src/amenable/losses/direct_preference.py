"""DPO and its relatives that keep a reference. N pairs; every loss is unreduced, [N].

All of them see the pair through one number, the lead of the chosen completion's log-ratio:

    lead = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)

Inputs are sequence log-probabilities: sums over real tokens, the end-of-sequence token included.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from amenable.losses.checks import (
    check_below_half,
    check_positive,
    check_precise,
    check_same_shape,
)


def dpo_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    ref_chosen: Float[Tensor, " N"],
    ref_rejected: Float[Tensor, " N"],
    beta: float,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood of the choice under the reward that the policy itself implies.

    loss_i = -log sigmoid(beta lead_i)

    Args:
        policy_chosen: [N] sequence log-probabilities of the chosen completions, nats, summed over
            real tokens.
        policy_rejected: [N] the same of the rejected ones.
        ref_chosen: [N] the same under the frozen reference.
        ref_rejected: [N] the same under the frozen reference.
        beta: above 0; the weight of the KL term in the objective that is solved.

    Returns:
        [N] nats per comparison; log 2 where policy and reference agree.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a beta that is not above 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    check_positive(beta=beta)
    return -logsigmoid(beta * _lead(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


def soft_dpo_loss(
    policy_first: Float[Tensor, " N"],
    policy_second: Float[Tensor, " N"],
    ref_first: Float[Tensor, " N"],
    ref_second: Float[Tensor, " N"],
    probabilities: Float[Tensor, " N"],
    beta: float,
) -> Float[Tensor, " N"]:
    """Cross-entropy of the implied choice against the probability that the first is preferred.

    loss_i = -p_i log sigmoid(beta lead_i) - (1 - p_i) log sigmoid(-beta lead_i)

    It is the mean of `dpo_loss` over labels drawn with those probabilities, without their noise.

    Args:
        policy_first: [N] sequence log-probabilities of the first completions, nats; which of the
            two is better is told by `probabilities`.
        policy_second: [N] the same of the second ones.
        ref_first: [N] the same under the frozen reference.
        ref_second: [N] the same under the frozen reference.
        probabilities: [N] in [0, 1]; 1/2 is a tie. `choice_probabilities` makes them from scores.
        beta: above 0; the weight of the KL term.

    Returns:
        [N] nats per comparison; least where beta lead = log(p / (1 - p)).

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a probability outside [0, 1], or a beta that is
            not above 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7 in expectation over the label of eq. 6;
    online, Guo et al. 2024, arXiv:2402.04792.
    """
    check_positive(beta=beta)
    check_same_shape(1, policy_first=policy_first, probabilities=probabilities)
    check_precise(probabilities=probabilities)
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must be in [0, 1]")
    logits = beta * _lead(policy_first, policy_second, ref_first, ref_second)
    return -probabilities * logsigmoid(logits) - (1 - probabilities) * logsigmoid(-logits)


def conservative_dpo_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    ref_chosen: Float[Tensor, " N"],
    ref_rejected: Float[Tensor, " N"],
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, " N"]:
    """DPO against smoothed labels: biased, with a minimum at a finite lead.

    loss_i = -(1 - e) log sigmoid(beta lead_i) - e log sigmoid(-beta lead_i),  e = label_smoothing

    Args:
        policy_chosen: as in `dpo_loss`.
        policy_rejected: as in `dpo_loss`.
        ref_chosen: as in `dpo_loss`.
        ref_rejected: as in `dpo_loss`.
        beta: above 0; the weight of the KL term.
        label_smoothing: share of the labels taken to be wrong, in [0, 0.5); 0 is DPO.

    Returns:
        [N] nats per comparison; log 2 where policy and reference agree; the gradient is 0 at
        beta lead = log((1 - e) / e), further on it pulls back.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a beta that is not above 0, or a smoothing
            outside [0, 0.5).

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO",
    https://ericmitchell.ai/cdpo.pdf; compared in Chowdhury et al. 2024, arXiv:2403.00409.
    """
    check_positive(beta=beta)
    check_below_half(label_smoothing=label_smoothing)
    logits = beta * _lead(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust_dpo_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    ref_chosen: Float[Tensor, " N"],
    ref_rejected: Float[Tensor, " N"],
    beta: float,
    flip_rate: float,
) -> Float[Tensor, " N"]:
    """DPO's loss on the true labels, estimated without bias from labels flipped at a known rate.

    loss_i = (-(1 - e) log sigmoid(beta lead_i) + e log sigmoid(-beta lead_i)) / (1 - 2 e),
    e = flip_rate

    Its mean over a pair's two labels, of weights 1 - e and e, is DPO's loss on the true label. That
    of one label alone has no lower bound: it falls for ever as beta lead grows, at a slope of
    -e / (1 - 2 e), so pairs that are seen with one label are pushed apart harder than by DPO.

    Args:
        policy_chosen: as in `dpo_loss`.
        policy_rejected: as in `dpo_loss`.
        ref_chosen: as in `dpo_loss`.
        ref_rejected: as in `dpo_loss`.
        beta: above 0; the weight of the KL term.
        flip_rate: probability that a label names the wrong side, in [0, 0.5); 0 is DPO.

    Returns:
        [N] nats per comparison, of either sign; log 2 where policy and reference agree.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, a beta that is not above 0, or a flip rate
            outside [0, 0.5).

    Source: Chowdhury et al. 2024, arXiv:2403.00409, section 3 (rDPO).
    """
    check_positive(beta=beta)
    check_below_half(flip_rate=flip_rate)
    logits = beta * _lead(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    unscaled = -(1 - flip_rate) * logsigmoid(logits) + flip_rate * logsigmoid(-logits)
    return unscaled / (1 - 2 * flip_rate)


def ipo_loss(
    policy_chosen: Float[Tensor, " N"],
    policy_rejected: Float[Tensor, " N"],
    ref_chosen: Float[Tensor, " N"],
    ref_rejected: Float[Tensor, " N"],
    beta: float,
) -> Float[Tensor, " N"]:
    """Squared distance of the lead from the one that the regularised objective asks for.

    loss_i = (lead_i - 1 / (2 beta))^2

    Over the summed log-probabilities, as in the paper: only for these is the optimum
    ref(y) exp(P(y better than a draw of mu) / beta). TRL divides each log-ratio by its completion's
    length, which has another optimum where lengths differ; pass `mean_logprobs` of the four to
    have that.

    Args:
        policy_chosen: as in `dpo_loss`.
        policy_rejected: as in `dpo_loss`.
        ref_chosen: as in `dpo_loss`.
        ref_rejected: as in `dpo_loss`.
        beta: above 0; the paper's tau.

    Returns:
        [N] squared nats; 1 / (4 beta^2) where policy and reference agree. Of another scale than the
        logistic losses, so with another learning rate: the slope there is -1 / beta.

    Raises:
        ValueError: wrong ranks, shapes or dtypes, or a beta that is not above 0.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    check_positive(beta=beta)
    lead = _lead(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (lead - 1 / (2 * beta)).square()


def _lead(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    named = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
    }
    check_same_shape(1, **named)
    check_precise(**named)
    return (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
