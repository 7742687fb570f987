"""One base model in up to four roles: policy, reference, reward model and critic.

With LoRA a role is an adapter (or none) on the shared frozen base, and perhaps a scalar head.
With full fine-tuning a role owns its model. Both are used in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from amenable.data.collate import GroupBatch, PromptGroup, micro_batches, packs
from amenable.models.adapters import adapter_parameters, adapter_state, load_adapter_state
from amenable.models.heads import ScalarHead
from amenable.models.logprobs import (
    CompletionStates,
    TokenLogprobs,
    completion_logprobs,
    completion_scores,
    completion_states,
    completion_values,
    reads_packed_rows,
)


@dataclass(eq=False)
class Role:
    """A model as one stage sees it.

    Args:
        model: a plain model that this role owns, or a shared one with adapters.
        adapter: the adapter that this role uses; None on a shared model: the bare base.
        head: scalar head of a reward model or critic.
        dtype: compute precision; bfloat16 runs under autocast.
    """

    model: PreTrainedModel | PeftModel
    adapter: str | None = None
    head: ScalarHead | None = None
    dtype: torch.dtype = torch.float32

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model inside."""
        if isinstance(self.model, PeftModel):
            return cast(PreTrainedModel, self.model.get_base_model())
        return self.model

    @property
    def scalar_head(self) -> ScalarHead:
        """The head.

        Raises:
            ValueError: this role has none.
        """
        if self.head is None:
            raise ValueError("this role has no scalar head")
        return self.head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.plain.parameters()).device

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The transformers model with this role's adapter switched on."""
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16
        ):
            if not isinstance(self.model, PeftModel):
                yield self.model
            elif self.adapter is None:
                with self.model.disable_adapter():
                    yield self.plain
            else:
                self.model.set_adapter(self.adapter)
                yield self.plain

    def logprobs(
        self, batch: GroupBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenLogprobs:
        """Log-probabilities [N, C] of the completion tokens."""
        with self.active() as model:
            return completion_logprobs(
                model, batch, temperature=temperature, with_entropy=with_entropy
            )

    def values(self, batch: GroupBatch) -> Tensor:
        """Critic's values [N, C]."""
        with self.active() as model:
            return completion_values(model, self.scalar_head, batch)

    def scores(self, batch: GroupBatch) -> Tensor:
        """Reward model's raw scores [N]."""
        with self.active() as model:
            return completion_scores(model, self.scalar_head, batch)

    def states(self, batch: GroupBatch) -> CompletionStates:
        """Hidden states that a scalar head reads."""
        with self.active() as model:
            return completion_states(model, batch)

    def split(self, groups: Sequence[PromptGroup], max_tokens: int) -> list[list[int]]:
        """The groups of each micro-batch: by tokens, where they are packed, else by padded rows."""
        layout = packs if reads_packed_rows(self.plain) else micro_batches
        return layout([group.tokens for group in groups], max_tokens)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer of this role updates: adapter or whole trunk, and the head."""
        if isinstance(self.model, PeftModel):
            trunk = adapter_parameters(self.model, self.adapter) if self.adapter else []
        else:
            trunk = list(self.model.parameters())
        return trunk + (list(self.head.parameters()) if self.head is not None else [])

    def state(self) -> dict[str, Tensor]:
        """A detached copy of all trainable weights."""
        if isinstance(self.model, PeftModel):
            state = adapter_state(self.model, self.adapter) if self.adapter else {}
        else:
            state = {key: p.detach().clone() for key, p in self.model.named_parameters()}
        if self.head is not None:
            state["scalar_head"] = self.head.weight.detach().clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Undo `state`."""
        if isinstance(self.model, PeftModel):
            if self.adapter:
                load_adapter_state(self.model, self.adapter, state)
        else:
            with torch.no_grad():
                for key, parameter in self.model.named_parameters():
                    parameter.copy_(state[key])
        if self.head is not None:
            with torch.no_grad():
                self.head.weight.copy_(state["scalar_head"])
