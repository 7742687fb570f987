"""A tabular policy as a transformers architecture: every prefix has a row of logits of its own.

The trunk attends like any other: each position sums a number over the keys that it may see, the
token's digit times base^position. The sum names the prefix, and its row of the table is the hidden
state. So a wrong mask, position or cache reads another row, as a wrong attention would in a model.

Shapes: R rows, T queries, K keys (cached ones included), A outputs (every token but the pad).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from amenable.models import check

MODEL_TYPE = "prefix_table"
PAD_ID = 0
IMPOSSIBLE = -1e4
"""Logit of the pad token, which is never sampled."""

_MOST_ROWS = 2**20


class PrefixTableConfig(PreTrainedConfig):
    """Sizes of the table.

    Args:
        vocab_size: tokens, the pad token (id 0) among them.
        max_tokens: longest prefix with a row of its own, prompt included.
        **kwargs: transformers' own settings.
    """

    model_type = MODEL_TYPE

    def __init__(self, vocab_size: int = 5, max_tokens: int = 4, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.hidden_size = vocab_size - 1
        self.num_hidden_layers = 1
        if self.rows > _MOST_ROWS:
            raise ValueError(f"{vocab_size}^{max_tokens} prefixes are too many for a table")
        super().__init__(**{"pad_token_id": PAD_ID, **kwargs, "tie_word_embeddings": False})

    @property
    def rows(self) -> int:
        """Rows of the table; the last one serves every prefix that is too long."""
        return int(self.vocab_size**self.max_tokens) + 1


class PrefixTablePreTrainedModel(PreTrainedModel):
    """What trunk and model share."""

    config_class = PrefixTableConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Rows of unit normal logits."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


class PrefixTable(PrefixTablePreTrainedModel):
    """The trunk: token ids to the rows of their prefixes."""

    def __init__(self, config: PrefixTableConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.rows, config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types there

    def get_input_embeddings(self) -> nn.Module:
        """The table: the only weights."""
        return cast(nn.Module, self.table)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [R, T, A].

        Args:
            input_ids: [R, T].
            attention_mask: [R, K] 1 on real keys, [R, 1, T, K] allowed (bool) or added to the
                weights (float), or None: plain causal.
            position_ids: [R, T]; default: counted from the cache's end.
            past_key_values: a transformers cache, extended in place.
            use_cache: accepted for transformers; a given cache is always extended.
        """
        base, dtype = self.config.vocab_size, torch.float64
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(start, start + input_ids.shape[1])[None]
        places = position_ids.clamp(max=self.config.max_tokens)
        digits = (input_ids * base**places).to(dtype)[:, None, :, None]
        if past_key_values is not None:
            digits = past_key_values.update(digits, digits, 0)[1]
        allowed = _allowed(attention_mask, input_ids.shape[1], start, digits.shape[2])
        numbers = allowed.to(dtype) @ digits[:, 0]
        index = numbers[..., 0].long().clamp(max=self.config.rows - 1)
        return BaseModelOutputWithPast(
            last_hidden_state=self.table(index), past_key_values=past_key_values
        )


def _allowed(mask: Tensor | None, queries: int, start: int, keys: int) -> Tensor:
    """[R or 1, T, K] True where a query may see a key."""
    if mask is not None and mask.dim() == 4:
        return mask[:, 0] if mask.dtype is torch.bool else mask[:, 0] > IMPOSSIBLE
    causal = torch.arange(keys)[None, :] <= torch.arange(start, start + queries)[:, None]
    return causal[None] if mask is None else causal[None] & (mask[:, None, :keys] > 0)


class _Logits(nn.Module):
    """Hidden states [..., A] to logits [..., V]: the pad token is put before them."""

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.pad(states, (1, 0), value=IMPOSSIBLE)


class PrefixTableForCausalLM(PrefixTablePreTrainedModel, GenerationMixin):
    """The policy: next-token logits of every prefix, free of each other."""

    def __init__(self, config: PrefixTableConfig) -> None:
        super().__init__(config)
        self.model = PrefixTable(config)
        self.lm_head = _Logits()
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types there

    def get_input_embeddings(self) -> nn.Module:
        """The table."""
        return cast(nn.Module, self.model.table)

    def get_output_embeddings(self) -> nn.Module:
        """A module without weights: hidden states are logits already."""
        return cast(nn.Module, self.lm_head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [R, T or logits_to_keep, V]; arguments as of the trunk."""
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        states = output.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(states[:, -logits_to_keep:]),
            past_key_values=output.past_key_values,
        )


def register() -> None:
    """Make transformers and the checks of base models know the architecture; harmless twice."""
    AutoConfig.register(MODEL_TYPE, PrefixTableConfig, exist_ok=True)
    AutoModel.register(PrefixTableConfig, PrefixTable, exist_ok=True)
    AutoModelForCausalLM.register(PrefixTableConfig, PrefixTableForCausalLM, exist_ok=True)
    check.SUPPORTED_MODEL_TYPES |= {MODEL_TYPE}
