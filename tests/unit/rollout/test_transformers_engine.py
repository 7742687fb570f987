from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from amenable.artifacts import StageContext
from amenable.data.collate import PromptGroup, collate
from amenable.models.build import Foundation
from amenable.rollout.transformers_engine import (
    RolloutCopy,
    TransformersEngine,
    draw_tokens,
    engine_for,
)
from amenable.rollout.types import Request, Rollout, Sampling

MakeContext = Callable[..., StageContext]
PROMPTS = [
    tuple(range(5, 5 + size))
    for size in (3, 9, 9, 1, 14, 6)  # the second and third are equal
]
PAD = 0
NEVER = frozenset({511})
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": PAD,
}


@pytest.fixture(scope="module")
def model(tiny: Path) -> PreTrainedModel:
    """The tiny model with larger weights: its greedy answers do not stand still."""
    loaded = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "embed" not in name and parameter.dim() > 1:
                parameter.mul_(8.0)
    return loaded.eval()


def engine(
    model: PreTrainedModel, eos: frozenset[int] = NEVER, batch_size: int = 64
) -> TransformersEngine:
    return TransformersEngine(model, eos_ids=eos, pad_id=PAD, batch_size=batch_size)


def requests(prompts: Sequence[tuple[int, ...]] = PROMPTS, samples: int = 1) -> list[Request]:
    return [Request(ids, (0, i, k)) for i, ids in enumerate(prompts) for k in range(samples)]


def alone(
    model: PreTrainedModel, prompt: Sequence[int], length: int, eos: Sequence[int]
) -> list[int]:
    """transformers' own greedy answer to one prompt."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=list(eos),
        pad_token_id=PAD,
    )
    return list(output[0, len(prompt) :].tolist())


def several_ends(model: PreTrainedModel, length: int) -> frozenset[int]:
    """Two tokens that end some of the greedy answers early, at different places."""
    free = [alone(model, prompt, length, [511]) for prompt in PROMPTS]
    return frozenset({free[0][2], free[4][5]})


def test_greedy_equals_transformers_for_ragged_prompts_and_several_ends(
    model: PreTrainedModel,
) -> None:
    eos = several_ends(model, 12)
    found = engine(model, eos).generate(requests(), Sampling(max_new_tokens=12, temperature=0.0))
    for prompt, rollout in zip(PROMPTS, found, strict=True):
        expected = alone(model, prompt, 12, sorted(eos))
        assert list(rollout.completion_ids) == expected
        assert rollout.prompt_ids == prompt
        assert rollout.ended == (expected[-1] in eos)
    lengths = {len(rollout.completion_ids) for rollout in found}
    assert len(lengths) > 1, "some must end early for the test to mean anything"
    assert len({rollout.completion_ids for rollout in found}) > 3


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Mistral", "GPTNeoX", "GPT2"])
def test_greedy_equals_transformers_for_other_architectures(family: str) -> None:
    lm = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**SIZES)
    torch.manual_seed(1)
    other = getattr(transformers, lm)(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    found = engine(other).generate(requests(), Sampling(max_new_tokens=6, temperature=0.0))
    for prompt, rollout in zip(PROMPTS, found, strict=True):
        assert list(rollout.completion_ids) == alone(other, prompt, 6, [511])


def sampled(model: PreTrainedModel, batch_size: int, asked: Sequence[Request]) -> list[Rollout]:
    return engine(model, several_ends(model, 8), batch_size).generate(
        asked, Sampling(max_new_tokens=8, temperature=1.0)
    )


def test_samples_do_not_depend_on_batching(model: PreTrainedModel) -> None:
    asked = requests(samples=3)
    whole = sampled(model, 64, asked)
    assert len({rollout.completion_ids for rollout in whole}) == len(asked)
    for batch_size in (1, 3):
        assert sampled(model, batch_size, asked) == whole
    assert [sampled(model, 64, [request])[0] for request in asked[4:8]] == whole[4:8]


def test_samples_do_not_depend_on_the_order_of_requests(model: PreTrainedModel) -> None:
    asked = requests(samples=3)
    order = np.random.default_rng(0).permutation(len(asked))
    shuffled = sampled(model, 5, [asked[i] for i in order])
    assert shuffled == [sampled(model, 64, asked)[i] for i in order]


class Listening:
    """A model that remembers the shapes it was given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.config, self.device = model.config, model.device
        self._supports_attention_backend = model._supports_attention_backend
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, **inputs: Any) -> Any:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return self._model(**inputs)


def test_finished_sequences_leave_and_equal_prompts_are_encoded_once(
    model: PreTrainedModel,
) -> None:
    ears: Any = Listening(model)
    first = {alone(model, prompt, 1, [511])[0] for prompt in PROMPTS[:4]}
    found = engine(ears, frozenset(first)).generate(
        requests(samples=2), Sampling(max_new_tokens=5, temperature=0.0)
    )
    unfinished = sum(len(rollout.completion_ids) > 1 for rollout in found)
    assert ears.shapes[0] == (5, 14), "five different prompts, padded to the longest"
    assert 0 < unfinished <= 4
    assert ears.shapes[1] == (unfinished, 1)
    assert [rows for rows, _ in ears.shapes[1:]] == sorted(
        (rows for rows, _ in ears.shapes[1:]), reverse=True
    )


