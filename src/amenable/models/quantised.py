"""Linear layers of a frozen base whose weights are kept in 8 or 4 bits, by bitsandbytes.

    int8   a row's weights as whole numbers from -127 to 127, and its largest magnitude
    nf4    64 weights as 16 levels that are equally likely under a normal distribution, and the
           largest magnitude, itself in 8 bits: 4.13 bits a weight

A product writes one layer's weights out in the compute precision, uses them and forgets them:
values and gradients are those of the written-out weights, whoever multiplies. bitsandbytes' own
products are not used: some round the inputs, and not all alike (docs/quantised.md).

Sources: Dettmers et al. 2022, arXiv:2208.07339 (int8, by rows); 2023, arXiv:2305.14314, section 3
(nf4, with double quantisation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from amenable.models.check import check_quantiser
from amenable.models.load import load_causal_lm


@dataclass(frozen=True)
class Stored:
    """A matrix as it is kept."""

    tensors: tuple[Tensor, ...]
    """All that is kept of it."""

    read: Callable[[], Tensor]
    """Writes it out, [out, in], in the precision that it was stored for."""


class QuantisedLinear(nn.Linear):
    """A linear layer whose `weight` is made anew, [out, in], each time that it is read.

    Args:
        layer: whose weights are quantised, where they are.
        kind: "int8" or "nf4".
        dtype: that they are written out in, and of the bias.
    """

    def __init__(self, layer: nn.Linear, kind: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.stored = SCHEMES[kind](layer.weight.detach(), dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear keeps one
        """[out, in]."""
        return self.stored.read()

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        return linear(x, self.weight, self.bias)


def load_quantised(
    source: str | Path, kind: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The causal language model in `source`, frozen, its trunk's linear layers quantised.

    The weights are read in the precision of their file and quantised from it, layer by layer on
    the device; embeddings, norms, biases and the output head are kept in `dtype`.

    Args:
        source: as of `load_causal_lm`.
        kind: "int8" or "nf4".
        dtype: compute precision.
        device: where it goes.

    Raises:
        ModelError: bitsandbytes is not installed; or as of `load_causal_lm`.
    """
    check_quantiser(kind)
    model = load_causal_lm(source, None)
    quantise(model, kind, dtype, device)
    return model


def quantise(model: PreTrainedModel, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Quantise the trunk's linear layers of a model in place, and move the rest; all is frozen."""
    check_quantiser(kind)
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            module.weight.data = module.weight.data.to(device)
            outer, _, own = name.rpartition(".")
            setattr(model.get_submodule(outer), own, QuantisedLinear(module, kind, dtype))
    for parameter in model.parameters():
        # a copy, so that the file is no longer mapped; buffers, such as rotary frequencies, stay
        parameter.data = parameter.data.to(dtype, copy=True)
    model.config.dtype = dtype
    nn.Module.to(model, device)


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())


def _int8(weight: Tensor, dtype: torch.dtype) -> Stored:
    codes, largest, _ = _functional().int8_vectorwise_quant(weight.half())
    scales = (largest / 127)[:, None]
    return Stored((codes, scales), lambda: (codes * scales).to(dtype))


def _nf4(weight: Tensor, dtype: torch.dtype) -> Stored:
    functional = _functional()
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    state.dtype = dtype
    return Stored(
        (codes, state.absmax, state.state2.absmax),
        lambda: cast(Tensor, functional.dequantize_4bit(codes, state)),
    )


SCHEMES: dict[str, Callable[[Tensor, torch.dtype], Stored]] = {"int8": _int8, "nf4": _nf4}
"""By the names of `model.quantise`."""


def _functional() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
