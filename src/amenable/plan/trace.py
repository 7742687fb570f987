"""Activation memory of a training pass, found without computing anything.

The model's own code passes over tensors that have a shape and no content (torch's fake tensors),
while every operation's result is counted from when it is made until nothing holds it. The model
has one layer, then two; the rest of its layers cost as much as the second.

Scratch space inside kernels is not seen. Padded rows are traced with a mask tensor; those of one
completion do without, so that where key-value heads are shared, theirs count as repeated.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig

from amenable.config.model import LoraConfig
from amenable.data.collate import Span
from amenable.models.adapters import add_adapter
from amenable.models.load import set_dropout_to_zero
from amenable.models.logprobs import trunk_of
from amenable.models.packed_attention import attends_plainly, packed_row
from amenable.models.packed_layers import shorten
from amenable.models.roles import Role


class Activations(NamedTuple):
    """Most bytes alive at once in the trunk, without weights and their gradients."""

    training: int
    """Forward and backward, every layer's held for the backward pass."""
    forward: int
    """Forward alone: about one layer's."""


def trunk_activations(
    config: PreTrainedConfig,
    rows: int,
    width: int,
    dtype: torch.dtype,
    lora: LoraConfig,
    *,
    packed: bool,
) -> Activations:
    """Of `rows` rows of `width` tokens.

    Args:
        config: of the whole model.
        rows: in the micro-batch.
        width: tokens of each, padding included.
        dtype: compute precision; bfloat16 runs under autocast.
        lora: adapters on a frozen base, or every weight in float32.
        packed: rows stand end to end where the model's attention allows it, as on a CPU.
    """
    one, two = (_peak(_cut(config, n), rows, width, dtype, lora, packed) for n in (1, 2))
    layers = int(config.get_text_config().num_hidden_layers)
    return Activations(one + (layers - 1) * (two - one), one)


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration of the model's first layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    set_dropout_to_zero(config)
    return config


def _peak(
    config: PreTrainedConfig,
    rows: int,
    width: int,
    dtype: torch.dtype,
    lora: LoraConfig,
    packed: bool,
) -> int:
    role = _role(config, dtype, lora)
    with FakeTensorMode():
        _fill(role.model)
        trained = role.trainable_parameters()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        live = _Live()
        live.leave_out([*role.model.parameters(), *role.model.buffers()])
        live.leave_out([p.grad for p in trained if p.grad is not None])
        with live:
            layout = _packed_pass if packed and attends_plainly(role.plain) else _padded_pass
            layout(role, rows, width)
        return live.peak


def _role(config: PreTrainedConfig, dtype: torch.dtype, lora: LoraConfig) -> Role:
    """A role without weights, on the meta device."""
    with torch.device("meta"):
        weights = dtype if lora.enabled else torch.float32
        model: Any = AutoModelForCausalLM.from_config(config, dtype=weights)
        shorten(model)
        if lora.enabled:
            model.requires_grad_(False)
            model = add_adapter(model, "policy", lora, seed=0)
    return Role(model.eval(), "policy" if lora.enabled else None, dtype=dtype)


def _fill(model: nn.Module) -> None:
    """Puts fake tensors on the CPU in the place of meta tensors; shared ones stay shared."""
    made: dict[int, Any] = {}

    def fake(old: Tensor) -> Any:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            weight = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if weight else new
        return made[id(old)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, old in own.items():
                if old is not None:
                    own[name] = fake(old)


def _padded_pass(role: Role, rows: int, width: int) -> None:
    """From the embeddings on: their own gradient comes when the activations are gone."""
    with role.active() as model:
        eager = model.config._attn_implementation == "eager"
        hidden = model.config.get_text_config().hidden_size
        output = trunk_of(model)(
            inputs_embeds=torch.zeros(rows, width, hidden, dtype=model.dtype),
            attention_mask=torch.ones(
                rows, 1, width, width, dtype=model.dtype if eager else torch.bool
            ),
            position_ids=torch.zeros(rows, width, dtype=torch.long),
            use_cache=False,
        )
    output.last_hidden_state.float().sum().backward()


def _packed_pass(role: Role, rows: int, width: int) -> None:
    """The same as one row."""
    spans = [Span(start, start + width) for start in range(0, rows * width, width)]
    with role.active() as model, packed_row(model, spans):
        hidden = model.config.get_text_config().hidden_size
        output = trunk_of(model)(
            inputs_embeds=torch.zeros(1, rows * width, hidden, dtype=model.dtype),
            position_ids=torch.zeros(1, rows * width, dtype=torch.long),
            use_cache=False,
        )
    output.last_hidden_state.float().sum().backward()


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage between its making and its end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: Any = WeakIdKeyDictionary()
        self._now = self.peak = 0

    def leave_out(self, tensors: list[Tensor]) -> None:
        """These are counted elsewhere."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._end, size)
        self._now += size
        self.peak = max(self.peak, self._now)

    def _end(self, size: int) -> None:
        self._now -= size
