"""Scores and values as the run reads them, and from plain transformers' hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amenable.data.collate import PromptGroup, collate
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role
from amenable.train.gate.passes import Plain, pairs


@dataclass(frozen=True)
class Heads:
    """The run's own reward model and critic, where there are such.

    Args:
        reward: its scores [N] are read at the last token of a completion; it is compared before
            every token as well, [N + M], because a few scores alone show no noise.
        critic: values [M] are read before each of its tokens.
        pad_id: fills rows.
    """

    reward: Role | None
    critic: Role | None
    pad_id: int

    @classmethod
    def of(cls, reward: Role | None, critic: Role | None, pad_id: int) -> Heads:
        """A critic's head that is still zero, and so says nothing, is replaced by a random one."""
        if critic is not None and not bool(critic.scalar_head.weight.any()):
            width = critic.scalar_head.weight.shape[1]
            critic = replace(critic, head=ScalarHead(width).to(critic.device))
        return cls(reward, critic, pad_id)

    @property
    def roles(self) -> dict[str, Role]:
        """By the name of their check."""
        given = {"reward": self.reward, "critic": self.critic}
        return {name: role for name, role in given.items() if role is not None}

    def read(self, groups: Sequence[PromptGroup]) -> dict[str, Tensor]:
        """What the run reads in one micro-batch."""
        found: dict[str, Tensor] = {}
        if self.reward is not None:
            batch = collate(groups, self.pad_id).to(self.reward.device)
            states = self.reward.states(batch)
            found["reward"] = self.reward.scalar_head(torch.cat([states.last, states.before])).cpu()
            if self.critic is not None and self._share_a_trunk:
                found["critic"] = self.critic.scalar_head(states.before).cpu()
        if self.critic is not None and "critic" not in found:
            batch = collate(groups, self.pad_id).to(self.critic.device)
            found["critic"] = self.critic.values(batch)[batch.mask].cpu()
        return found

    def plain(
        self, groups: Sequence[PromptGroup], side: str | None, attention: str | None = None
    ) -> dict[str, Tensor]:
        """The same from transformers' hidden states: each row alone, or padded on a side."""
        rows = pairs(groups)
        found: dict[str, Tensor] = {}
        states: tuple[Tensor, Tensor] | None = None
        for name, role in self.roles.items():
            if states is None or not self._share_a_trunk:
                states = Plain(role, self.pad_id, attention).states(rows, side)
            before, last = states
            read = torch.cat([last, before]) if name == "reward" else before
            found[name] = role.scalar_head(read).cpu()
        return found

    @property
    def _share_a_trunk(self) -> bool:
        one, other = self.reward, self.critic
        return (
            one is not None
            and other is not None
            and (one.model, one.adapter) == (other.model, other.adapter)
        )
