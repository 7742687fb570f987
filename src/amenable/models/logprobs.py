"""Forward passes over prompt groups: one code path for old, new and reference log-probabilities.

Shapes as in `data.collate`: R rows, T columns, N completions, C completion tokens, d hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from amenable.data.collate import GroupBatch, Span
from amenable.errors import ModelError
from amenable.losses.likelihood import token_entropy, token_logprobs
from amenable.models.packed_attention import attends_plainly, packed_row
from amenable.models.projection import filling, plain_projection, projected_logprobs

_CHUNK = 1024


class TokenLogprobs(NamedTuple):
    """Of each completion token under the model, at the sampling temperature."""

    logprobs: Tensor
    """[N, C] nats; 0 off the mask."""

    entropy: Tensor | None
    """[N, C] nats, where asked for."""


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The transformer without its output head."""
    return cast(nn.Module, getattr(model, model.base_model_prefix))


def hidden_states(model: PreTrainedModel, batch: GroupBatch) -> Tensor:
    """Last hidden states [R, T, d] of the rows.

    Raises:
        ModelError: a position reaches past the model's attention window, where the mask of
            prompt groups would no longer be what the model was trained with.
    """
    window = getattr(model.config, "sliding_window", None)
    if batch.segments is not None and window:
        longest = int(batch.position_ids.max()) + 1
        if longest > window:
            raise ModelError(
                f"a prompt with its completion has {longest} tokens, more than the model's sliding "
                f"attention window of {window}; lower data.max_prompt_tokens"
            )
    if reads_packed_rows(model):
        return _packed_states(model, batch)
    output = trunk_of(model)(
        input_ids=batch.input_ids,
        attention_mask=_attention_mask(model, batch),
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return cast(Tensor, output.last_hidden_state)


def reads_packed_rows(model: PreTrainedModel) -> bool:
    """Whether a batch is one row of real tokens to it: on a CPU, if its attention is plain.

    A CUDA device has fused attention for padded rows and pays for each small product.
    """
    return model.device.type == "cpu" and attends_plainly(model)


def _packed_states(model: PreTrainedModel, batch: GroupBatch) -> Tensor:
    """The same from one row of all real tokens; 0 at padding.

    The row is filled up to a length of few kinds (`projection.filling`).
    """
    tokens = len(batch.real)
    more = filling(tokens)
    spans = [*batch.spans, Span(tokens, tokens + more)] if more else batch.spans
    ids, positions = (
        pad(x.flatten()[batch.real], (0, more))[None] for x in (batch.input_ids, batch.position_ids)
    )
    with packed_row(model, spans):
        output = trunk_of(model)(input_ids=ids, position_ids=positions, use_cache=False)
    found = cast(Tensor, output.last_hidden_state)[0, :tokens]
    places = found.new_zeros(batch.input_ids.numel(), found.shape[-1])
    return places.index_copy(0, batch.real, found).view(*batch.input_ids.shape, -1)


def _attention_mask(model: PreTrainedModel, batch: GroupBatch) -> Tensor | None:
    """The mask as the model's attention reads it: plain ("eager") attention adds it to the weights.

    Gemma 2 has plain attention by default. It would take True for 1, and hide nothing.
    """
    mask = batch.attention_mask
    if mask is None or model.config._attn_implementation != "eager":
        return mask
    additive = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return additive.masked_fill(~mask, torch.finfo(model.dtype).min)


def _logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """[M, V] as the model's own forward gives them; Gemma 2 bends them below a cap."""
    logits = cast(Tensor, cast(nn.Module, model.get_output_embeddings())(states))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def completion_logprobs(
    model: PreTrainedModel,
    batch: GroupBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probability of every completion token.

    The vocabulary projection runs on the predicting positions of real completion tokens only,
    in chunks, so that rows × columns × vocabulary never exists.

    Args:
        model: causal language model.
        batch: rows of prompt groups.
        temperature: logits are divided by it before the log-softmax.
        with_entropy: return the entropy of each next-token distribution as well.
    """
    states = completion_states(model, batch).before
    targets, head = batch.targets[batch.mask], plain_projection(model)
    if head is not None:
        logprobs, entropy = projected_logprobs(
            states, head, targets, temperature=temperature, with_entropy=with_entropy
        )
    else:
        logprobs, entropy = _bent_logprobs(model, states, targets, temperature, with_entropy)
    return TokenLogprobs(
        scatter(logprobs, batch.mask), None if entropy is None else scatter(entropy, batch.mask)
    )


def _bent_logprobs(
    model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Through a head with a bias, or one whose logits are bent below a cap."""
    pieces, entropies = [], []
    for part, wanted in zip(states.split(_CHUNK), targets.split(_CHUNK), strict=True):
        logits = _logits(model, part)[None]
        pieces.append(token_logprobs(logits, wanted[None], temperature)[0])
        if with_entropy:
            entropies.append(token_entropy(logits, temperature)[0])
    return torch.cat(pieces), torch.cat(entropies) if entropies else None


class CompletionStates(NamedTuple):
    """Last hidden states where critic and reward model read."""

    before: Tensor
    """[M, d] of the state before each of the M real completion tokens, in mask order."""

    last: Tensor
    """[N, d] at the last real token of each completion."""


def completion_states(model: PreTrainedModel, batch: GroupBatch) -> CompletionStates:
    """Hidden states before each completion token, and at the last one."""
    hidden = hidden_states(model, batch)
    rows = batch.rows[:, None].expand_as(batch.sources)[batch.mask]
    return CompletionStates(
        _select(hidden, rows, batch.sources[batch.mask]), _select(hidden, batch.rows, batch.last)
    )


def _select(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[M, d] states of [R, T, d] at M places.

    The completions of a prompt all read its last state, so its gradient is a sum. Indexing with
    two tensors adds it up in any order on several threads; this adds in the order of the places.
    """
    return hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + columns)


def completion_values(model: PreTrainedModel, head: nn.Module, batch: GroupBatch) -> Tensor:
    """Critic's value [N, C] of the state before each completion token."""
    return scatter(head(completion_states(model, batch).before), batch.mask)


def completion_scores(model: PreTrainedModel, head: nn.Module, batch: GroupBatch) -> Tensor:
    """Raw score [N], read at the last real token of each completion."""
    return cast(Tensor, head(completion_states(model, batch).last))


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """[N, C] from the [M] numbers of real tokens; 0 off the mask."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )
