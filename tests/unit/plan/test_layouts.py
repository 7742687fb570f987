from __future__ import annotations

import pytest

from amenable.plan.layouts import Layout, Links, Spread, spread
from amenable.plan.shape import ModelShape

from .conftest import machine, recipe, rows

EVERY_WEIGHT = "model.lora.enabled=false"
UPDATE = (
    "policy.prompts_per_update=8",
    "policy.samples_per_prompt=2",
    "policy.epochs=3",
    "policy.minibatches=2",
    "policy.micro_batch_tokens=20",
)
"""16 episodes of 4 tokens, each pair of them a micro-batch of its own."""


def of(
    shape: ModelShape, layout: Layout, ranks: int, *settings: str, links: Links | None = None
) -> Spread:
    return spread(recipe(*UPDATE, *settings), shape, rows(), machine(), layout, ranks, links)


def test_one_rank_sends_nothing(tiny_shape: ModelShape) -> None:
    alone = of(tiny_shape, Layout(name="replicated"), 1)
    assert not sum(alone.sent.values())
    assert alone.seconds["waiting"] == 0


def test_replicas_send_gradients_by_hand(tiny_shape: ModelShape) -> None:
    """Policy and critic step 3 × 2 times each; a ring of 4 sends twice 3/4 of the adapter."""
    found = of(tiny_shape, Layout(name="replicated"), 4)
    assert found.sent["summed gradients"] == 12 * 2 * 0.75 * 4 * tiny_shape.adapter(16)
    assert found.sent["roll-outs"] == 0.75 * 16 * 4 * 8
    assert found.sent["results"] == 2 * 0.75 * 16 * (4 * 16 + 4)
    assert set(found.sent) == {"summed gradients", "roll-outs", "results"}


def test_shards_send_weights_by_hand(tiny_shape: ModelShape) -> None:
    """Of 8 prompts each of 4 ranks has 2, one a minibatch: 2 × 4 looks, 2 × 3 × 2 passes; all of
    it in fp32 on this recipe."""
    found = of(tiny_shape, Layout(name="sharded", shards=0), 4, EVERY_WEIGHT)
    size = 4 * tiny_shape.parameters
    assert found.sent["weights"] == 0.75 * size * (8 + 2 * 12)
    assert found.sent["scattered gradients"] == 0.75 * size * 12
    assert found.sent["roll-out copy"] == 0.75 * size
    assert "summed gradients" not in found.sent


def test_groups_of_shards_sum_their_part_between_hosts(tiny_shape: ModelShape) -> None:
    """Two groups of 2: half of the weights each, summed over 2 groups 12 times."""
    found = of(tiny_shape, Layout(name="by host", shards=2), 4, EVERY_WEIGHT)
    size = 4 * tiny_shape.parameters
    assert found.sent["summed gradients"] == 0.5 * (size / 2) * 2 * 12
    assert found.sent["scattered gradients"] == 0.5 * size * 12


def test_shards_divide_what_is_kept_and_hold_a_copy_to_sample(tiny_shape: ModelShape) -> None:
    whole = of(tiny_shape, Layout(name="replicated"), 4, EVERY_WEIGHT)
    cut = of(tiny_shape, Layout(name="sharded", shards=0), 4, EVERY_WEIGHT)
    for name in ("weights", "Adam's moments"):
        assert cut.memory[name] == whole.memory[name] / 4
    assert cut.memory["roll-out copy"] == 4 * tiny_shape.parameters
    shared = of(tiny_shape, Layout(name="engine", shards=0, engine=2), 4, EVERY_WEIGHT)
    assert shared.memory["roll-out copy"] == 2 * tiny_shape.parameters


def test_more_ranks_than_prompts_do_not_help(tiny_shape: ModelShape) -> None:
    eight = of(tiny_shape, Layout(name="replicated"), 8)
    many = of(tiny_shape, Layout(name="replicated"), 64)
    for phase in ("sampling", "measuring", "learning"):
        assert many.seconds[phase] == eight.seconds[phase]
    assert many.card_hours > 7 * eight.card_hours


def test_only_what_no_pass_hides_is_waited_for(tiny_shape: ModelShape) -> None:
    layout = Layout(name="sharded", shards=0)
    quick = of(tiny_shape, layout, 4, EVERY_WEIGHT, links=Links(inside=1e15, hop_s=0.0))
    slow = of(tiny_shape, layout, 4, EVERY_WEIGHT, links=Links(inside=1e6, share=1.0, hop_s=0.0))
    assert quick.seconds["waiting"] == pytest.approx(0, abs=1e-6)
    hidden = slow.seconds["measuring"] + slow.seconds["learning"]
    assert slow.seconds["waiting"] == pytest.approx(sum(slow.sent.values()) / 1e6 - hidden)


def test_links_between_hosts_are_the_slow_ones() -> None:
    links = Links(inside=100.0, between=10.0, host=8, share=1.0, hop_s=0.5)
    assert links.seconds(100.0, 2, 8) == 1 + 2 * 0.5 * 3
    assert links.seconds(100.0, 2, 16) == 10 + 2 * 0.5 * 4


def test_an_engine_reads_its_part_of_the_weights(tiny_shape: ModelShape) -> None:
    own = of(tiny_shape, Layout(name="replicated"), 4)
    engine = of(tiny_shape, Layout(name="engine", engine=4), 4)
    assert engine.seconds["sampling"] < own.seconds["sampling"]
    assert engine.seconds["learning"] == own.seconds["learning"]
