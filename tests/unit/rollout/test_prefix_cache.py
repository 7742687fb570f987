from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from amenable.models.packed_attention import attends_plainly
from amenable.rollout import lean_llama, prefix_cache, transformers_engine
from amenable.rollout.prefix_cache import CacheShape, PrefixCache
from amenable.rollout.transformers_engine import Decoding, TransformersEngine

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
BATCH = {tuple(range(8, 22)): [1, 2, 3], (9, 8, 7, 6): [6], (5, 6, 7): [0], (30,): [4, 5]}
"""Prompts with their samples."""


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def expected(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """[B, V] logits after each text, read alone from its start."""
    rows = [model(torch.tensor([list(text)])).logits[0, -1] for text in texts]
    return torch.stack(rows)


def opened(model: PreTrainedModel, room: int = 6) -> tuple[TransformersEngine, Decoding]:
    engine = TransformersEngine(model, eos_ids=frozenset({1}), pad_id=0)
    return engine, engine.prefill(BATCH, room)


@pytest.mark.parametrize("budget", [2048, 14, 1])
@pytest.mark.parametrize("bytes_of_a_group", [0, 1_000_000])
@pytest.mark.parametrize(
    ("family", "lean"),
    [
        ("Llama", True),
        ("Llama", False),
        ("Qwen2", True),
        ("Qwen2", False),
        ("Qwen3", True),
        ("Qwen3", False),
        ("GPTNeoX", False),
        ("GPT2", False),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_every_text_alone(
    monkeypatch: pytest.MonkeyPatch, family: str, lean: bool, bytes_of_a_group: int, budget: int
) -> None:
    """Also where prompts are read in several passes, and after samples have left."""
    monkeypatch.setitem(transformers_engine._PREFILL_TOKENS, "cpu", budget)
    monkeypatch.setattr(prefix_cache, "_GROUP_BYTES", bytes_of_a_group)
    engine = TransformersEngine(model := random_model(family), eos_ids=frozenset({1}), pad_id=0)
    if not lean:
        monkeypatch.setattr(transformers_engine, "is_lean", lambda model: False)
    with engine.running():
        assert (engine._lean is not None) == lean
        check_logits(engine, engine.prefill(BATCH, 6), model)


@torch.no_grad()
def test_a_processor_without_bfloat16_products_multiplies_plain_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN refuses to lay out bfloat16 weights there."""
    monkeypatch.setattr(lean_llama, "_lays_out", lambda dtype: False)
    engine = TransformersEngine(model := random_model("Llama"), eos_ids=frozenset({1}), pad_id=0)
    with engine.running():
        check_logits(engine, engine.prefill(BATCH, 6), model)


def check_logits(engine: TransformersEngine, decoding: Decoding, model: PreTrainedModel) -> None:
    """Step by step, while samples leave, against whole texts."""
    assert isinstance(decoding.cache, PrefixCache)
    texts = [list(prompt) for prompt, samples in BATCH.items() for _ in samples]
    draw = torch.Generator().manual_seed(1)
    for keep in ([0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 5], [1, 2, 3], [0, 2], [1]):
        decoding.select(torch.tensor(keep))
        texts = [texts[row] for row in keep]
        tokens = torch.randint(2, 64, (len(keep),), generator=draw)
        engine.advance(decoding, tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
        torch.testing.assert_close(decoding.logits, expected(model, texts), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sequences_of_other_lengths_go_on_together() -> None:
    model = random_model("Llama")
    engine, decoding = opened(model)
    decoding.select(torch.tensor([1, 4]))
    engine.advance(decoding, torch.tensor([3, 4]))
    decoding.extend(engine.prefill({(40, 41): [0, 1]}, 3))
    engine.advance(decoding, torch.tensor([5, 6, 7, 8]))
    decoding.select(torch.tensor([1, 2]))
    engine.advance(decoding, torch.tensor([9, 10]))
    texts = [[5, 6, 7, 4, 6, 9], [40, 41, 7, 10]]
    torch.testing.assert_close(decoding.logits, expected(model, texts), rtol=1e-4, atol=1e-4)


def test_prompts_must_come_longest_first() -> None:
    engine, _ = opened(random_model("Llama"))
    with pytest.raises(ValueError, match="longest first"):
        engine.prefill({(1,): [0], (1, 2): [1]}, 3)


@torch.no_grad()
def test_a_prompts_keys_are_held_once_and_go_with_its_last_sample() -> None:
    _, decoding = opened(random_model("Llama"))
    assert isinstance(decoding.cache, PrefixCache)
    (group,) = decoding.cache._groups
    assert [keys.shape for keys in group.keys] == [(4, 2, 14, 8)] * 3
    assert [keys.shape for keys in group.own_keys] == [(7, 2, 6, 8)] * 3
    decoding.select(torch.tensor([0, 2, 6]))
    (group,) = decoding.cache._groups
    assert [keys.shape for keys in group.keys] == [(2, 2, 14, 8)] * 3


@torch.no_grad()
def test_the_only_sample_of_a_prompt_goes_on_behind_it() -> None:
    engine, _ = opened(random_model("Llama"))
    decoding = engine.prefill({(4, 5, 6): [0], (7,): [1]}, 6)
    assert isinstance(decoding.cache, PrefixCache)
    (group,) = decoding.cache._groups
    assert [keys.shape for keys in group.keys] == [(2, 2, 3 + 6, 8)] * 3
    assert not group.own_keys


@torch.no_grad()
def test_prompts_of_other_lengths_carry_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading it would take longer than a group of their own, which leaves with them."""
    monkeypatch.setattr(prefix_cache, "_GROUP_BYTES", 0)
    _, decoding = opened(random_model("Llama"))
    assert isinstance(decoding.cache, PrefixCache)
    assert [group.width for group in decoding.cache._groups] == [14, 4, 3, 1]
    assert [len(group.prompts) for group in decoding.cache._groups] == [3, 1, 1, 2]
    decoding.select(torch.tensor([3, 5]))
    assert [group.width for group in decoding.cache._groups] == [4, 1]


@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    model = random_model("Llama")
    before = model(torch.tensor([[5, 6, 7]])).logits
    engine, decoding = opened(model)
    engine.advance(decoding, torch.full((7,), 3))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {}),
        ("Mistral", {"sliding_window": 8}),
        ("Llama", {"attn_implementation": "eager"}),
    ],
)
def test_other_kinds_of_attention_keep_their_own_cache(
    family: str, changes: dict[str, Any]
) -> None:
    model = random_model(family, **changes)
    assert not attends_plainly(model)
    assert not isinstance(opened(model)[1].cache, PrefixCache)
    assert attends_plainly(random_model("Mistral", sliding_window=None))


