"""Roll-outs with a transformers model: batched, length-sorted, key-value cached.

Equal prompts are encoded once and their samples share what that left in the cache; finished
sequences leave the batch. Shapes: B sequences,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from amenable.data.collate import micro_batches
from amenable.models.packed_attention import attends_plainly
from amenable.ranks import sharding
from amenable.ranks.group import gathered, own_slice
from amenable.rollout.lean_llama import LeanLlama, is_lean
from amenable.rollout.prefix_cache import CacheShape, PrefixCache, attending
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
        # a shared cache and the lean pass read in float32
        self._shares_prompts = attends_plainly(model) and dtype is not torch.float64
        self._lean: LeanLlama | None = None

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Roll-outs in the order of the requests; several ranks sample a part of them each."""
        own = requests[own_slice(len(requests))]
        rollouts = self._generate(own, sampling, on_progress) if own else []
        found = [rollout for part in gathered(rollouts) for rollout in part]
        if on_progress is not None and len(found) > len(own):
            on_progress(len(found) - len(own))
        return found

    def _generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None,
    ) -> list[Rollout]:
        waiting, rollouts = _by_length(requests), _Unfinished(requests, sampling, self.eos_ids)
        decoding: Decoding | None = None
        with self.running():
            while decoding is not None or waiting:
                if decoding is None or self._shares_prompts:
                    entering = self._next(waiting, len(rollouts.rows))
                    if entering:
                        rollouts.enter(index for group in entering.values() for index in group)
                        decoding = self._entered(decoding, entering, sampling.max_new_tokens)
                assert decoding is not None
                drawn = draw_tokens(decoding.logits, sampling, rollouts.noise())
                ended = rollouts.append(drawn)
                if on_progress is not None and ended:
                    on_progress(ended)
                keep = rollouts.leave()
                if not rollouts.rows:
                    decoding = None
                    continue
                if keep is not None:
                    decoding.select(keep)
                    drawn = drawn[keep]
                self.advance(decoding, drawn)
        return rollouts.found()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What forward passes run in: precision, the role's adapter, the present weights."""
        precision: AbstractContextManager[object] = torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16
        )
        if self._role is not None:
            precision = self._role.active()
        elif is_lean(self.model) and self.dtype is not torch.float64:
            self._lean = LeanLlama(self.model, self.dtype)
        try:
            with precision:
                yield
        finally:
            self._lean = None

    def _next(
        self, waiting: list[tuple[tuple[int, ...], list[int]]], present: int
    ) -> dict[tuple[int, ...], list[int]]:
        """Take the longest prompts that there is room for beside the sequences present."""
        taken: dict[tuple[int, ...], list[int]] = {}
        while waiting and (not present or present + len(waiting[-1][1]) <= self._batch_size):
            prompt, indices = waiting.pop()
            taken[prompt] = indices
            present += len(indices)
        return taken

    def _entered(
        self, decoding: Decoding | None, batch: dict[tuple[int, ...], list[int]], room: int
    ) -> Decoding:
        new = self.prefill(batch, room)
        if decoding is None:
            return new
        decoding.extend(new)
        return decoding

    def prefill(self, batch: dict[tuple[int, ...], list[int]], room: int) -> Decoding:
        """Encode every prompt once, for all of its samples.

        Args:
            batch: request numbers by prompt; longest prompts first.
            room: most tokens of a sample.

        Raises:
            ValueError: prompts in another order.
        """
        prompts, device = list(batch), self.model.device
        if [len(prompt) for prompt in prompts] != sorted(map(len, prompts), reverse=True):
            raise ValueError("prompts must come longest first")
        repeats = torch.tensor([len(group) for group in batch.values()])
        rows = torch.repeat_interleave(torch.arange(len(prompts)), repeats).to(device)
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        if self._shares_prompts:
            logits, cache = self._shared(prompts, rows, room)
            return Decoding(logits[rows], cache, None, length[rows])
        whole = self._encode(prompts)
        decoding = Decoding(whole.logits, whole.cache, whole.mask, length)
        if len(rows) > len(prompts):
            decoding.select(rows)
        return decoding

    def _shared(
        self, prompts: Sequence[tuple[int, ...]], rows: Tensor, room: int
    ) -> tuple[Tensor, PrefixCache]:
        """[P, V] logits, and a cache whose sequences are of the prompts `rows` [B]."""
        lengths = [len(prompt) for prompt in prompts]
        budget = _PREFILL_TOKENS.get(self.model.device.type, _MOST_PREFILL_TOKENS)
        if self._lean is not None:
            cache = PrefixCache(lengths, rows, room, self._lean.cache_shape)
            return self._lean.prefill(prompts, cache, budget), cache
        parts = micro_batches(lengths, budget)
        encoded = [self._encode([prompts[index] for index in part]) for part in parts]
        cache = PrefixCache(lengths, rows, room, encoded[0].cache_shape())
        for part, whole in zip(parts, encoded, strict=True):
            for row, index in enumerate(part):
                for number, (keys, values) in enumerate(whole.of_prompt(row, lengths[index])):
                    cache.fill(index, number, keys, values)
        return torch.cat([whole.logits for whole in encoded]), cache

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
        if self._lean is not None and isinstance(cache, PrefixCache):
            decoding.logits = self._lean.step(tokens, decoding.length, cache)
            decoding.length = decoding.length + 1
            return
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
        logits = cast(Tensor, output.logits[:, -1])
        return logits if logits.dtype is torch.float64 else logits.float()


