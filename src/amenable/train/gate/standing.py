"""Checks that need no pass over tokens: weights, special tokens, dropout, ends of completions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from amenable.data.collate import PromptGroup, collate
from amenable.models.build import Foundation
from amenable.models.load import eos_ids
from amenable.models.roles import Role
from amenable.ranks.sharding import own_part, whole
from amenable.rollout.transformers_engine import TransformersEngine
from amenable.rollout.types import Request, Sampling
from amenable.train.gate.findings import Finding, count

_CERTAIN = 1e4  # added to a logit: no other token can be drawn
_SHORT = 8  # prompt tokens that are enough to see a completion end


def modules_of(roles: Sequence[Role], engine: TransformersEngine) -> dict[str, nn.Module]:
    """Every module that takes part, once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for role in roles:
        for module in (role.model, role.head):
            if module is not None:
                found.setdefault(id(module), (type(module).__name__, module))
    found.setdefault(id(engine.model), ("roll-out", engine.model))
    return {f"{index}.{name}": module for index, (name, module) in enumerate(found.values())}


def finite_weights(modules: dict[str, nn.Module]) -> Finding:
    """Every weight of every role, and of the roll-out copy."""
    faults, seen = [], set()
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                held = own_part(parameter.detach())
                if not math.isfinite(float(held.sum(dtype=torch.float32))):
                    faults.append(name)
    return count("finite", "weights that hold a number that is not finite", faults)


def pad_token(foundation: Foundation, role: Role, engine: TransformersEngine) -> Finding:
    """The pad token ends nothing, has a row in the embedding, and is everybody's."""
    renderer = foundation.renderer
    pad = foundation.tokenizer.pad_token_id
    rows = cast(nn.Embedding, role.plain.get_input_embeddings()).weight.shape[0]
    faults = []
    if not isinstance(pad, int):
        faults.append("the tokenizer has none")
    elif pad in _all_ends(foundation):
        faults.append(f"{pad} ends a sequence")
    elif not 0 <= pad < rows:
        faults.append(f"{pad} has no row in an embedding of {rows}")
    elif len({pad, renderer.pad_id, engine.pad_id}) > 1:
        faults.append(f"tokenizer {pad}, renderer {renderer.pad_id}, sampler {engine.pad_id}")
    return count("pad", "faults of the pad token", faults)


def eos_tokens(foundation: Foundation, role: Role, engine: TransformersEngine) -> Finding:
    """The ids that end a completion are the model's own, exist, and are everybody's."""
    ends = _all_ends(foundation)
    rows = cast(nn.Linear, role.plain.get_output_embeddings()).weight.shape[0]
    faults = [f"{end} is outside a vocabulary of {rows}" for end in ends if not 0 <= end < rows]
    for who, theirs in (("renderer", foundation.renderer.eos_ids), ("sampler", engine.eos_ids)):
        if set(theirs) != set(ends):
            faults.append(f"the {who} ends at {sorted(theirs)}, the model at {sorted(ends)}")
    return count("eos", "faults of the end-of-sequence ids", faults)


def _all_ends(foundation: Foundation) -> frozenset[int]:
    """Read again from the model's folder, and those of the renderer."""
    return eos_ids(foundation.source, foundation.tokenizer) | foundation.renderer.eos_ids


def eos_recognised(
    foundation: Foundation, engine: TransformersEngine, prompt_ids: Sequence[int]
) -> Finding:
    """With an end made certain the engine stops there; with another token it goes on."""
    faults = []
    ends = _all_ends(foundation)
    head = cast(nn.Linear, engine.model.get_output_embeddings())
    rows = head.weight.shape[0]
    other = next(token for token in range(rows) if token not in ends)
    request = Request(tuple(prompt_ids[-_SHORT:]), ("gate", "end"))
    for token in [*sorted(end for end in ends if 0 <= end < rows), other]:
        with _Certain(head, token):
            rollout = engine.generate([request], Sampling(max_new_tokens=2, temperature=0))[0]
        wanted = (token,) if token in ends else (token, token)
        if rollout.completion_ids != wanted or rollout.ended != (token in ends):
            faults.append(f"{token} was {'not ' if token in ends else ''}taken for an end")
    return count("eos", "ends that the sampler takes wrongly", faults)