@pytest.mark.parametrize("samples", [[0, 1, 2], [0, 0, 1, 2, 2, 2]])
@pytest.mark.parametrize("bytes_of_a_group", [0, 1_000_000])
def test_bfloat16_keys_are_read_in_float32(
    monkeypatch: pytest.MonkeyPatch, samples: list[int], bytes_of_a_group: int
) -> None:
    """The same as a float32 cache of the same rounded numbers: no score is rounded again."""
    monkeypatch.setattr(prefix_cache, "_GROUP_BYTES", bytes_of_a_group)
    draw = torch.Generator().manual_seed(0)
    lengths, device = [9, 7, 3], torch.device("cpu")
    caches = [
        PrefixCache(lengths, torch.tensor(samples), 4, CacheShape(2, 2, 8, device, dtype))
        for dtype in (torch.bfloat16, torch.float32)
    ]

    def rounded(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).bfloat16().float()

    for prompt, length in enumerate(lengths):
        for layer in range(2):
            keys, values = rounded(2, length, 8), rounded(2, length, 8)
            for cache in caches:
                cache.fill(prompt, layer, keys, values)
    for _ in range(3):
        for layer in range(2):
            keys, values = (rounded(len(samples), 2, 8) for _ in range(2))
            query = torch.randn((len(samples), 6, 8), generator=draw)
            half, full = (
                (cache.write(layer, keys, values), cache.attend(query, 0.3))[1] for cache in caches
            )
            torch.testing.assert_close(half, full, rtol=1e-5, atol=1e-6)
