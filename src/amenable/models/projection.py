"""Log-probabilities from hidden states, through a frozen vocabulary projection, in one pass.

The logits of a few rows exist at a time and are overwritten in place. Where the states are trained,
each row's gradient is formed there and then, since it is known up to the factor that comes back:

    d log p_t / d h = (W[t] - sum_v p_v W[v]) / temperature

so that nothing as wide as the vocabulary is kept for the backward pass. Shapes: M positions, d
hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

_ROWS = {"cpu": 256}
_MOST_ROWS = 2048
_LEAST = -1e4  # nats below the largest; its exponential is 0, and 0 times it is not NaN


def frozen_projection(model: PreTrainedModel) -> Tensor | None:
    """[V, d] where the logits are a plain product with weights that nothing trains; else None."""
    head = model.get_output_embeddings()
    bent = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    plain = type(head) is nn.Linear and head.bias is None and not bent
    return head.weight if plain and not head.weight.requires_grad else None


def projected_logprobs(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy of each distribution, which has no gradient.

    Args:
        states: [M, d].
        weight: [V, d], frozen.
        targets: [M] token ids.
        temperature: logits are divided by it.
        with_entropy: return the entropy as well.

    Returns:
        [M] nats, and [M] nats or None; float32, or float64 for float64 states.
    """
    logprobs, entropy = cast(Any, _Projection).apply(
        states, weight, targets, temperature, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = _ROWS.get(states.device.type, _MOST_ROWS)
        trained = ctx.needs_input_grad[0]
        logprobs, entropies, gradients = [], [], []
        for part, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            logits = linear(part, weight)
            logits = logits if logits.dtype is torch.float64 else logits.float()
            if temperature != 1:
                logits.div_(temperature)
            logits.sub_(logits.amax(-1, keepdim=True))
            picked = logits.gather(-1, wanted[:, None])[:, 0]
            mass = logits.clamp_(min=_LEAST).exp() if with_entropy else logits.exp_()
            total = mass.sum(-1)
            logprobs.append(picked - total.log())
            if with_entropy:
                spread = torch.bmm(mass[:, None], logits[:, :, None])[:, 0, 0]
                entropies.append(total.log() - spread / total)
            if trained:
                expected = torch.mm(mass.to(weight.dtype), weight).to(mass.dtype) / total[:, None]
                gradients.append((weight[wanted].to(mass.dtype) - expected) / temperature)
        found = torch.cat(logprobs)
        entropy = torch.cat(entropies) if with_entropy else found.new_empty(0)
        ctx.mark_non_differentiable(entropy)
        if trained:
            ctx.save_for_backward(torch.cat(gradients))
            ctx.dtype = states.dtype
        return found, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = cast(tuple[Tensor], ctx.saved_tensors)
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None, None, None
