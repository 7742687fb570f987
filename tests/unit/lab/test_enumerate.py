from __future__ import annotations

import numpy as np
import pytest
import torch

from amenable.errors import NumericsError
from amenable.lab.enumerate import policy_table
from amenable.lab.problems import EOS_ID, PROBLEMS, Problem
from amenable.models.load import load_causal_lm

from .conftest import OpenWorld


@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_probabilities_sum_to_one_and_are_those_of_plain_transformers(
    problem: Problem, opened: OpenWorld
) -> None:
    world, folder = opened(problem)
    assert np.allclose(np.exp(world.reference).sum(1), 1, atol=1e-6)
    model = load_causal_lm(folder, torch.float64)
    for row, prompt in enumerate(problem.prompts):
        for number in range(0, len(problem.texts), 7):
            start = problem.prompt_ids(prompt)
            ids = (*start, *problem.completion_ids(problem.texts[number]))
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            places = range(len(start), len(ids))
            total = sum(float(logprobs[n - 1, ids[n]]) for n in places)
            assert world.reference[row, number] == pytest.approx(total, abs=1e-9)


def test_weight_on_the_pad_token_is_refused(opened: OpenWorld) -> None:
    _, folder = opened(PROBLEMS[2])
    model = load_causal_lm(folder, torch.float64)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = model.get_output_embeddings().weight[EOS_ID]
    with pytest.raises(NumericsError, match="miss 1 by"):
        policy_table(PROBLEMS[2], model)
