"""The same tokens through every path that a run has, and through plain transformers.

Shapes: N completions, C tokens of the longest, M real completion tokens in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from amenable.data.collate import PromptGroup, collate
from amenable.models.logprobs import trunk_of
from amenable.models.packed_attention import attention_by
from amenable.models.roles import Role
from amenable.ranks.sharding import passing
from amenable.rollout.transformers_engine import TransformersEngine
from amenable.rollout.types import uniform_noise

_EXTRA_COLUMNS = 5  # of padding, so that equally long rows are padded as well

Row = tuple[Sequence[int], Sequence[int]]  # prompt and completion


@dataclass(frozen=True)
class Rows:
    """Prompts with the completions that were sampled for them.

    Args:
        groups: distinct prompts, each with its completions.
        keys: [N] of the noise that drew each completion.
        max_new_tokens: of the sampling.
        pad_id: fills rows.
    """

    groups: tuple[PromptGroup, ...]
    keys: tuple[tuple[int | str, ...], ...]
    max_new_tokens: int
    pad_id: int

    @cached_property
    def own(self) -> list[PromptGroup]:
        """The last completion of each prompt in a row of its own.

        In a shared row it is the one that could see the others.
        """
        return [PromptGroup(group.prompt_ids, [group.completions[-1]]) for group in self.groups]

    @cached_property
    def is_own(self) -> Tensor:
        """[M] which tokens of all completions belong to `own`."""
        parts = [
            torch.full((len(ids),), index == len(group.completions) - 1)
            for group in self.groups
            for index, ids in enumerate(group.completions)
        ]
        return torch.cat(parts)

    @cached_property
    def few(self) -> tuple[PromptGroup, ...]:
        """Half of the prompts, for comparisons of a path with itself."""
        return self.groups[: max(1, len(self.groups) // 2)]


def pairs(groups: Sequence[PromptGroup]) -> list[Row]:
    """Prompt and completion of every completion, in order."""
    return [(group.prompt_ids, ids) for group in groups for ids in group.completions]


def trainer_logprobs(
    role: Role, groups: Sequence[PromptGroup], pad_id: int, temperature: float
) -> Tensor:
    """[M] log-probabilities as the learners compute them, the groups in one micro-batch."""
    batch = collate(groups, pad_id).to(role.device)
    return role.logprobs(batch, temperature=temperature).logprobs[batch.mask].cpu()


def one_by_one(
    role: Role, groups: Sequence[PromptGroup], pad_id: int, temperature: float
) -> Tensor:
    """[M] the same, every group in a micro-batch of its own."""
    return torch.cat([trainer_logprobs(role, [group], pad_id, temperature) for group in groups])


def padded(
    rows: Sequence[Row], pad_id: int, side: str, extra: int = _EXTRA_COLUMNS
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and positions [N, T], padded on the `left` or `right`."""
    width = extra + max(len(prompt) + len(ids) for prompt, ids in rows)
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, (prompt, ids) in enumerate(rows):
        size = len(prompt) + len(ids)
        place = slice(0, size) if side == "right" else slice(width - size, width)
        tokens[index, place] = torch.tensor([*prompt, *ids])
        mask[index, place] = 1
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Plain:
    """Plain transformers: one row a completion, full logits, no code of ours but the indexing.

    Args:
        role: whose weights.
        pad_id: fills rows.
        attention: transformers' name of the attention to use; None: the model's own.
    """

    role: Role
    pad_id: int
    attention: str | None = None

    @contextmanager
    def _active(self) -> Iterator[Any]:
        with self.role.active() as model:
            own = model.config.get_text_config()._attn_implementation
            with attention_by(model, self.attention or own):
                yield model

    def logits(self, rows: Sequence[Row], side: str | None) -> list[Tensor]:
        """[tokens, V] float32 logits before each completion token, for every row.

        Args:
            rows: prompts and completions.
            side: pad the rows of one batch there; None: each row alone, without padding.
        """
        if side is None:
            return [part for row in rows for part in self._logits([row], "right", 0)]
        return self._logits(rows, side, _EXTRA_COLUMNS)

    def _logits(self, rows: Sequence[Row], side: str, extra: int) -> list[Tensor]:
        tokens, mask, positions = self._inputs(rows, side, extra)
        with self._active() as model:
            output = cast(Any, model)(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
            )
        return [
            output.logits[index, start - 1 : end - 1].float().cpu()
            for index, (start, end) in enumerate(_places(rows, side, tokens.shape[1]))
        ]

    def decoded(self, rows: Sequence[Row]) -> list[Tensor]:
        """The same, one token a pass with transformers' own cache, prompts padded on the left."""
        tokens, mask, positions = self._inputs([(prompt, ()) for prompt, _ in rows], "left", 0)
        longest = max(len(ids) for _, ids in rows)
        steps: list[Tensor] = []
        with self.role.active() as model:
            cache = DynamicCache(config=model.config)
            for step in range(longest):
                output = cast(Any, model)(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                steps.append(output.logits[:, -1].float().cpu())
                drawn = [ids[min(step, len(ids) - 1)] for _, ids in rows]
                tokens = torch.tensor(drawn, device=tokens.device)[:, None]
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                positions = positions[:, -1:] + 1
        together = torch.stack(steps, 1)
        return [together[index, : len(ids)] for index, (_, ids) in enumerate(rows)]

    def states(self, rows: Sequence[Row], side: str | None) -> tuple[Tensor, Tensor]:
        """Last hidden states: [M, d] before every completion token, and [N, d] at the last one."""
        if side is None:
            parts = [self._states([row], "right", 0) for row in rows]
            return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return self._states(rows, side, _EXTRA_COLUMNS)

    def _states(self, rows: Sequence[Row], side: str, extra: int) -> tuple[Tensor, Tensor]:
        tokens, mask, positions = self._inputs(rows, side, extra)
        with self._active() as model:
            hidden = passing(
                model,
                lambda model: (
                    trunk_of(model)(
                        input_ids=tokens,
                        attention_mask=mask,
                        position_ids=positions,
                        use_cache=False,
                    ).last_hidden_state
                ),
            )
        places = _places(rows, side, tokens.shape[1])
        before = [hidden[row, start - 1 : end - 1] for row, (start, end) in enumerate(places)]
        last = [hidden[row, end - 1] for row, (_, end) in enumerate(places)]
        return torch.cat(before), torch.stack(last)

    def _inputs(self, rows: Sequence[Row], side: str, extra: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, mask, positions = padded(rows, self.pad_id, side, extra)
        device = self.role.device
        return tokens.to(device), mask.to(device), positions.to(device)


def _places(rows: Sequence[Row], side: str, width: int) -> list[tuple[int, int]]:
    """First column of each completion, and the one after it."""
    places = []
    for prompt, ids in rows:
        begin = 0 if side == "right" else width - len(prompt) - len(ids)
        places.append((begin + len(prompt), begin + len(prompt) + len(ids)))
    return places


def picked(logits: Sequence[Tensor], rows: Sequence[Row], temperature: float) -> Tensor:
    """[M] log-probabilities of the completion tokens under softmax(logits / temperature)."""
    parts = []
    for part, (_, ids) in zip(logits, rows, strict=True):
        wide = torch.log_softmax(part / temperature, -1)
        parts.append(wide.gather(1, torch.tensor(list(ids))[:, None])[:, 0])
    return torch.cat(parts)


@dataclass(frozen=True)
class Sampled:
    """What the roll-out engine says of the tokens that it drew."""

    logprobs: Tensor
    """[M] nats, at the recipe's temperature."""
    missed: Tensor
    """[M] how far, in probability, a token's noise lies outside the interval that draws it."""


def sampler(engine: TransformersEngine, rows: Rows, temperature: float) -> Sampled:
    """The engine's cached decoding on the sampled tokens: prompts encoded once, padded left."""
    completions = [ids for _, ids in pairs(rows.groups)]
    longest = max(map(len, completions))
    tokens = torch.full((len(completions), longest), rows.pad_id)
    for index, ids in enumerate(completions):
        tokens[index, : len(ids)] = torch.tensor(list(ids))
    noise = torch.tensor([list(uniform_noise(key, rows.max_new_tokens)) for key in rows.keys])
    logprobs, missed = [], []
    for step, logits in enumerate(_decoded(engine, rows.groups, tokens)):
        wide = torch.log_softmax(logits.double() / temperature, -1)
        drawn = tokens[:, step : step + 1]
        upper = wide.exp().cumsum(-1)
        end = upper.gather(1, drawn)[:, 0]
        begin = end - wide.exp().gather(1, drawn)[:, 0]
        logprobs.append(wide.gather(1, drawn)[:, 0].float())
        missed.append(torch.maximum(begin - noise[:, step], noise[:, step] - end).clamp(min=0))
    real = [(row, step) for row, ids in enumerate(completions) for step in range(len(ids))]
    where = tuple(torch.tensor(real).T)
    return Sampled(torch.stack(logprobs, 1)[where], torch.stack(missed, 1)[where].float())


def _decoded(
    engine: TransformersEngine, groups: Sequence[PromptGroup], tokens: Tensor
) -> Iterator[Tensor]:
    """[N, V] float32 logits before each step's tokens, by the engine's own two kinds of forward.

    Args:
        engine: decodes.
        groups: N completions of distinct prompts.
        tokens: [N, C] what to go on with instead of a sample.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for group in groups:
        start = sum(map(len, rows.values()))
        rows[tuple(group.prompt_ids)] = list(range(start, start + len(group.completions)))
    batch = {prompt: rows[prompt] for prompt in sorted(rows, key=len, reverse=True)}
    order = torch.tensor([row for group in batch.values() for row in group])
    with engine.running():
        decoding = engine.prefill(batch, tokens.shape[1])
        for step in range(tokens.shape[1]):
            yield decoding.logits.cpu()[order.argsort()]
            if step + 1 < tokens.shape[1]:
                engine.advance(decoding, tokens[order, step])
