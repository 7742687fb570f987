"""The scalar head of reward model and critic."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """One number a hidden state, without bias, computed in float32.

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
        head.weight.data.copy_(weight.float())
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] hidden states to [...] numbers."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight[0]
