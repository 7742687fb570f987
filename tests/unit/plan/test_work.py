from __future__ import annotations

import pytest

from amenable.plan.rates import Line, Rates
from amenable.plan.work import Work, decoding, longest_micro_batch, stage_work

from .conftest import recipe, rows


def test_decoding_counts_steps_and_lets_finished_sequences_go() -> None:
    """Lengths 1, 1, 3, 4: after the first token two of four are left, at most three quarters, so
    the batch shrinks to 2; the second step reads 2, the third only drops to 1 of 2 and shrinks."""
    assert decoding([1, 1, 3, 4]) == (3, 2 + 2 + 1)


def test_decoding_keeps_a_batch_of_which_few_are_done() -> None:
    """Of 4 sequences one ends at once: 3 of 4 is not more than three quarters; of 5, 4 are."""
    assert decoding([1, 2, 2, 2]) == (1, 3)
    assert decoding([1, 2, 2, 2, 2]) == (1, 5)


def test_sft_by_hand() -> None:
    """10 rows of 16 tokens, twice: 5 steps of 4; two looks at 2 validation rows."""
    config = recipe("sft.epochs=2", "sft.batch_size=4", "sft.evaluations=2")
    work = stage_work("sft", config, rows())
    assert work.optimizer_steps == 5
    assert (work.train_passes, work.train_tokens) == (5, 5 * 4 * 16)
    assert (work.forward_passes, work.forward_tokens) == (2, 2 * 2 * 16)
    assert (work.models_read, work.models_written) == (1, 1)


def test_max_steps_ends_a_stage() -> None:
    config = recipe("sft.epochs=2", "sft.batch_size=4", "sft.max_steps=3")
    assert stage_work("sft", config, rows()).optimizer_steps == 3


def test_reward_by_hand() -> None:
    """Rows of 12 + 4 + 4 tokens: 3 steps of 2; a look at 2; 4 held out; 10 demonstrations of 16."""
    config = recipe("reward.batch_size=2", "reward.evaluations=1")
    work = stage_work("reward", config, rows())
    assert work.train_tokens == 3 * 2 * 20
    assert work.forward_tokens == 2 * 20 + 4 * 20 + 10 * 16


@pytest.mark.parametrize(
    ("settings", "sweeps", "trained"),
    [
        (("policy.algorithm=ppo",), 4, 2),
        (("policy.algorithm=ppo", "policy.ppo.critic=head"), 3, 1),
        (("policy.algorithm=rloo",), 3, 1),
    ],
)
def test_on_policy_by_hand(settings: tuple[str, ...], sweeps: int, trained: int) -> None:
    """Two updates of 4 prompts with 2 samples: rows of 12 + 4 + 4, prompts of 12, 3 more steps."""
    config = recipe(
        *settings,
        "policy.updates=2",
        "policy.prompts_per_update=4",
        "policy.samples_per_prompt=2",
        "policy.epochs=3",
        "policy.minibatches=2",
        "policy.gate=false",
    )
    work = stage_work("policy", config, rows())
    assert work.forward_tokens == 2 * (4 * 12 + sweeps * 4 * 20)
    assert work.train_tokens == 2 * 3 * trained * 4 * 20
    assert work.optimizer_steps == 2 * 3 * 2 * trained
    assert (work.decode_steps, work.decode_tokens) == (2 * 3, 2 * 3 * 8)
    assert work.merges == 2


def test_off_policy_reads_the_reference_once() -> None:
    """6 pairs in 3 steps, one look at 2; the reference reads 8; 20 samples, two looks at them."""
    config = recipe(
        "policy.algorithm=dpo",
        "policy.preference.batch_size=2",
        "policy.preference.evaluations=1",
        "policy.gate=false",
    )
    work = stage_work("policy", config, rows())
    assert work.train_tokens == 3 * 2 * 20
    assert work.forward_tokens == 2 * 20 + 8 * 20 + 20 * 12 + 2 * 20 * 20


def test_evaluation_decodes_every_system() -> None:
    """Base to the limit of 6, the others as long as the data; the judge reads three answers."""
    config = recipe(
        "data.max_completion_tokens=6", "evaluate.diversity_prompts=0", "evaluate.batch_size=8"
    )
    work = stage_work("evaluate", config, rows())
    assert work.decode_tokens == 8 * 5 + 2 * 8 * 3
    assert work.forward_tokens == 3 * 8 * 12 + 8 * (12 + 6 + 4 + 4)


def test_longest_micro_batch_is_within_the_budget() -> None:
    assert longest_micro_batch([(12, 4)], 64, 8) == (4, 16)
    assert longest_micro_batch([(60, 40)], 64, 8) == (1, 100)


def test_seconds_add_up_what_was_counted() -> None:
    line = Line(1.0, 0.5)
    rates = Rates(
        forward=line,
        train=Line(2.0, 0.25),
        decode=Line(0.0, 2.0),
        step_s=3.0,
        merge_s=5.0,
        file_s=7.0,
        startup_s=0.0,
        origin="by hand",
    )
    work = Work(
        forward_passes=2,
        forward_tokens=4,
        train_passes=1,
        train_tokens=8,
        decode_tokens=3,
        optimizer_steps=1,
        merges=2,
        models_read=1,
        fixed_s=0.5,
    )
    assert rates.seconds(work) == (2 + 2) + (2 + 2) + 6 + 3 + 10 + 7 + 0.5


def test_line_goes_through_both_measurements_and_never_below_zero() -> None:
    assert Line.through((10, 2.0), (30, 4.0)) == Line(1.0, 0.1)
    assert Line.through((10, 1.0), (20, 4.0)) == Line(0.0, 0.2)
    assert Line.through((20, 3.0), (10, 3.0)) == Line(3.0, 0.0)
