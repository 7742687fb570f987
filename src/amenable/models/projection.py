"""Log-probabilities from hidden states, through the vocabulary projection, in one pass.

The logits of a few rows exist at a time and are overwritten in place; nothing as wide as the
vocabulary is kept for the backward pass. With p = softmax(z), z = W h / temperature:

    d log p_t / d z = onehot(t) - p           d entropy / d z_v = -p_v (z_v - sum_u p_u z_u)

Where the projection is frozen, each row's gradient by its state is formed there and then, since it
is known up to the factor that comes back. Where it is trained, the backward pass makes the logits
again. Shapes: M positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

_ROUND = 64  # rows
_ROWS = {"cpu": 256}
_MOST_ROWS = 2048
_LEAST = -1e4  # nats below the largest; its exponential is 0, and 0 times it is not NaN


def plain_projection(model: PreTrainedModel) -> nn.Linear | None:
    """The output head where the logits are a plain product with its weights; else None."""
    head = cast(nn.Linear, model.get_output_embeddings())
    bent = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    plain = type(head) is nn.Linear and head.bias is None and not bent
    return head if plain else None


def filling(rows: int, whole: int = _ROUND) -> int:
    """How many rows to put behind these, so that products have few sizes.

    On a CPU oneDNN compiles a kernel of some hundred kilobytes for every size that it meets, and
    keeps it for good.
    """
    return -rows % whole


def precision(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a product runs in: autocast's precision where it is on, else the weight's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def projected_logprobs(
    states: Tensor,
    head: nn.Linear,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy of each distribution.

    Args:
        states: [M, d].
        head: weight [V, d], no bias.
        targets: [M] token ids.
        temperature: logits are divided by it.
        with_entropy: return the entropy as well.

    Returns:
        [M] nats, and [M] nats or None; float32, or float64 for float64 states.
    """
    setting = _Setting(temperature, with_entropy, precision(states, head.weight))
    count = len(states)
    if states.device.type == "cpu":
        more = filling(count)
        states, targets = pad(states, (0, 0, 0, more)), pad(targets, (0, more))
    logprobs, entropy = cast(Any, _Projection).apply(states, head.weight, targets, setting)
    return logprobs[:count], entropy[:count] if with_entropy else None


class _Setting(NamedTuple):
    temperature: float
    with_entropy: bool
    dtype: torch.dtype


class _Rows:
    """The softmax of a few rows, unnormalised: logits less their largest, exponentials, sums."""

    def __init__(self, states: Tensor, weight: Tensor, temperature: float, entropy: bool) -> None:
        logits = linear(states, weight)
        logits = logits if logits.dtype is torch.float64 else logits.float()
        if temperature != 1:
            logits.div_(temperature)
        self.logits = logits.sub_(logits.amax(-1, keepdim=True))
        self._with_entropy = entropy

    def exponentiate(self) -> None:
        """From here on `logits` are there only where the entropy is wanted."""
        self.mass = (
            self.logits.clamp_(min=_LEAST).exp() if self._with_entropy else self.logits.exp_()
        )
        self.total = self.mass.sum(-1)
        if self._with_entropy:
            spread = torch.bmm(self.mass[:, None], self.logits[:, :, None])[:, 0, 0]
            self.mean = spread / self.total  # of the shifted logits

    def entropy(self) -> Tensor:
        """[m] nats."""
        return self.total.log() - self.mean

    def lean(self) -> Tensor:
        """[m, V] p (z - mean z), minus the gradient of the entropy; overwrites the logits."""
        share = self.mass / self.total[:, None]
        return self.logits.sub_(self.mean[:, None]).mul_(share)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        kept, made = states.to(setting.dtype), weight.to(setting.dtype)
        by_state, by_weight = ctx.needs_input_grad[:2]
        logprobs, entropies, gradients, leans = [], [], [], []
        for part, wanted in _pieces(kept, targets):
            rows = _Rows(part, made, setting.temperature, setting.with_entropy)
            picked = rows.logits.gather(-1, wanted[:, None])[:, 0]
            rows.exponentiate()
            logprobs.append(picked - rows.total.log())
            if setting.with_entropy:
                entropies.append(rows.entropy())
            if by_state and not by_weight:
                expected = _product(rows.mass, made) / rows.total[:, None]
                gradients.append((made[wanted].to(expected) - expected) / setting.temperature)
                if setting.with_entropy:
                    leans.append(_product(rows.lean(), made) / -setting.temperature)
        found = torch.cat(logprobs)
        entropy = torch.cat(entropies) if entropies else found.new_empty(0)
        ctx.setting, ctx.dtype = setting, states.dtype
        ctx.set_materialize_grads(False)
        if by_weight:
            ctx.save_for_backward(kept, weight, targets)
        elif by_state:
            ctx.save_for_backward(torch.cat(gradients), *([torch.cat(leans)] if leans else []))
        return found, entropy

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        given = [grad for grad in grads if grad is not None and len(grad)]
        if not given:
            return None, None, None, None
        by_logprob, by_entropy = (
            torch.zeros_like(given[0]) if grad is None or not len(grad) else grad for grad in grads
        )
        if not ctx.needs_input_grad[1]:
            parts = zip(ctx.saved_tensors, (by_logprob, by_entropy), strict=False)
            total = sum(gradient * factor[:, None] for gradient, factor in parts)
            return cast(Tensor, total).to(ctx.dtype), None, None, None
        with torch.autocast(given[0].device.type, enabled=False):
            return *_trained(ctx, by_logprob, by_entropy), None, None


def _trained(ctx: Any, by_logprob: Tensor, by_entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of states and weight, from logits made again."""
    states, weight, targets = cast(tuple[Tensor, Tensor, Tensor], ctx.saved_tensors)
    setting, made = ctx.setting, weight.to(states.dtype)
    total = torch.zeros_like(weight)
    found, start = [], 0
    for part, wanted in _pieces(states, targets):
        own = slice(start, start + len(part))
        start = own.stop
        rows = _Rows(part, made, setting.temperature, setting.with_entropy)
        rows.exponentiate()
        by_logit = rows.lean().mul_(-by_entropy[own, None]) if setting.with_entropy else None
        share = rows.mass.mul_((-by_logprob[own] / rows.total)[:, None])
        by_logit = share if by_logit is None else by_logit.add_(share)
        by_logit.scatter_add_(1, wanted[:, None], by_logprob[own, None])
        narrow = by_logit.div_(setting.temperature).to(states.dtype)
        found.append(narrow @ made)
        if narrow.dtype is total.dtype:
            total.addmm_(narrow.T, part)
        else:
            total.add_(narrow.T @ part)
    return torch.cat(found).to(ctx.dtype), total


def _pieces(states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = _ROWS.get(states.device.type, _MOST_ROWS)
    return zip(states.split(rows), targets.split(rows), strict=True)


def _product(wide: Tensor, weight: Tensor) -> Tensor:
    """[m, d] in the precision of the [m, V]; the product runs in the weight's."""
    return torch.mm(wide.to(weight.dtype), weight).to(wide.dtype)
