"""Every completion's probability under a model, by the forward pass that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from amenable.data.collate import PromptGroup, collate
from amenable.errors import NumericsError
from amenable.lab.prefix_table import register
from amenable.lab.problems import PAD_ID, Floats, Problem
from amenable.models.load import load_causal_lm
from amenable.models.logprobs import completion_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASS_TOLERANCE = 1e-4  # a trained Llama may leave a little on the pad token, which no loss sees


def policy_table(problem: Problem, source: Path | PreTrainedModel) -> Floats:
    """[P, S] log-probabilities, nats, of every completion of every prompt; float64.

    Args:
        problem: what to enumerate.
        source: a model folder, or a model (its own precision is used).

    Raises:
        NumericsError: the probabilities of a prompt do not sum to 1 within 1e-4.
    """
    register()
    model = load_causal_lm(source, torch.float64) if isinstance(source, Path) else source
    completions = [problem.completion_ids(text) for text in problem.texts]
    with torch.no_grad():
        rows = [
            completion_logprobs(
                model,
                collate([PromptGroup(problem.prompt_ids(p), [ids]) for ids in completions], PAD_ID),
            )
            .logprobs.double()
            .sum(1)
            for p in problem.prompts
        ]
    logprobs = torch.stack(rows)
    missing = float((logprobs.exp().sum(1) - 1).abs().max())
    if missing > MASS_TOLERANCE:
        raise NumericsError(
            f"problem {problem.name!r}: the enumerated probabilities of a prompt miss 1 by "
            f"{missing:.2g} (allowed: {MASS_TOLERANCE:g}); the model puts weight on the pad token, "
            "or its forward pass is wrong"
        )
    table: Floats = logprobs.numpy()
    return table
