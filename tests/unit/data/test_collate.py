from __future__ import annotations

from collections import Counter

import pytest
import torch

from amenable.data.collate import (
    PromptGroup,
    Span,
    collate,
    micro_batches,
    packs,
    seeded_epochs,
)

PAD = 99
GROUPS = [PromptGroup([10, 11], [[1, 2, 3], [4]]), PromptGroup([20], [[5, 6]])]


def test_rows_are_laid_out_as_drawn_by_hand() -> None:
    """Row 0: prompt 10 11, completion 1 2 3, completion 4. Row 1: prompt 20, completion 5 6.

    Completion 4 follows the prompt (positions 0 and 1), so its position is 2 and the state that
    predicts it is the prompt's last, in column 1, although it stands in column 5.
    """
    batch = collate(GROUPS, PAD)
    assert batch.input_ids.tolist() == [[10, 11, 1, 2, 3, 4], [20, 5, 6, PAD, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2], [0, 1, 2, 0, 0, 0]]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.targets.tolist() == [[1, 2, 3], [4, PAD, PAD], [5, 6, PAD]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    sources = [row[keep].tolist() for row, keep in zip(batch.sources, batch.mask, strict=True)]
    assert sources == [[1, 2, 3], [1], [0, 1]]
    assert batch.last.tolist() == [4, 5, 2]


def test_attention_is_causal_and_no_completion_sees_another() -> None:
    batch = collate(GROUPS, PAD)
    assert batch.attention_mask is not None
    assert batch.attention_mask.shape == (2, 1, 6, 6)
    first, second = (
        ["".join(".x"[int(sees)] for sees in row) for row in mask[0]]
        for mask in batch.attention_mask
    )
    assert first == ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xx...x"]
    assert second[:3] == ["x.....", "xx....", "xxx..."]
    assert all("x" in row for row in second[3:]), "a padding column that sees nothing gives NaN"


def test_rows_of_one_completion_need_no_mask() -> None:
    batch = collate([PromptGroup([1], [[2, 3]]), PromptGroup([4, 5], [[6]])], PAD)
    assert batch.attention_mask is None
    assert batch.to(torch.device("cpu")).attention_mask is None
    assert batch.to(torch.device("meta")).input_ids.device.type == "meta"


@pytest.mark.parametrize("completions", [[], [[1], []]])
def test_group_without_completion_tokens_is_refused(completions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one completion and none without tokens"):
        PromptGroup([1], completions)


def test_group_without_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt has no tokens"):
        PromptGroup([], [[1]])


def test_micro_batches_by_hand() -> None:
    """Longest first: 9 alone; two rows of 4 make 8, a third would make 12; so 1 is alone."""
    assert micro_batches([4, 9, 1, 4], max_tokens=10) == [[1], [0, 3], [2]]
    assert micro_batches([30, 2], max_tokens=10) == [[0], [1]], "too long: a batch of its own"
    assert micro_batches([], max_tokens=10) == []
    assert micro_batches([10, 10, 9, 8, 8], max_tokens=50) == [[0, 1, 2], [3, 4]]


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = torch.randint(1, 40, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = micro_batches(lengths, max_tokens=100)
    assert sorted(i for batch in batches for i in batch) == list(range(57))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 100 for batch in batches)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_packs_by_hand() -> None:
    """Longest first, each where there is room: 9 + 1, 6 + 4; 30 has no room anywhere."""
    assert packs([4, 9, 1, 6], max_tokens=10) == [[1, 2], [3, 0]]
    assert packs([30, 2], max_tokens=10) == [[0], [1]]
    assert packs([], max_tokens=10) == []


def test_a_group_counts_its_prompt_and_all_completions() -> None:
    assert [group.tokens for group in GROUPS] == [6, 3]


def test_spans_by_hand() -> None:
    """Two completions: the prompt and each of them; one completion: a single text."""
    batch = collate([PromptGroup([1, 2], [[3], [4, 5]]), PromptGroup([6], [[7, 8]])], PAD)
    assert batch.spans == (Span(0, 2), Span(2, 3, 0, 2), Span(3, 5, 0, 2), Span(5, 8))
    assert batch.input_ids.flatten()[batch.real].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_every_pass_is_a_new_permutation() -> None:
    order = list(seeded_epochs(7, 2.5, seed=3))
    assert len(order) == 18  # 2.5 passes are 17.5 rows; round(17.5) is the even 18
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]
    assert max(Counter(order[14:]).values()) == 1
    assert order == list(seeded_epochs(7, 2.5, seed=3))
    assert order != list(seeded_epochs(7, 2.5, seed=4))


def test_a_shorter_run_begins_like_a_longer_one() -> None:
    assert list(seeded_epochs(5, 3, seed=1))[:10] == list(seeded_epochs(5, 2, seed=1))
    assert list(seeded_epochs(5, 0, seed=1)) == []
