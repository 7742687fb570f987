"""A local model as a judge: which of two labels it finds likelier as its next token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amenable.config.recipe import Recipe
from amenable.data.collate import PromptGroup, collate
from amenable.data.render import Renderer
from amenable.errors import ModelError
from amenable.judges.template import Template
from amenable.judges.types import Keep, Question, Reply, Verdict
from amenable.models.build import best_device
from amenable.models.load import eos_ids, load_causal_lm, load_tokenizer, resolve_dtype
from amenable.models.packed_layers import shorten
from amenable.models.roles import Role

_LABELS = ("A", "B")
_ROOM = 10**6  # tokens: a question is never cut


class LocalJudge:
    """One forward pass a question; its confidence is the label's share of the two.

    Args:
        source: a model folder or hub id.
        template: of the question.
        name: in tables.
        precision: `auto`, `bf16` or `fp32`.
        micro_batch_tokens: of a forward pass.

    Raises:
        ModelError: it cannot be loaded, or a label is not one token of its own.
    """

    def __init__(
        self,
        source: Path | str,
        template: Template,
        name: str,
        *,
        precision: str = "auto",
        micro_batch_tokens: int = 2048,
    ) -> None:
        self._template, self._budget, self.name = template, micro_batch_tokens, name
        device = best_device()
        dtype = resolve_dtype(precision, device)
        tokenizer = load_tokenizer(source)
        recipe = Recipe()
        recipe = replace(recipe, data=replace(recipe.data, max_prompt_tokens=_ROOM))
        self._renderer = Renderer.from_recipe(recipe, tokenizer, eos_ids(source, tokenizer))
        self._labels = [
            tokenizer(label, add_special_tokens=False)["input_ids"] for label in _LABELS
        ]
        if any(len(ids) != 1 for ids in self._labels) or self._labels[0] == self._labels[1]:
            raise ModelError(f"{source}: {' and '.join(_LABELS)} are not one token each")
        model = load_causal_lm(source, dtype, device=device)
        model.requires_grad_(False)
        shorten(model)
        self._role = Role(model, dtype=dtype)
        self.identity: Mapping[str, Any] | None = {
            "kind": "labels",
            "model": str(source),
            "files": _files(source),
            "template": template.sha256,
            "dtype": str(dtype),
        }

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[str]:
        """Answer each question once; see `Judge`."""
        groups = [
            PromptGroup(
                self._renderer.prompt_ids(self._template.short_prompt(question)), self._labels
            )
            for question in questions
        ]
        for part in self._role.split(groups, self._budget):
            batch = collate([groups[i] for i in part], self._renderer.pad_id)
            with torch.no_grad():
                found = self._role.logprobs(batch).logprobs.sum(1).view(-1, 2)
            for number, (first, second) in zip(part, found.double().tolist(), strict=True):
                keep(number, _reply(first, second))
        return []


def _reply(first: float, second: float) -> Reply:
    """From log-probabilities of the two labels."""
    better = Verdict.FIRST if first > second else Verdict.SECOND
    confidence = 1 / (1 + math.exp(min(700.0, second - first)))
    text = f"log-probabilities {first:.4f} and {second:.4f}"
    return Reply(Verdict.TIE if first == second else better, text, confidence)


def _files(source: Path | str) -> list[list[Any]]:
    """Names, sizes and times of a folder's files: another model in the same place is another."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir())]
