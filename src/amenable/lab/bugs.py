"""The table of planted bugs: each breaks one line of the real code.

A bug is a list of functions of the package that are replaced for a while. It names the gradient
checks whose code goes through the broken line; identities are asked of every bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amenable.data import collate as layout
from amenable.data.collate import GroupBatch
from amenable.lab.problems import EOS_ID
from amenable.lab.recording import replaced
from amenable.losses import advantages, aggregation, likelihood, masked, selection
from amenable.losses import policy as policy_losses
from amenable.models import logprobs
from amenable.rollout import transformers_engine
from amenable.rollout.types import Rollout
from amenable.train import (
    best_of_n,
    on_policy,
    online_preference,
    pair_reference,
    passes,
    penalty,
    policy_gradient,
    ppo,
)

Patch = tuple[Any, str, Any]
"""(where, name, replacement)."""


@dataclass(frozen=True)
class Bug:
    """A fault and where to look for it.

    Args:
        what: in one line.
        patches: makes the replacements.
        cells: labels of the gradient checks whose code it is in.
    """

    what: str
    patches: Callable[[], Sequence[Patch]]
    cells: tuple[str, ...]


def _temperature() -> list[Patch]:
    real = likelihood.token_logprobs

    def broken(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        return real(logits, targets, 1.0)

    return [(logprobs, "token_logprobs", broken)]


def _leaky_mask() -> list[Patch]:
    def broken(segments: Tensor) -> Tensor:
        size = segments.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        allowed = causal & (segments[:, None, :] >= 0)
        return (allowed | torch.eye(size, dtype=torch.bool))[:, None]

    return [(layout, "_group_attention", broken)]


def _collated(change: Callable[[GroupBatch], GroupBatch]) -> list[Patch]:
    """`collate` with its result changed, wherever the name is bound."""
    real = layout.collate

    def broken(groups: Sequence[layout.PromptGroup], pad_id: int) -> GroupBatch:
        return change(real(groups, pad_id))

    return [(layout, "collate", broken), (on_policy, "collate", broken)]


def _positions() -> list[Patch]:
    def shifted(batch: GroupBatch) -> GroupBatch:
        columns = torch.arange(batch.position_ids.shape[1]).expand_as(batch.position_ids)
        return replace(batch, position_ids=columns.clone())

    return _collated(shifted)


def _pads_counted() -> list[Patch]:
    def counted(batch: GroupBatch) -> GroupBatch:
        return replace(batch, mask=torch.ones_like(batch.mask))

    return _collated(counted)


def _missing_eos() -> list[Patch]:
    def without(batch: GroupBatch) -> GroupBatch:
        return replace(batch, mask=batch.mask & (batch.targets != EOS_ID))

    return _collated(without)


def _endless() -> list[Patch]:
    real = transformers_engine.TransformersEngine.generate

    def broken(self: Any, *args: Any) -> list[Rollout]:
        return [replace(rollout, ended=True) for rollout in real(self, *args)]

    return [(transformers_engine.TransformersEngine, "generate", broken)]


def _whitening_over_pads() -> list[Patch]:
    real = masked.masked_whiten

    def broken(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        return real(values, torch.ones_like(mask), shift_mean) * mask

    return [(where, "masked_whiten", broken) for where in (advantages, ppo, policy_gradient)]


def _stale_logprobs() -> list[Patch]:
    real = on_policy._OnPolicyLoop._swept

    def broken(self: Any, unmeasured: Any) -> Any:
        micro = real(self, unmeasured)
        return replace(micro, logprobs=micro.ref_logprobs)

    return [(on_policy._OnPolicyLoop, "_swept", broken)]


def _moving_reference() -> list[Patch]:
    real = on_policy._OnPolicyLoop._swept

    def broken(self: Any, unmeasured: Any) -> Any:
        micro = real(self, unmeasured)
        return replace(micro, ref_logprobs=micro.logprobs)

    return [(on_policy._OnPolicyLoop, "_swept", broken)]


def _score_one_off() -> list[Patch]:
    def broken(mask: Tensor) -> Tensor:
        last = mask.sum(1) - 1
        columns = torch.arange(mask.shape[1])
        return columns == (last - 1).clamp(min=0)[:, None]

    return [(advantages, "_last_tokens", broken)]


def _std_before_mean() -> list[Patch]:
    def broken(scores: Tensor, scale: str | None = "std") -> Tensor:
        mean = scores.mean(dim=1, keepdim=True)
        if scale is None:
            return scores - mean
        return scores / (scores.std(dim=1, keepdim=True) + 1e-4) - mean

    return [(policy_gradient, "group_relative", broken)]


def _std_of_batch() -> list[Patch]:
    def broken(sampled: policy_gradient.Sampled) -> Tensor:
        scale = 1 / (sampled.scores.std() + 1e-4)
        return policy_gradient.by_group(
            sampled, lambda scores: scale * advantages.group_relative(scores, None)
        )

    table = policy_gradient.GRADIENTS
    return [(table, name, replace(table[name], advantages=broken)) for name in ("grpo", "gspo")]


def _weak_beta() -> list[Patch]:
    real = advantages.shape_rewards

    def broken(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
        return real(scores, kl, mask, 0.8 * kl_coef)

    return [(penalty, "shape_rewards", broken)]


def _weak_beta_in_loss() -> list[Patch]:
    real = passes.loss_penalty

    def broken(policy: Any) -> Callable[..., Tensor]:
        plain = real(policy)
        return lambda new, old, ref: 0.8 * plain(new, old, ref)

    return [(passes, "loss_penalty", broken)]


def _reversed_kl() -> list[Patch]:
    real = passes.loss_penalty

    def broken(policy: Any) -> Callable[..., Tensor]:
        plain = real(policy)
        return lambda new, old, ref: plain(ref, old, new)

    return [(passes, "loss_penalty", broken)]


def _dropped_negatives() -> list[Patch]:
    real = policy_losses.ppo_policy_loss

    def broken(new: Tensor, old: Tensor, own: Tensor, *rest: Any) -> Tensor:
        return real(new, old, own.clamp(min=0), *rest)

    return [(passes, "ppo_policy_loss", broken)]


def _itself_in_baseline() -> list[Patch]:
    def broken(scores: Tensor) -> Tensor:
        return scores - scores.mean(dim=1, keepdim=True)

    return [(policy_gradient, "leave_one_out", broken)]


def _gae_shift() -> list[Patch]:
    real = advantages.gae

    def broken(
        rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
    ) -> tuple[Tensor, Tensor]:
        early = torch.nn.functional.pad(values, (0, 1))[:, 1:] * mask
        return real(rewards, early, mask, gamma, gae_lambda)

    return [(where, "gae", broken) for where in (advantages, ppo)]


def _mean_of_means() -> list[Patch]:
    real = passes.lesson_weights

    def broken(lessons: Sequence[Any], *rest: Any) -> list[Tensor]:
        return [real([lesson], *rest)[0] / len(lessons) for lesson in lessons]

    return [(passes, "lesson_weights", broken)]


def _swapped_labels() -> list[Patch]:
    real = selection.choice_probabilities

    def broken(first: Tensor, second: Tensor) -> Tensor:
        return real(second, first)

    return [(online_preference, "choice_probabilities", broken)]


def _certain_labels() -> list[Patch]:
    def broken(first: Tensor, second: Tensor) -> Tensor:
        return (first > second).float() + 0.5 * (first == second).float()

    return [(online_preference, "choice_probabilities", broken)]


def _worst_of_n() -> list[Patch]:
    real = selection.best_of_n

    def broken(scores: Tensor) -> Tensor:
        return (real(scores) + 1) % scores.shape[1]

    return [(best_of_n, "best_of_n", broken)]


def _length_means() -> list[Patch]:
    real = likelihood.sequence_logprobs

    def broken(values: Tensor, mask: Tensor) -> Tensor:
        return real(values, mask) / mask.sum(1).clamp(min=1)

    return [(pair_reference, "sequence_logprobs", broken)]


def _one_token_of_each() -> list[Patch]:
    real = aggregation.token_weights

    def broken(mask: Tensor, kind: Any, length: int = 1, dtype: Any = torch.float32) -> Tensor:
        return real(mask, "token" if kind == "sequence" else kind, length, dtype)

    return [(passes, "token_weights", broken)]


_PPO, _EXACT = "ppo, lambda 1, no critic", "ppo, lambda 0.9, exact critic, whitened"
_RLOO, _GRPO = "rloo, as published", "grpo, as published"
_SAMPLING = (_RLOO, _GRPO)

BUGS: Mapping[str, Bug] = {
    "temperature": Bug(
        "log-probabilities of the logits, not of logits / temperature",
        _temperature,
        ("rloo, temperature 0.7",),
    ),
    "leaky mask": Bug("a completion sees the ones before it", _leaky_mask, _SAMPLING),
    "positions": Bug("a later completion's positions go on counting", _positions, _SAMPLING),
    "pads counted": Bug("the mask is True on padding", _pads_counted, (_PPO, _GRPO)),
    "missing EOS": Bug("the end token is outside the mask", _missing_eos, (_PPO, _RLOO)),
    "everything ended": Bug("cut-off completions are called ended", _endless, ()),
    "whitening over pads": Bug(
        "mean and deviation over padding as well",
        _whitening_over_pads,
        (_EXACT, "reinforce++, as published"),
    ),
    "stale log-probabilities": Bug(
        "old log-probabilities of an earlier policy", _stale_logprobs, (_PPO, _RLOO)
    ),
    "moving reference": Bug("the reference is the policy itself", _moving_reference, (_RLOO,)),
    "score one token off": Bug("the score falls on the token before", _score_one_off, (_PPO,)),
    "std in the wrong place": Bug(
        "scores / deviation - mean", _std_before_mean, (_GRPO, "gspo, as published")
    ),
    "std of the batch": Bug("the batch's deviation for the group's", _std_of_batch, (_GRPO,)),
    "beta off by 20 %": Bug("0.8 beta in the reward", _weak_beta, (_PPO, _RLOO)),
    "beta off by 20 % in the loss": Bug(
        "0.8 beta in the loss", _weak_beta_in_loss, (_GRPO, "dr-grpo, as published")
    ),
    "KL turned round": Bug("policy and reference swapped in the loss", _reversed_kl, (_GRPO,)),
    "dropped negative advantages": Bug(
        "only what is better than the mean is learnt", _dropped_negatives, (_PPO, _RLOO)
    ),
    "itself in the baseline": Bug(
        "leave-one-out that leaves nothing out", _itself_in_baseline, (_RLOO,)
    ),
    "GAE one value off": Bug("V(t + 1) where V(t) belongs", _gae_shift, (_EXACT,)),
    "mean of means": Bug(
        "each micro-batch is averaged by itself", _mean_of_means, (_PPO, "dapo, as published")
    ),
    "wrong denominator": Bug("token means for completion means", _one_token_of_each, (_GRPO,)),
    "swapped labels": Bug(
        "the worse one is preferred", _swapped_labels, ("online-dpo, soft labels",)
    ),
    "certain labels": Bug(
        "the higher score always wins", _certain_labels, ("online-dpo, soft labels",)
    ),
    "wrong one of n": Bug("not the best completion", _worst_of_n, ("best-of-n, n = 3",)),
    "mean log-probabilities": Bug(
        "a token's mean for the sum in DPO", _length_means, ("dpo, drawn labels",)
    ),
}
"""By name."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The package with a bug of the table in it."""
    with ExitStack() as stack:
        for where, key, value in BUGS[name].patches():
            stack.enter_context(replaced(where, key, value))
        yield
