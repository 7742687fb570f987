"""Prompt groups against plain transformers: one row a completion, ordinary causal mask."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amenable.data.collate import PromptGroup, collate
from amenable.errors import ModelError
from amenable.models import logprobs as module
from amenable.models.heads import ScalarHead
from amenable.models.logprobs import (
    completion_logprobs,
    completion_scores,
    completion_values,
    scatter,
)

from .conftest import SIZES, build

PAD = 0
GROUPS = [
    PromptGroup([5, 9, 300], [[41, 17, 2], [8, 260, 77, 12, 2], [13]]),
    PromptGroup([33, 34, 35, 36, 37, 38], [[91, 2], [402, 403, 404, 405]]),
]
HEAD = ScalarHead(32, seed=11)


def plain_forward(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1
) -> tuple[Tensor, Tensor]:
    """Log-softmax [C, V] before every completion token, and final hidden states [C + 1, d]."""
    ids = torch.tensor([[*prompt, *completion]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    start = len(prompt) - 1
    logits = output.logits[0, start:-1].float() / temperature
    return torch.log_softmax(logits, -1), output.hidden_states[-1][0, start:]


def each(groups: Sequence[PromptGroup]) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [(group.prompt_ids, ids) for group in groups for ids in group.completions]


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_group_equals_plain_forwards_of_each_completion(family: str) -> None:
    model = build(family)
    batch = collate(GROUPS, PAD)
    with torch.no_grad():
        found = completion_logprobs(model, batch, temperature=0.7, with_entropy=True)
        values = completion_values(model, HEAD, batch)
        scores = completion_scores(model, HEAD, batch)
        for row, (prompt, ids) in enumerate(each(GROUPS)):
            wide, states = plain_forward(model, prompt, ids, temperature=0.7)
            picked = torch.stack([wide[i, token] for i, token in enumerate(ids)])
            size = len(ids)
            assert found.entropy is not None
            assert_close(found.logprobs[row, :size], picked)
            assert_close(found.entropy[row, :size], -(wide.exp() * wide).sum(-1))
            assert_close(values[row, :size], states[:-1] @ HEAD.weight[0])
            assert_close(scores[row], states[-1] @ HEAD.weight[0])
    for tensor in (found.logprobs, found.entropy, values):
        assert tensor is not None
        assert tensor[~batch.mask].abs().max() == 0
    assert found.logprobs[batch.mask].std() > 0.3, "the model must tell tokens apart"


def test_a_group_equals_rows_of_one_completion(family: str) -> None:
    model = build(family)
    rows = [PromptGroup(prompt, [ids]) for prompt, ids in each(GROUPS)]
    with torch.no_grad():
        grouped = completion_logprobs(model, collate(GROUPS, PAD)).logprobs
        alone = completion_logprobs(model, collate(rows, PAD)).logprobs
    assert_close(grouped, alone)


def test_logits_bend_below_gemma_2s_cap() -> None:
    """A cap of 0.5, where most logits of this model lie far above it."""
    model = build("Gemma2", final_logit_softcapping=0.5)
    prompt, ids = GROUPS[0].prompt_ids, GROUPS[0].completions[1]
    with torch.no_grad():
        ours = completion_logprobs(model, collate(GROUPS, PAD)).logprobs[1]
        wide, _ = plain_forward(model, prompt, ids)
    spread = wide.amax(-1) - wide.amin(-1)
    assert spread.max() <= 1.0 + 1e-4, "logits lie within ±0.5"
    assert_close(ours, torch.stack([wide[i, token] for i, token in enumerate(ids)]))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma", "Gemma2"])
def test_gradients_of_a_group_equal_those_of_plain_forwards(family: str) -> None:
    ours, plain = build(family), build(family)
    batch = collate(GROUPS, PAD)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    (completion_logprobs(ours, batch).logprobs * weights)[batch.mask].sum().backward()
    completion_scores(ours, HEAD, batch).sum().backward()
    for row, (prompt, ids) in enumerate(each(GROUPS)):
        wide, states = plain_forward(plain, prompt, ids)
        picked = torch.stack([wide[i, token] for i, token in enumerate(ids)])
        ((picked * weights[row, : len(ids)]).sum() + states[-1] @ HEAD.weight[0]).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = expected[name]
        assert parameter.grad is not None, name
        assert wanted is not None, name
        scale = float(wanted.abs().max())
        assert float((parameter.grad - wanted).abs().max()) <= 1e-4 * max(1.0, scale), name


def test_neighbours_padding_and_width_change_nothing(family: str) -> None:
    model = build(family)
    other = PromptGroup(GROUPS[0].prompt_ids, [GROUPS[0].completions[0], [499, 498]])
    wide = PromptGroup([7] * 20, [[8] * 9, [9]])
    with torch.no_grad():
        base = completion_logprobs(model, collate([GROUPS[0]], PAD)).logprobs[0, :3]
        for groups, pad in (([other], PAD), ([GROUPS[0], wide], PAD), ([GROUPS[0], wide], 55)):
            found = completion_logprobs(model, collate(groups, pad)).logprobs[0, :3]
            torch.testing.assert_close(found, base, rtol=2e-5, atol=2e-5)


def test_chunks_of_the_vocabulary_projection_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = build("Llama"), collate(GROUPS, PAD)
    with torch.no_grad():
        whole = completion_logprobs(model, batch, with_entropy=True)
        monkeypatch.setattr(module, "_CHUNK", 4)
        parts = completion_logprobs(model, batch, with_entropy=True)
    torch.testing.assert_close(parts.logprobs, whole.logprobs)
    torch.testing.assert_close(parts.entropy, whole.entropy)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_entropy_that_is_learnt_leaves_the_bits_of_logprobs(frozen: bool) -> None:
    """The ratio of the first step is exactly 1, also with an entropy bonus."""
    model = build("Llama")
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    batch = collate(GROUPS, PAD)
    with torch.no_grad():
        old = completion_logprobs(model, batch, temperature=0.7, with_entropy=True)
    new = completion_logprobs(model, batch, temperature=0.7, with_entropy=True)
    assert torch.equal(old.logprobs, new.logprobs)
    assert old.entropy is not None
    assert new.entropy is not None
    assert new.entropy.requires_grad
    torch.testing.assert_close(old.entropy, new.entropy)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3"])
def test_groups_longer_than_the_attention_window_are_refused(family: str) -> None:
    model = build(family, **{**SIZES, "sliding_window": 6})
    with pytest.raises(ModelError, match=r"8 tokens, more than .* window of 6; lower data.max_pro"):
        completion_logprobs(model, collate([PromptGroup([5, 6, 7], [[1] * 5, [2]])], PAD))
    fitting = [PromptGroup([5, 6], [[1, 3, 4, 2], [2]])]
    completion_logprobs(model, collate(fitting, PAD))


def test_a_single_completion_longer_than_the_window_is_the_models_own_matter() -> None:
    model = build("Mistral", sliding_window=6)
    prompt, ids = list(range(10, 22)), [41, 17, 2]
    with torch.no_grad():
        ours = completion_logprobs(model, collate([PromptGroup(prompt, [ids])], PAD)).logprobs[0]
        wide, _ = plain_forward(model, prompt, ids)
    assert_close(ours, torch.stack([wide[i, token] for i, token in enumerate(ids)]))


def test_scatter_puts_numbers_in_mask_order() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert scatter(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1, 2, 0], [3, 0, 0]]
