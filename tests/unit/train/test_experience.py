from __future__ import annotations

import dataclasses
import itertools

import torch

from amenable.train.experience import (
    MicroBatch,
    clustered_error,
    describe,
    episode_groups,
    padded,
    sample_rows,
    unpadded,
)

from .first_update import episode, micro_batch


def minibatches() -> list[list[MicroBatch]]:
    """Two steps: prompts 0 and 1 with completions of 1, 3 and 2 tokens, then prompt 2 with one."""
    first = micro_batch(
        [[episode(0, 1), episode(0, 3)], [episode(1, 2)]],
        [1.0, 3.0, 8.0],
        logprobs=torch.tensor([[0.5, 0.0, 0.0], [0.1, 0.2, 0.3], [1.0, 1.0, 0.0]]),
    )
    second = micro_batch([[episode(2, 2)]], [4.0], logprobs=torch.tensor([[-1.0, 0.6]]))
    return [[first], [second]]


def test_figures_by_hand() -> None:
    """Scores 1, 3, 8, 4; log-ratios sum to 0.5, 0.6, 2.0 and -0.4; 8 tokens. The prompts' means 2,
    8 and 4 have a sample variance of 28 / 3, their mean one of 28 / 9.
    """
    found = describe(minibatches(), None)
    assert found["reward"] == 4.0
    assert abs(found["reward_se"] - (28 / 9) ** 0.5) < 1e-6
    assert abs(found["kl_loss"] - 2.7 / 4) < 1e-6
    assert found["completion_tokens"] == 2.0
    assert found["entropy"] == 0.0
    assert "gold" not in found


def test_one_prompt_has_no_error() -> None:
    assert clustered_error(torch.tensor([1.0, 2.0]), ["p", "p"]) == 0.0


def test_kl_is_that_of_real_tokens() -> None:
    micro = minibatches()[0][0]
    torch.testing.assert_close(micro.sequence_kl, torch.tensor([0.5, 0.6, 2.0]))
    assert micro.kl.shape == micro.batch.mask.shape


def test_groups_are_the_prompts_of_the_micro_batch() -> None:
    """Also where a prompt comes twice in a row."""
    assert minibatches()[0][0].groups() == [slice(0, 2), slice(2, 3)]
    twice = micro_batch([[episode(0), episode(0)], [episode(0), episode(0)]], [0.0] * 4)
    assert twice.groups() == [slice(0, 2), slice(2, 4)]


def test_episodes_by_prompt_keep_their_order() -> None:
    mixed = [episode(1, 1), episode(0, 2), episode(1, 3)]
    assert episode_groups(mixed) == [(mixed[0], mixed[2]), (mixed[1],)]


def test_padding_can_be_undone() -> None:
    (first,), (second,) = minibatches()
    parts = [first.logprobs, second.logprobs]
    wide = padded(parts, fill=7.0)
    assert wide.shape == (4, 3)
    assert wide[3].tolist() == [-1.0, 0.6000000238418579, 7.0]
    for part, back in zip(parts, unpadded(wide, [first, second]), strict=True):
        assert torch.equal(part, back)
    assert padded([torch.ones(1, 1).bool(), torch.ones(1, 2).bool()], False).tolist() == [
        [True, False],
        [True, True],
    ]


def test_samples_are_the_episodes_with_their_figures() -> None:
    rows = sample_rows(minibatches(), 7, None, 10)
    assert [row["score"] for row in rows] == [1.0, 3.0, 8.0, 4.0]
    assert [row["completion"] for row in rows] == ["a", "abc", "ab", "ab"]
    assert {row["step"] for row in rows} == {7}
    assert {row["ended"] for row in rows} == {True}
    assert abs(float(str(rows[2]["kl"])) - 2.0) < 1e-6


def test_samples_are_ten_and_spread_over_the_batch() -> None:
    """Of 12, 19, 20 and 64 episodes: ten of them, the gaps alike, the last tenth not missed."""
    for count in (12, 19, 20, 64):
        micro = micro_batch([[episode(n)] for n in range(count)], [float(n) for n in range(count)])
        found = [int(float(str(row["score"]))) for row in sample_rows([[micro]], 0, None, 10)]
        assert len(set(found)) == 10
        gaps = {b - a for a, b in itertools.pairwise(found)}
        assert max(gaps) - min(gaps) <= 1
        assert found[-1] >= 0.85 * count


def test_what_the_engine_says_is_held_against_the_trainer() -> None:
    """Differences 0.1, -0.1 and 0.3 over three tokens: mean 0.1, mean square 0.11 / 3."""
    logprobs = torch.tensor([[-1.0, 0.0], [-2.0, -3.0]])
    micro = micro_batch([[episode(0, 1)], [episode(1, 2)]], [0.0, 0.0], logprobs=logprobs)
    assert "engine_gap" not in describe([[micro]], None)
    said = logprobs - torch.tensor([[0.1, 7.0], [-0.1, 0.3]])
    found = describe([[dataclasses.replace(micro, sampler_logprobs=said)]], None)
    assert abs(found["engine_kl"] - -0.1) < 1e-6, "the engine's less the trainer's"
    assert abs(found["engine_gap"] - (0.11 / 3) ** 0.5) < 1e-6, (
        "what is off the mask does not count"
    )
    told = dataclasses.replace(micro, sampler_logprobs=micro.ref_logprobs)
    found = describe([[told]], None, of_reference=True)
    assert found["engine_gap"] == 0, "the reference drew the samples"
