"""Packed attention against a plain softmax over masked scores, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amenable.data.collate import PromptGroup, Span, collate
from amenable.models import logprobs
from amenable.models.packed_attention import Layout, packed_attention

from .conftest import build

SPANS = (
    Span(0, 170),
    Span(170, 190),
    *(Span(190, 193, 170, 190), Span(193, 333, 170, 190)),
    *(Span(333, 341, 170, 190), Span(341, 348, 170, 190), Span(348, 356, 170, 190)),
    *(Span(356, 366), Span(366, 375)),
    *(Span(375, 378), Span(378, 379, 375, 378), Span(379, 381, 375, 378)),
    *(Span(381, 383), Span(383, 386, 381, 383), Span(386, 387, 381, 383)),
    *(Span(387, 391), Span(391, 393, 387, 391)),
)
"""A text that is read in parts; a prompt with five completions, one of them read in parts too; two
short texts alone; short prompts of 3, 2 and 4 tokens with two, two and one completions."""
TOKENS = 393


def rows(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, 6, 16), (TOKENS, 2, 16), (TOKENS, 2, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Every score, with those of other texts and later tokens hidden."""
    allowed = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for span in SPANS:
        for row in range(span.start, span.end):
            allowed[row, span.start : row + 1] = True
            allowed[row, span.prefix_start : span.prefix_end] = True
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(3, 0) for x in (key, value))
    scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_values_and_gradients_are_those_of_a_masked_softmax(
    dtype: torch.dtype, bound: float
) -> None:
    """bfloat16: within the rounding of its inputs' size, 2**-8."""
    given = rows(dtype)
    wanted = [x.detach().double().requires_grad_() for x in given]
    ours, theirs = packed_attention(*given, Layout(SPANS), 0.3), plain(*wanted, 0.3)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert error(ours, theirs) < bound
    grads = torch.autograd.grad(ours, given, weights)
    for own, their in zip(
        grads, torch.autograd.grad(theirs, wanted, weights.double()), strict=True
    ):
        assert error(own, their) < bound


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_texts_of_like_length_are_read_together() -> None:
    """Behind one prompt, behind several with as many each, and alone; a long text in parts."""
    bundles = Layout(SPANS).bundles
    sizes = [([t.end - t.start for t in own.texts], own.prompts, own.shared) for own in bundles]
    alone = [([170], 1, 0), ([20], 1, 0), ([10, 9, 4, 3, 2], 1, 0)]
    behind = [([140], 1, 20), ([8, 8, 7, 3], 1, 20), ([3, 1, 2, 1], 2, 3), ([2], 1, 4)]
    assert sorted(sizes) == sorted(alone + behind)
    parts = {own.length: [part.stop - part.start for part in own.parts] for own in bundles}
    assert parts == {2: [2], 3: [3], 8: [8], 10: [10], 20: [20], 140: [70, 70], 170: [57, 57, 56]}


@pytest.mark.parametrize(("text", "prompts"), [(200, [1, 1]), (100, [2])])
def test_large_texts_of_several_prompts_are_read_prompt_by_prompt(
    text: int, prompts: list[int]
) -> None:
    """Two times 200 x (200 + 100) scores would leave the cache, two times 100 x (100 + 100) not."""
    size, spans = 100 + text, []
    for start in (0, size):
        spans += [Span(start, start + 100), Span(start + 100, start + size, start, start + 100)]
    assert [own.prompts for own in Layout(spans).bundles if own.shared] == prompts


def test_gradcheck() -> None:
    spans = (Span(0, 3), Span(3, 4, 0, 3), Span(4, 6, 0, 3))
    given = [x[:6, :, :3].detach().requires_grad_() for x in rows(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, Layout(spans), 0.5), given)


GROUPS = [
    PromptGroup([5, 9, 300, 4], [[41, 17, 2], [8], [260, 77, 12, 2]]),
    PromptGroup([7], [[3, 3]]),
    PromptGroup([11, 12], [[30], [31]]),
]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPTNeoX"])
def test_packed_rows_are_the_padded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states at every real token, and the same gradient."""
    model = build(name)
    batch = collate(GROUPS, 0)
    assert logprobs.reads_packed_rows(model)
    found = []
    for packed in (True, False):
        monkeypatch.setattr(logprobs, "reads_packed_rows", lambda model, on=packed: on)
        model.zero_grad()
        values = logprobs.completion_logprobs(model, batch).logprobs
        values.sum().backward()
        found.append((values.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
