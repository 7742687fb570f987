"""Roll-outs with a transformers model: batched, length-sorted, key-value cached.

Equal prompts are encoded once and their samples share what that left in the cache; finished
sequences leave the batch. Shapes: B sequences,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from amenable.data.collate import micro_batches
from amenable.rollout.prefix_cache import PrefixCache, attending, serves
from amenable.rollout.types import Request, Rollout, Sampling, uniform_noise

if TYPE_CHECKING:
    from amenable.data.render import Renderer
    from amenable.models.build import Foundation
    from amenable.models.roles import Role

_PREFILL_TOKENS = {"cpu": 2048}  # of a pass, padding included: few prompts of like length
_MOST_PREFILL_TOKENS = 16384
_KEEP = 0.75  # compact the batch when fewer than this share of its sequences is unfinished


class TransformersEngine:
    """Completes prompts with a plain transformers model.

    Args:
        model: causal language model in evaluation mode.
        eos_ids: tokens that end a completion.
        pad_id: fills shorter prompts on the left.
        dtype: compute precision; bfloat16 runs under autocast.
        batch_size: sequences decoded together.
        role: whose adapter is switched on while it samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: frozenset[int],
        pad_id: int,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 128,
        role: Role | None = None,
    ) -> None:
        self.model = model
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.dtype = dtype
        self._batch_size = batch_size
        self._role = role
        self._shares_prompts = serves(model)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Roll-outs in the order of the requests."""
        rollouts: dict[int, Rollout] = {}
        with self.running():
            for batch in self._batches(requests):
                for index, rollout in self._complete(batch, requests, sampling):
                    rollouts[index] = rollout
                if on_progress is not None:
                    on_progress(sum(map(len, batch.values())))
        return [rollouts[index] for index in range(len(requests))]

    def running(self) -> AbstractContextManager[object]:
        """The context in which forward passes run: precision, and the role's adapter."""
        if self._role is not None:
            return self._role.active()
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16
        )

    def _batches(self, requests: Sequence[Request]) -> list[dict[tuple[int, ...], list[int]]]:
        """Request numbers by prompt, in batches of prompts of like length."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_prompt.setdefault(request.prompt_ids, []).append(index)
        batches: list[dict[tuple[int, ...], list[int]]] = []
        room = 0
        for prompt in sorted(by_prompt, key=lambda ids: (-len(ids), ids)):
            indices = by_prompt[prompt]
            if not batches or len(indices) > room:
                batches.append({})
                room = self._batch_size
            batches[-1][prompt] = indices
            room -= len(indices)
        return batches

    def _complete(
        self,
        batch: dict[tuple[int, ...], list[int]],
        requests: Sequence[Request],
        sampling: Sampling,
    ) -> list[tuple[int, Rollout]]:
        indices = [index for group in batch.values() for index in group]
        noise = np.stack([uniform_noise(requests[i].key, sampling.max_new_tokens) for i in indices])
        decoding = self.prefill(batch, sampling.max_new_tokens)
        tokens: list[list[int]] = [[] for _ in indices]
        active = torch.arange(len(indices))
        for step in range(sampling.max_new_tokens):
            drawn = draw_tokens(
                decoding.logits, sampling, torch.from_numpy(noise[active.numpy(), step])
            )
            for row, token in zip(active.tolist(), drawn.tolist(), strict=True):
                if not tokens[row] or tokens[row][-1] not in self.eos_ids:
                    tokens[row].append(token)
            done = torch.tensor([tokens[row][-1] in self.eos_ids for row in active.tolist()])
            if bool(done.all()) or step + 1 == sampling.max_new_tokens:
                break
            if int((~done).sum()) <= _KEEP * len(active):
                keep = (~done).nonzero()[:, 0]
                active, drawn = active[keep], drawn[keep]
                decoding.select(keep)
            self.advance(decoding, drawn)
        return [
            (index, Rollout(requests[index].prompt_ids, tuple(ids), ids[-1] in self.eos_ids))
            for index, ids in zip(indices, tokens, strict=True)
        ]

    def prefill(self, batch: dict[tuple[int, ...], list[int]], room: int) -> Decoding:
        """Encode every prompt once, for all of its samples.

        Args:
            batch: request numbers by prompt; longest prompts first.
            room: most tokens of a sample.
        """
        prompts, device = list(batch), self.model.device
        repeats = torch.tensor([len(group) for group in batch.values()])
        rows = torch.repeat_interleave(torch.arange(len(prompts)), repeats).to(device)
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        if self._shares_prompts:
            budget = _PREFILL_TOKENS.get(device.type, _MOST_PREFILL_TOKENS)
            parts = micro_batches([len(prompt) for prompt in prompts], budget)
            encoded = [self._encode([prompts[i] for i in part]) for part in parts]
            logits = torch.cat([part.logits for part in encoded])
            cache = PrefixCache([(part.cache, part.mask) for part in encoded], rows, room)
            return Decoding(logits[rows], cache, None, length[rows])
        whole = self._encode(prompts)
        decoding = Decoding(whole.logits, whole.cache, whole.mask, length)
        if len(rows) > len(prompts):
            decoding.select(rows)
        return decoding

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> _Encoded:
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        cache, positions = DynamicCache(config=self.model.config), (mask.cumsum(1) - 1).clamp(min=0)
        mask = mask.to(device)
        logits = self._forward(ids.to(device), mask, positions.to(device), cache)
        return _Encoded(logits, cache, mask)

    def advance(self, decoding: Decoding, tokens: Tensor) -> None:
        """Read one token of every sequence; the logits of the next are in `decoding`."""
        cache = decoding.cache
        attention: AbstractContextManager[None] = nullcontext()
        if isinstance(cache, PrefixCache):
            attention = attending(self.model, cache)
        elif decoding.mask is not None:
            ones = torch.ones_like(decoding.mask[:, :1])
            decoding.mask = torch.cat([decoding.mask, ones], dim=1)
        with attention:
            decoding.logits = self._forward(
                tokens.to(self.model.device)[:, None],
                decoding.mask,
                decoding.length[:, None],
                cache,
            )
        decoding.length = decoding.length + 1

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        output = cast(Any, self.model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cast(Tensor, output.logits[:, -1].float())


class _Encoded(NamedTuple):
    """Prompts that were read in one pass, padded on the left."""

    logits: Tensor  # [P, V] of the first token
    cache: DynamicCache
    mask: Tensor  # [P, T] 1 on real tokens


@dataclass
class Decoding:
    """State of a batch between two tokens."""

    logits: Tensor  # [B, V] of the next token
    cache: DynamicCache | PrefixCache
    mask: Tensor | None  # [B, columns so far] 1 on real tokens; None: the cache knows
    length: Tensor  # [B] position of the next token

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these sequences."""
        self.cache.batch_select_indices(rows)
        self.logits, self.length = self.logits[rows], self.length[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


def draw_tokens(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """[B] tokens by inverse transform: the first whose cumulative probability exceeds the noise.

    Args:
        logits: [B, V] float32.
        sampling: temperature 0 takes the largest logit and ignores the noise.
        noise: [B] uniform numbers in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    probabilities = torch.softmax(_filtered(logits / sampling.temperature, sampling), -1)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # noise may round up to 1
    wanted = torch.minimum(noise.to(cumulative)[:, None] * total, below)
    tokens = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1).cpu()


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = torch.softmax(ordered, -1)
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


class RolloutCopy:
    """What rolls out for a role: where it has an adapter, a second set of weights.

    Adapters cost a decode step two extra products a layer; merging them into the shared base
    would change the base. So the base is copied once, and before each roll-out the adapted
    layers of the copy are overwritten with W + scale · B A. A role with weights of its own rolls
    out with these.

    Args:
        role: who samples.
        merged: False rolls out with the shared base and its adapter, which takes no second base.
    """

    def __init__(self, role: Role, *, merged: bool = True) -> None:
        from copy import deepcopy

        from peft import PeftModel

        self.role = role
        self._merged = merged and isinstance(role.model, PeftModel)
        if self._merged:
            self.model = _without_adapters(deepcopy(role.plain))
            self._targets = dict(self.model.named_modules())
        else:
            self.model = role.plain

    def sync(self) -> PreTrainedModel:
        """Take over the role's present weights."""
        from peft import PeftModel

        from amenable.models.adapters import merged_weights

        role = self.role
        if self._merged and isinstance(role.model, PeftModel) and role.adapter is not None:
            with torch.no_grad():
                for name, weight in merged_weights(role.model, role.adapter):
                    cast(Any, self._targets[name]).weight.copy_(weight)
        return self.model

    def engine(self, renderer: Renderer) -> TransformersEngine:
        """Samples with these weights."""
        return TransformersEngine(
            self.model,
            eos_ids=renderer.eos_ids,
            pad_id=renderer.pad_id,
            dtype=self.role.dtype,
            role=None if self._merged else self.role,
        )


def _without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every adapted layer by its base layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    return model


def engine_for(
    source: str | Path, foundation: Foundation, batch_size: int = 128
) -> TransformersEngine:
    """An engine on an exported model folder (or the base), in the run's precision."""
    from amenable.models.load import load_causal_lm

    return TransformersEngine(
        load_causal_lm(source, foundation.dtype, device=foundation.device),
        eos_ids=foundation.renderer.eos_ids,
        pad_id=foundation.renderer.pad_id,
        dtype=foundation.dtype,
        batch_size=batch_size,
    )
