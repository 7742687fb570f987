"""One base model in up to four roles: policy, reference, reward model and critic.

With LoRA a role is an adapter (or none) on the shared frozen base, and perhaps a scalar head.
With full fine-tuning a role owns its model. Both are used in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from amenable.data.collate import GroupBatch, PromptGroup, alike_for, evenly, micro_batches, packs
from amenable.models.adapters import adapter_parameters, adapter_state, load_adapter_state
from amenable.models.heads import ScalarHead
from amenable.models.load import master_dtype
from amenable.models.logprobs import (
    CompletionStates,
    TokenLogprobs,
    completion_logprobs,
    completion_scores,
    completion_states,
    completion_values,
    reads_packed_rows,
)
from amenable.ranks.group import size as group_size
from amenable.ranks.group import turns
from amenable.ranks.sharding import is_sharded_model, laid_out_as, passing

T = TypeVar("T")


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
    def wide(self) -> torch.dtype:
        """Of trained weights, and of the numbers that are kept of a sweep: float32 or float64."""
        return master_dtype(self.dtype)

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

    def passing(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(model, *args, **kwargs)`, with the model as `active` gives it: one pass."""
        with self.active() as model:
            return passing(model, function, *args, **kwargs)

    def logprobs(
        self, batch: GroupBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenLogprobs:
        """Log-probabilities [N, C] of the completion tokens."""
        return self.passing(
            completion_logprobs, batch, temperature=temperature, with_entropy=with_entropy
        )

    def values(self, batch: GroupBatch) -> Tensor:
        """Critic's values [N, C]."""
        return self.passing(completion_values, self.scalar_head, batch)

    def scores(self, batch: GroupBatch) -> Tensor:
        """Reward model's raw scores [N]."""
        return self.passing(completion_scores, self.scalar_head, batch)

    def states(self, batch: GroupBatch) -> CompletionStates:
        """Hidden states that a scalar head reads."""
        return self.passing(completion_states, batch)

    def split(self, groups: Sequence[PromptGroup], max_tokens: int) -> list[list[int]]:
        """The groups of each micro-batch: by tokens, where they are packed, else by padded rows.

        Several ranks get at least one each, where there are so many groups.
        """
        lengths, packed = [group.tokens for group in groups], reads_packed_rows(self.plain)
        if (ranks := group_size()) > 1:
            return (evenly if packed else alike_for)(lengths, max_tokens, ranks)
        return (packs if packed else micro_batches)(lengths, max_tokens)

    def turns(
        self, parts: Sequence[T], owners: Sequence[int] | None = None
    ) -> Iterator[tuple[T, bool]]:
        """The parts of a sweep that are this rank's, each with whether it counts (`ranks.group`).

        Args:
            parts: the same on every rank.
            owners: the rank of each; default: they take turns.
        """
        return turns(parts, owners, in_step=self.sharded)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the weights alone, so that all must pass together."""
        return is_sharded_model(self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer of this role updates: adapter or whole trunk, and the head."""
        if isinstance(self.model, PeftModel):
            trunk = adapter_parameters(self.model, self.adapter) if self.adapter else []
        else:
            trunk = list(self.model.parameters())
        return trunk + (list(self.head.parameters()) if self.head is not None else [])

    def state(self) -> dict[str, Tensor]:
        """A detached copy of all trainable weights; of sharded ones this rank's part."""
        if isinstance(self.model, PeftModel):
            state = adapter_state(self.model, self.adapter) if self.adapter else {}
        else:
            state = {key: p.detach().clone() for key, p in self.model.named_parameters()}
        if self.head is not None:
            state["scalar_head"] = self.head.weight.detach().clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Undo `state`; weights may be whole or sharded, whatever the model's are."""
        if isinstance(self.model, PeftModel):
            if self.adapter:
                load_adapter_state(self.model, self.adapter, state)
        else:
            with torch.no_grad():
                for key, parameter in self.model.named_parameters():
                    parameter.copy_(laid_out_as(state[key], parameter))
        if self.head is not None:
            with torch.no_grad():
                self.head.weight.copy_(state["scalar_head"])