class _Certain:
    """Makes one token certain at every position of an output layer."""

    def __init__(self, head: nn.Module, token: int) -> None:
        self._head, self._token = head, token

    def __enter__(self) -> None:
        def raised(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., self._token] += _CERTAIN
            return changed

        self._handle = self._head.register_forward_hook(raised)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def eos_trained(foundation: Foundation, prompt_ids: Sequence[int]) -> Finding:
    """A rendered answer ends with an end, which counts in the mask that losses are taken over."""
    renderer = foundation.renderer
    ids = renderer.completion_ids("Yes.")
    faults = []
    if len(ids) < renderer.max_completion_tokens and ids[-1] not in _all_ends(foundation):
        faults.append(f"a rendered answer ends with {ids[-1]}, which ends nothing")
    end = min(_all_ends(foundation))
    batch = collate([PromptGroup(list(prompt_ids), [[*ids[:-1], end], [end]])], renderer.pad_id)
    for index in range(2):
        counted = batch.targets[index][batch.mask[index]].tolist()
        if not counted or counted[-1] != end:
            faults.append("the end carries no loss")
        elif int(batch.input_ids[batch.rows[index], batch.last[index]]) != end:
            faults.append("the last token of a completion is not its end")
    return count("eos", "ways in which stopping is not trained", faults)


def dropout_off(modules: dict[str, nn.Module]) -> Finding:
    """No module in training mode with a dropout rate above 0."""
    faults: list[str] = []
    for module in modules.values():
        faults += [name for name, part in module.named_modules() if part.training and _drops(part)]
    return count("dropout", "modules with active dropout", faults)


def _drops(module: nn.Module) -> bool:
    """Whether it has a rate above 0: its own `p`, or an attribute that is named for dropout."""
    rates = {
        key: value
        for key, value in vars(module).items()
        if "drop" in key or (key == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
    }
    return any(_rate(value) > 0 for value in rates.values())


def _rate(value: object) -> float:
    return float(value) if isinstance(value, float | int) and not isinstance(value, bool) else 0.0


def gradient(
    roles: Iterable[Role], policy: Role, groups: Sequence[PromptGroup], pad_id: int
) -> list[Finding]:
    """After one backward pass exactly the parameters that the optimizer gets have a gradient."""
    names = {
        id(parameter): name
        for role in roles
        for module in (role.model, role.head)
        if module is not None
        for name, parameter in module.named_parameters()
    }
    parameters = {
        id(parameter): parameter
        for role in roles
        for module in (role.model, role.head)
        if module is not None
        for parameter in module.parameters()
    }
    trained = {id(parameter): parameter for parameter in policy.trainable_parameters()}
    with torch.enable_grad():
        batch = collate(groups, pad_id).to(policy.device)
        loss = -policy.logprobs(batch).logprobs[batch.mask].mean()
        if loss.requires_grad:
            loss.backward()
    missing = [names.get(key, "?") for key, p in trained.items() if p.grad is None]
    infinite, zero = [], []
    for key, parameter in trained.items():
        if parameter.grad is None:
            continue
        grad = whole(parameter.grad)  # one after the other: a card may not hold all of them
        if not bool(torch.isfinite(grad).all()):
            infinite.append(names.get(key, "?"))
        if grad.dim() > 1 and not bool(grad.any()):
            zero.append(names.get(key, "?"))
    others = [
        names[key] for key, p in parameters.items() if key not in trained and p.grad is not None
    ]
    return [
        count("gradient", "trained parameters without a gradient", missing + zero),
        count("gradient", "trained parameters whose gradient is not finite", infinite),
        count("gradient", "parameters with a gradient that nobody trains", others),
    ]
