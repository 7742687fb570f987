from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from amenable.data.collate import PromptGroup, collate
from amenable.lab.prefix_table import (
    IMPOSSIBLE,
    PrefixTableConfig,
    PrefixTableForCausalLM,
    register,
)
from amenable.models.load import load_causal_lm
from amenable.models.logprobs import completion_logprobs, hidden_states
from amenable.rollout.transformers_engine import TransformersEngine
from amenable.rollout.types import Request, Sampling

BASE, LENGTH = 5, 4


@pytest.fixture
def model() -> PrefixTableForCausalLM:
    torch.manual_seed(0)
    return PrefixTableForCausalLM(PrefixTableConfig(BASE, LENGTH, eos_token_id=1)).eval()


def row_of(prefix: tuple[int, ...]) -> int:
    """The prefix read as a number in base 5, its first token the lowest digit."""
    return int("".join(map(str, reversed(prefix))), BASE)


def test_every_prefix_has_a_row_of_its_own(model: PrefixTableForCausalLM) -> None:
    prefixes = list(itertools.product(range(1, BASE), repeat=LENGTH))
    assert len({row_of(prefix) for prefix in prefixes}) == len(prefixes)
    logits = model(torch.tensor(prefixes)).logits
    for number, prefix in enumerate(prefixes):
        for end in range(1, LENGTH + 1):
            expected = model.model.table.weight[row_of(prefix[:end])]
            assert torch.equal(logits[number, end - 1, 1:], expected)
    assert bool((logits[..., 0] == IMPOSSIBLE).all())


def test_a_completion_in_a_group_reads_the_rows_that_it_reads_alone(
    model: PrefixTableForCausalLM,
) -> None:
    completions = [(2, 3, 1), (4, 4, 4), (1,), (3, 2)]
    together = collate([PromptGroup((2,), completions), PromptGroup((4,), completions)], 0)
    assert together.attention_mask is not None
    alone = collate([PromptGroup((p,), [c]) for p in (2, 4) for c in completions], 0)
    assert alone.attention_mask is None
    expected = completion_logprobs(model, alone).logprobs
    assert torch.equal(completion_logprobs(model, together).logprobs, expected)
    prefixes = [(2,), (2, 2), (2, 2, 3)]
    by_hand = [
        torch.log_softmax(model.model.table.weight[row_of(prefix)], 0)[token - 1]
        for prefix, token in zip(prefixes, completions[0], strict=True)
    ]
    assert torch.allclose(expected[0], torch.stack(by_hand), atol=1e-6)


def test_an_additive_mask_means_the_same(model: PrefixTableForCausalLM) -> None:
    batch = collate([PromptGroup((2,), [(3, 4, 1), (4, 2)])], 0)
    states = hidden_states(model, batch)
    model.config._attn_implementation = "eager"
    assert torch.equal(hidden_states(model, batch), states)


def test_the_cached_engine_samples_from_the_rows(model: PrefixTableForCausalLM) -> None:
    """Greedy roll-outs of prompts of two lengths, against a walk through the table by hand."""
    engine = TransformersEngine(model, eos_ids=frozenset({1}), pad_id=0)
    prompts = [(2,), (3,), (4, 2)]
    rollouts = engine.generate(
        [Request(prompt, (n,)) for n, prompt in enumerate(prompts)],
        Sampling(max_new_tokens=3, temperature=0.0),
    )
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        walked = prompt
        while len(walked) < len(prompt) + 3 and walked[-1] != 1:
            row = min(row_of(walked), BASE**LENGTH)
            walked = (*walked, 1 + int(model.model.table.weight[row].argmax()))
        assert rollout.completion_ids == walked[len(prompt) :]


def test_saved_and_loaded_through_the_checks(model: PrefixTableForCausalLM, tmp_path: Path) -> None:
    register()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = load_causal_lm(tmp_path, torch.float32)
    assert isinstance(loaded, PrefixTableForCausalLM)
    assert torch.equal(loaded.model.table.weight, model.model.table.weight)
    assert [name for name, _ in loaded.named_parameters()] == ["model.table.weight"]
    assert isinstance(AutoModelForCausalLM.from_config(model.config), PrefixTableForCausalLM)


def test_too_many_prefixes_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        PrefixTableConfig(20, 20)
