"""Where scores come from: the run's reward model, somebody else's, or a Python function."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from amenable.data.collate import GroupBatch, PromptGroup, collate, split_groups
from amenable.data.schemas import Prompt
from amenable.errors import ModelError, RecipeError, StageError
from amenable.models.logprobs import CompletionStates

if TYPE_CHECKING:
    from amenable.models.roles import Role


class Scores(NamedTuple):
    """Of one micro-batch."""

    scores: Tensor
    """[N] centred scores."""

    states: CompletionStates | None
    """The reward model's hidden states, where it is a role of this run."""


class Reward(Protocol):
    """Anything that scores completions."""

    def score(self, batch: GroupBatch, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Scores of a micro-batch.

        Args:
            batch: N completions as token ids.
            prompts: [N] what each completes.
            texts: [N] the completions as text.
        """
        ...


@dataclass(frozen=True)
class RoleReward:
    """The run's own reward model: raw score minus its offset."""

    role: Role
    offset: float

    @torch.no_grad()
    def score(self, batch: GroupBatch, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Scores, and the states they were read from."""
        states = self.role.states(batch)
        return Scores(self.role.scalar_head(states.last) - self.offset, states)


class FolderReward:
    """A sequence-classification model with its own tokenizer: texts are rendered anew for it.

    A `reward_offset` in its `config.json` is subtracted.
    """

    def __init__(self, source: str, *, max_prompt_tokens: int, max_completion_tokens: int) -> None:
        from transformers import AutoModelForSequenceClassification

        from amenable.data.render import Renderer
        from amenable.models.load import eos_ids, load_tokenizer

        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"policy.reward = {source!r} is no reward model that loads as a sequence "
                f"classifier ({str(error).splitlines()[0]}); give such a folder, a hub id, "
                "or module:function"
            ) from error
        if model.config.num_labels != 1:
            raise ModelError(
                f"policy.reward = {source!r} gives {model.config.num_labels} numbers a text; "
                "a reward model gives one"
            )
        self._model = model.eval()
        tokenizer = load_tokenizer(source)
        self._model.config.pad_token_id = tokenizer.pad_token_id
        self._offset = float(getattr(model.config, "reward_offset", 0.0))
        self._renderer = Renderer(
            tokenizer,
            eos_ids(source, tokenizer),
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
        )

    @torch.no_grad()
    def score(self, batch: GroupBatch, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Scores of the texts, on the device of `batch`."""
        rows = [
            self._renderer.prompt_ids(prompt) + self._renderer.completion_ids(text)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ids = torch.full((len(rows), max(map(len, rows))), self._renderer.pad_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return Scores((logits - self._offset).to(batch.input_ids.device), None)


class FunctionReward:
    """`module:function`, called with `prompts` and `completions` (texts) and `rows` (extra keys).

    The function returns one finite number a completion.
    """

    def __init__(self, path: str) -> None:
        module, _, name = path.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                f"policy.reward = {path!r} cannot be imported ({error}); "
                "it must name module:function on the Python path"
            ) from error
        self._path = path
        self._function = cast(Callable[..., Sequence[float]], function)

    def score(self, batch: GroupBatch, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Scores of the texts, on the device of `batch`."""
        given = self._function(
            prompts=[prompt.text for prompt in prompts],
            completions=list(texts),
            rows=[dict(prompt.meta) for prompt in prompts],
        )
        try:
            scores = np.asarray(list(given), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise StageError(
                f"policy.reward = {self._path!r} must return a list of numbers; it returned "
                f"{type(given).__name__} ({error})"
            ) from error
        if scores.shape != (len(texts),) or not np.isfinite(scores).all():
            raise StageError(
                f"policy.reward = {self._path!r} must return one finite number for each of the "
                f"{len(texts)} completions; it returned {scores.shape[0]} with "
                f"{int((~np.isfinite(scores)).sum())} not finite"
            )
        return Scores(
            torch.tensor(scores, dtype=torch.float32, device=batch.input_ids.device), None
        )


def ready_reward(source: str, *, max_prompt_tokens: int, max_completion_tokens: int) -> Reward:
    """The reward that `policy.reward` names: `module:function`, a folder, or a hub id."""
    if ":" in source and not Path(source).exists():
        return FunctionReward(source)
    return FolderReward(
        source, max_prompt_tokens=max_prompt_tokens, max_completion_tokens=max_completion_tokens
    )


@torch.no_grad()
def score_groups(
    role: Role, groups: Sequence[PromptGroup], pad_id: int, micro_batch_tokens: int
) -> Tensor:
    """Raw scores [N] of every completion, in the order of the groups."""
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.completions))
    scores = torch.zeros(starts[-1])
    for part in split_groups(groups, micro_batch_tokens):
        batch = collate([groups[i] for i in part], pad_id).to(role.device)
        where = [n for i in part for n in range(starts[i], starts[i + 1])]
        scores[where] = role.scores(batch).cpu()
    if not math.isfinite(float(scores.sum())):
        raise StageError("the reward model gives scores that are not finite; train it again")
    return scores