def test_waiting_prompts_enter_where_others_have_ended(model: PreTrainedModel) -> None:
    ears: Any = Listening(model)
    asked = requests([(n, n + 1) for n in range(40)])
    sampling, eos = Sampling(max_new_tokens=8, temperature=1.0), frozenset(range(0, 512, 3))
    found = engine(ears, eos, 8).generate(asked, sampling)
    assert found == engine(model, eos).generate(asked, sampling)
    kinds = ["prompts" if width > 1 else "step" for _, width in ears.shapes]
    assert kinds[1] == "step"
    assert kinds.count("prompts") > 1
    batches = [found[start : start + 8] for start in range(0, len(found), 8)]  # of one length
    one_by_one = sum(max(len(r.completion_ids) for r in batch) - 1 for batch in batches)
    assert kinds.count("step") < one_by_one
    assert max(rows for rows, width in ears.shapes if width == 1) == 8


def test_what_ended_leaves_when_its_room_is_used_up(model: PreTrainedModel) -> None:
    """8 samples end after 3 tokens, 2 after 5; the 8 that enter then are not done after 8.

    The 2 are too few to be worth a copy, and none of the batch has the most tokens at that time.
    """
    prompts = [(n, n + 1) for n in range(5, 40)]
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    texts = [r.completion_ids for r in engine(model).generate(requests(prompts), sampling)]

    def ends(text: Sequence[int], eos: set[int]) -> int:
        return next((place for place, token in enumerate(text, 1) if token in eos), 9)

    early, middle, late = next(
        (a, b, c)
        for a, b, c in itertools.permutations(range(len(prompts)), 3)
        if max(a, b) < c  # those of one length enter in their order
        and [ends(texts[n], {texts[a][2], texts[b][4]}) for n in (a, b, c)] == [3, 5, 9]
    )
    eos = frozenset({texts[early][2], texts[middle][4]})
    asked = [
        Request(prompts[n], (n, k))
        for n, samples in ((early, 8), (middle, 2), (late, 8))
        for k in range(samples)
    ]
    found = engine(model, eos, 10).generate(asked, sampling)
    assert [len(r.completion_ids) for r in found] == [3] * 8 + [5] * 2 + [8] * 8
    assert [r.completion_ids for r in found[-8:]] == [texts[late]] * 8


def test_nothing_is_decoded_after_the_last_end(model: PreTrainedModel) -> None:
    ears: Any = Listening(model)
    everything = frozenset(range(512))
    found = engine(ears, everything).generate(requests(), Sampling(max_new_tokens=9))
    assert [len(rollout.completion_ids) for rollout in found] == [1] * len(PROMPTS)
    assert all(rollout.ended for rollout in found)
    assert len(ears.shapes) == 1


def test_a_cut_completion_has_not_ended(model: PreTrainedModel) -> None:
    found = engine(model).generate(requests(), Sampling(max_new_tokens=4))
    assert {len(rollout.completion_ids) for rollout in found} == {4}
    assert not any(rollout.ended for rollout in found)


def test_progress_hears_of_every_request_once(model: PreTrainedModel) -> None:
    heard: list[int] = []
    asked = requests(samples=2)
    engine(model, batch_size=4).generate(asked, Sampling(max_new_tokens=1), heard.append)
    assert sum(heard) == len(asked)
    assert max(heard) <= 4
    assert engine(model).generate([], Sampling(max_new_tokens=1)) == []


# --- drawing tokens ----------------------------------------------------------------------------

DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])


def frequencies(sampling: Sampling) -> Tensor:
    noise = torch.from_numpy(np.random.default_rng(5).random(DRAWS))
    tokens = draw_tokens(LOGITS.expand(DRAWS, -1), sampling, noise)
    return torch.bincount(tokens, minlength=len(LOGITS))


