"""The scalar heads of reward model and critic."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """One number a hidden state, without bias, computed in its weight's precision, float32 or more.

    Initial weights are N(0, 1/sqrt(d + 1)) (Stiennon et al. 2020 as published in code:
    openai/summarize-from-feedback, query_response_model.py).

    Args:
        hidden_size: d.
        seed: of the initial weights.
    """

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)
        self.weight = nn.Parameter(weight)

    @classmethod
    def from_weight(cls, weight: Tensor) -> ScalarHead:
        """A head with the given [1, d] weight."""
        head = cls(weight.shape[1])
        head.to(torch.promote_types(weight.dtype, torch.float32)).weight.data.copy_(weight)
        return head

    @property
    def mean_weight(self) -> Tensor:
        """[1, d] whose number is `forward`'s."""
        return self.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] hidden states to [...] numbers."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(self.weight.dtype) @ self.mean_weight[0]

    def members(self, hidden: Tensor) -> Tensor:
        """[..., d] hidden states to [..., H] numbers, one a head."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(self.weight.dtype) @ self.weight.T


class HeadEnsemble(ScalarHead):
    """Several heads on the same states; their mean is the number that counts.

    Args:
        hidden_size: d.
        heads: H, at least 2.
        seed: of the initial weights, which differ.
    """

    def __init__(self, hidden_size: int, heads: int, seed: int = 0) -> None:
        super().__init__(hidden_size, seed)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(heads, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)
        self.weight = nn.Parameter(weight)

    @classmethod
    def from_weight(cls, weight: Tensor) -> HeadEnsemble:
        """Heads with the given [H, d] weights."""
        ensemble = cls(weight.shape[1], weight.shape[0])
        ensemble.to(torch.promote_types(weight.dtype, torch.float32)).weight.data.copy_(weight)
        return ensemble

    @property
    def mean_weight(self) -> Tensor:
        """[1, d]."""
        return self.weight.mean(0, keepdim=True)

    def disagreement(self, hidden: Tensor) -> Tensor:
        """[..., d] states to [...] standard deviations over the heads (division by H - 1)."""
        return self.members(hidden).std(-1)