class _Encoded(NamedTuple):
    """Prompts that were read in one pass, padded on the left."""

    logits: Tensor  # [P, V] of the first token
    cache: DynamicCache
    mask: Tensor  # [P, T] 1 on real tokens

    def cache_shape(self) -> CacheShape:
        """As a prefix cache has it."""
        layers = cast(Any, self.cache).layers
        keys = layers[0].keys
        return CacheShape(len(layers), keys.shape[1], keys.shape[3], keys.device, keys.dtype)

    def of_prompt(self, row: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [H, length, D] of each layer."""
        for layer in cast(Any, self.cache).layers:
            yield layer.keys[row, :, -length:], layer.values[row, :, -length:]


@dataclass
class Decoding:
    """State of a batch between two tokens."""

    logits: Tensor  # [B, V] of the next token
    cache: DynamicCache | PrefixCache
    mask: Tensor | None  # [B, columns so far] 1 on real tokens; None: the cache knows
    length: Tensor  # [B] position of the next token

    def extend(self, other: Decoding) -> None:
        """Put other sequences behind these; both know their masks by the cache."""
        assert isinstance(self.cache, PrefixCache)
        assert isinstance(other.cache, PrefixCache)
        self.cache.extend(other.cache)
        self.logits = torch.cat([self.logits, other.logits])
        self.length = torch.cat([self.length, other.length])

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these sequences."""
        self.cache.batch_select_indices(rows)
        self.logits, self.length = self.logits[rows], self.length[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


def _by_length(requests: Sequence[Request]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts, shortest first, with the numbers of their requests."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        by_prompt.setdefault(request.prompt_ids, []).append(index)
    order = sorted(by_prompt, key=lambda ids: (-len(ids), ids), reverse=True)
    return [(prompt, by_prompt[prompt]) for prompt in order]


class _Unfinished:
    """Which request each sequence of the batch completes, and all tokens so far."""

    def __init__(
        self, requests: Sequence[Request], sampling: Sampling, eos_ids: frozenset[int]
    ) -> None:
        self.rows: list[int] = []
        self._requests, self._most, self._eos_ids = requests, sampling.max_new_tokens, eos_ids
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._steps = [0] * len(requests)  # that the cache has room for, used or not
        self._noise: dict[int, list[float]] = {}

    def enter(self, rows: Iterable[int]) -> None:
        """These requests, behind those that are in."""
        for row in rows:
            self.rows.append(row)
            self._noise[row] = uniform_noise(self._requests[row].key, self._most).tolist()

    def noise(self) -> Tensor:
        """[B] uniform numbers for the next token of each sequence."""
        drawn = [self._noise[row][len(self._tokens[row])] for row in self.rows]
        return torch.tensor(drawn, dtype=torch.float64)

    def append(self, drawn: Tensor) -> int:
        """Take a token [B] of each; a sequence that had ended takes none. Returns how many end."""
        ended = 0
        for row, token in zip(self.rows, drawn.tolist(), strict=True):
            self._steps[row] += 1
            if not self._done(row):
                self._tokens[row].append(token)
                ended += self._done(row)
        return ended

    def leave(self) -> Tensor | None:
        """Drop what has ended, where that is worth the copy; [b] the sequences that stay.

        What has been in for the most tokens leaves at once, even if it had ended long before: the
        cache has no room for another.
        """
        keep = [place for place, row in enumerate(self.rows) if not self._done(row)]
        full = any(self._steps[row] == self._most for row in self.rows)
        if not full and len(keep) > _KEEP * len(self.rows):
            return None
        self.rows = [self.rows[place] for place in keep]
        return torch.tensor(keep, dtype=torch.long)

    def _done(self, row: int) -> bool:
        tokens = self._tokens[row]
        return bool(tokens) and (tokens[-1] in self._eos_ids or len(tokens) == self._most)

    def found(self) -> list[Rollout]:
        """In the order of the requests."""
        return [
            Rollout(request.prompt_ids, tuple(ids), ids[-1] in self._eos_ids)
            for request, ids in zip(self._requests, self._tokens, strict=True)
        ]


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
    out with these, and one on a quantised base as it is: merged weights would have to be whole. Of
    sharded weights each rank has a whole copy in the compute precision, gathered anew.

    Args:
        role: who samples.
        merged: False rolls out with the shared base and its adapter, which takes no second base.
    """

    def __init__(self, role: Role, *, merged: bool = True) -> None:
        from copy import deepcopy

        from peft import PeftModel

        from amenable.models.quantised import is_quantised

        self.role = role
        self._gathered = role.sharded
        self._merged = merged and isinstance(role.model, PeftModel) and not is_quantised(role.plain)
        if self._merged:
            self.model = _without_adapters(deepcopy(role.plain))
            self._targets = dict(self.model.named_modules())
        elif self._gathered:
            self.model = _empty_like(role.plain, role.dtype)
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
        elif self._gathered:
            copied = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, parameter in role.plain.named_parameters():
                    copied[name].copy_(sharding.whole(parameter.detach()))
        return self.model

    def close(self) -> None:
        """Nothing to do: plain tensors, which go with it."""

    def engine(self, renderer: Renderer) -> TransformersEngine:
        """Samples with these weights."""
        return TransformersEngine(
            self.model,
            eos_ids=renderer.eos_ids,
            pad_id=renderer.pad_id,
            dtype=self.role.dtype,
            role=None if self._merged or self._gathered else self.role,
        )


def _empty_like(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A whole model of the same shape, whose weights are yet to come."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    made: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(model.config), dtype=dtype)
    made.requires_grad_(False)
    torch.nn.Module.to(made, model.device)
    made.eval()
    return made


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