def assert_frequencies(found: Tensor, weights: Sequence[float]) -> None:
    """Chi-square test against relative weights; a weight of 0 must never be drawn."""
    expected = np.array(weights) / sum(weights)
    assert found[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(found.numpy()[kept], DRAWS * expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    weights = np.exp(LOGITS.numpy().astype(float) / temperature)
    assert_frequencies(
        frequencies(Sampling(max_new_tokens=1, temperature=temperature)), weights.tolist()
    )


def test_top_k_keeps_the_k_most_probable() -> None:
    """e^2, e^1 and e^0.5 are the three largest weights."""
    found = frequencies(Sampling(max_new_tokens=1, top_k=3))
    assert_frequencies(found, [np.e**2, np.e, 0, 0, np.e**0.5, 0])
    assert_frequencies(frequencies(Sampling(max_new_tokens=1, top_k=1)), [1, 0, 0, 0, 0, 0])
    every = frequencies(Sampling(max_new_tokens=1, top_k=99))
    assert torch.equal(every, frequencies(Sampling(max_new_tokens=1)))


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    """Weights 7.39 2.72 1 0.37 1.65 0.05, sum 13.17: shares 0.561 0.206 0.076 0.028 0.125 0.004.

    The first reaches 0.56; the first two 0.767, which is less than 0.8; so 0.8 needs the third
    in order, the token of 1.65.
    """
    assert_frequencies(frequencies(Sampling(max_new_tokens=1, top_p=0.5)), [1, 0, 0, 0, 0, 0])
    assert_frequencies(
        frequencies(Sampling(max_new_tokens=1, top_p=0.7)), [np.e**2, np.e, 0, 0, 0, 0]
    )
    assert_frequencies(
        frequencies(Sampling(max_new_tokens=1, top_p=0.8)), [np.e**2, np.e, 0, 0, np.e**0.5, 0]
    )


def drawn(probabilities: Sequence[float], *noise: float) -> list[int]:
    logits = torch.tensor(probabilities).log()
    return draw_tokens(
        logits.expand(len(noise), -1),
        Sampling(max_new_tokens=1),
        torch.tensor(noise, dtype=torch.float64),
    ).tolist()


def test_inverse_transform_by_hand() -> None:
    """Cumulative 0.25, 0.5, 1: the first that exceeds the noise."""
    assert drawn([0.25, 0.25, 0.5], 0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999) == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_impossible_tokens_are_never_drawn_at_the_edges() -> None:
    largest = 1 - 2.0**-53  # of the uniform numbers
    assert drawn([0.0, 0.5, 0.5, 0.0], 0.0, largest) == [1, 2]
    assert drawn([0.0, 1.0, 0.0], 0.0, 0.5, largest) == [1, 1, 1]


def test_temperature_zero_ignores_the_noise() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    greedy = Sampling(max_new_tokens=1, temperature=0.0)
    assert draw_tokens(logits, greedy, torch.tensor([0.0, 0.999])).tolist() == [1, 1]


def test_extreme_logits_are_drawn_without_nan() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    cold = Sampling(max_new_tokens=1, temperature=1e-3)
    assert draw_tokens(logits, cold, torch.tensor([0.7])).tolist() == [0]


# --- weights for roll-outs ---------------------------------------------------------------------

BATCH = collate([PromptGroup([5, 9, 300], [[41, 17, 2], [8, 260]])], PAD)


@pytest.mark.parametrize("lora", [True, False])
def test_copy_says_what_the_role_says_and_leaves_it_alone(
    make_context: MakeContext, lora: bool
) -> None:
    foundation = Foundation.open(make_context("policy", lora__enabled=lora).recipe)
    policy = foundation.role("policy")
    copy = RolloutCopy(policy)
    ids = torch.tensor([[5, 9, 300, 41, 17]])

    def difference() -> float:
        with torch.no_grad(), policy.active() as live:
            wanted = live(ids).logits
            return float((copy.model(ids).logits - wanted).abs().max())

    assert difference() < 1e-6, "before any training the copy is the role"
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        before = {key: tensor.clone() for key, tensor in policy.model.state_dict().items()}
        if lora:
            assert difference() > 1e-3, "weights are taken over by sync alone"
        assert copy.sync() is copy.model
        assert difference() < 1e-4
        after = policy.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (copy.model is policy.plain) == (not lora)
    assert not any("lora" in name for name, _ in copy.model.named_modules())


def test_without_a_copy_the_adapter_samples_on_the_shared_base(make_context: MakeContext) -> None:
    """The same tokens as merged weights, whatever adapter was switched on before."""
    foundation = Foundation.open(make_context("policy", lora__enabled=True).recipe)
    policy, other = foundation.role("policy"), foundation.role("other")
    generator = torch.Generator().manual_seed(0)
    for role in (policy, other):
        with torch.no_grad():
            for parameter in role.trainable_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    requests = [Request((5, 9, 300), ("seed", n)) for n in range(4)]
    found = []
    for merged in (True, False):
        copy = RolloutCopy(policy, merged=merged)
        assert (copy.model is policy.plain) == (not merged)
        copy.sync()
        with other.active():
            pass
        found.append(
            copy.engine(foundation.renderer).generate(requests, Sampling(max_new_tokens=8))
        )
    assert found[0] == found[1]
    bare = RolloutCopy(foundation.role("reference", train=False), merged=False)
    assert (
        bare.engine(foundation.renderer).generate(requests, Sampling(max_new_tokens=8)) != found[0]
    )


def test_engine_for_uses_the_runs_ends_and_pad(make_context: MakeContext, tiny: Path) -> None:
    foundation = Foundation.open(make_context("evaluate").recipe)
    found = engine_for(tiny, foundation, batch_size=7)
    assert (found.eos_ids, found.pad_id, found._batch_size) == (frozenset({2}), 0, 7)
