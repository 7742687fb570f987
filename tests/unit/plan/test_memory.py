from __future__ import annotations

import pytest

from amenable.plan.hardware import Hardware
from amenable.plan.memory import Budget, StageMemory
from amenable.plan.shape import ModelShape

from .conftest import machine, recipe, rows

P = 106_816  # weights of the tiny model
ADAPTER = 4 * 2048  # of rank 4: twice q (64 + 64), k, v (64 + 32), o, gate, up, down (64 + 128)


def stages(shape: ModelShape, *settings: str, on: Hardware | None = None) -> dict[str, StageMemory]:
    budget = Budget(recipe("model.lora.rank=4", *settings), shape, rows(), on or machine())
    return {stage.stage: stage for stage in budget.stages(["sft", "reward", "policy", "evaluate"])}


def test_adapters_share_one_base(tiny_shape: ModelShape) -> None:
    """Policy, reference, reward model and critic; policy and critic learn, all rows at once."""
    found = stages(tiny_shape, "policy.minibatches=1", "policy.micro_batch_tokens=8192")["policy"]
    parts = found.parts
    assert found.phase == "training"
    assert tiny_shape.adapter(4) == ADAPTER
    assert parts["weights"] == parts["roll-out copy"] == 4 * P
    assert parts["adapters"] == 4 * 4 * ADAPTER
    assert parts["gradients"] == 4 * ADAPTER
    assert parts["Adam's moments"] == 2 * 8 * ADAPTER


@pytest.mark.parametrize(
    ("settings", "adapters", "learners"),
    [
        (("policy.ppo.critic=head",), 3, 1),
        (("policy.algorithm=rloo",), 3, 1),
        (("policy.algorithm=rloo", "sft.enabled=false"), 2, 1),
    ],
)
def test_roles_are_those_of_the_recipe(
    tiny_shape: ModelShape, settings: tuple[str, ...], adapters: int, learners: int
) -> None:
    parts = stages(tiny_shape, *settings)["policy"].parts
    assert parts["adapters"] == adapters * 4 * ADAPTER
    assert parts["Adam's moments"] == learners * 8 * ADAPTER


def test_full_fine_tuning_has_a_trunk_a_role_and_no_copy(tiny_shape: ModelShape) -> None:
    found = stages(tiny_shape, "model.lora.enabled=false", "policy.learning_rate=1e-5")
    assert found["policy"].parts["weights"] == 4 * 4 * P
    assert "roll-out copy" not in found["policy"].parts
    sft = found["sft"].parts
    assert sft["weights"] == sft["gradients"] == sft["copies of trained weights"] == 4 * P
    assert sft["Adam's moments"] == 8 * P


def test_without_merged_rollouts_there_is_no_copy(tiny_shape: ModelShape) -> None:
    with_copy = stages(tiny_shape)["policy"]
    without = stages(tiny_shape, "policy.merged_rollouts=false")["policy"]
    assert "roll-out copy" in with_copy.parts
    assert "roll-out copy" not in without.parts
    assert without.parts["weights"] == with_copy.parts["weights"]


def test_half_precision_halves_a_frozen_base(tiny_shape: ModelShape) -> None:
    parts = stages(tiny_shape, "model.dtype=bf16")["policy"].parts
    assert parts["weights"] == parts["roll-out copy"] == 2 * P
    assert parts["adapters"] == 4 * 4 * ADAPTER


def test_a_quantised_base_by_hand(tiny_shape: ModelShape) -> None:
    """73,728 of the weights are in linear layers: twice 4,096 (q, o), 2,048 (k, v) and 3 of 8,192.

    In nf4 64 of them take 32 bytes of numbers, one of a scale and 4/256 of its own; the largest
    layer is written out in float32, and no copy is kept for roll-outs.
    """
    found = stages(tiny_shape, "model.quantise=nf4")
    parts = found["policy"].parts
    assert parts["weights"] == 4 * (P - 73_728) + 73_728 * (33 + 4 / 256) / 64
    assert parts["layer written out"] == 4 * 8192
    assert "roll-out copy" not in parts
    eight = stages(tiny_shape, "model.quantise=int8")["policy"].parts
    assert eight["weights"] == 4 * (P - 73_728) + 73_728
    assert "layer written out" not in stages(tiny_shape)["policy"].parts
    assert found["evaluate"].total == stages(tiny_shape)["evaluate"].total, "a whole model"


def test_export_of_a_quantised_base_reads_the_whole_one_again(tiny_shape: ModelShape) -> None:
    own = machine(kind="cpu", name="cpu")
    whole, found = (
        stages(tiny_shape, f"model.quantise={kind}", on=own)["sft"].phases["export"]
        for kind in ("none", "nf4")
    )
    bases = [4 * P, 4 * (P - 73_728) + 73_728 * (33 + 4 / 256) / 64 + 4 * 8192]
    assert found - whole == pytest.approx(bases[1] + 4 * P - (bases[0] + 4 * 73_728))


def test_cache_of_evaluation_by_hand(tiny_shape: ModelShape) -> None:
    """8 sequences of 12 + 6 tokens, two layers with keys and values of 32 numbers."""
    settings = ("evaluate.batch_size=8", "data.max_completion_tokens=6")
    parts = stages(tiny_shape, *settings)["evaluate"].parts
    assert parts["key-value cache"] == 8 * (12 + 6) * 2 * 2 * 32 * 4


def test_prompts_that_choose_a_checkpoint_are_decoded_together(tiny_shape: ModelShape) -> None:
    """One sample of each, while the policy's other weights are held."""
    config = recipe("model.lora.rank=4")
    few, many = (
        Budget(config, tiny_shape, rows(**{"prompts.validation": n}), machine())
        .stages(["policy"])[0]
        .phases
        for n in (0, 128)
    )
    assert "choice of a checkpoint" not in few
    assert many["choice of a checkpoint"] > many["roll-out"]


def test_compiled_products_stay_with_the_process(tiny_shape: ModelShape) -> None:
    """On a CPU, in bfloat16; a stage that computes nothing more keeps those of the ones before."""
    own = machine(kind="cpu", name="cpu")
    found = stages(tiny_shape, "model.dtype=bf16", on=own)
    sizes = [found[name].parts["compiled kernels"] for name in ("sft", "reward", "policy")]
    assert 0 < sizes[0] <= sizes[1] < sizes[2] == found["evaluate"].parts["compiled kernels"]
    assert "compiled kernels" not in stages(tiny_shape, on=own)["policy"].parts
    assert "compiled kernels" not in stages(tiny_shape, "model.dtype=bf16")["policy"].parts


def test_a_process_keeps_what_it_freed(tiny_shape: ModelShape) -> None:
    """Sampling with a small batch takes less than training, but shows no less; weights mapped."""
    own = machine(kind="cpu", name="cpu")
    found = stages(tiny_shape, "evaluate.batch_size=1", on=own)
    assert found["evaluate"].total == pytest.approx(found["policy"].total + 4 * P)
    card = stages(tiny_shape, "evaluate.batch_size=1")
    assert card["evaluate"].total < card["policy"].total


def test_activations_grow_with_the_micro_batch(tiny_shape: ModelShape) -> None:
    few, many = (
        stages(tiny_shape, f"sft.micro_batch_tokens={n}", "sft.batch_size=64")["sft"]
        for n in (64, 256)
    )
    assert many.parts["activations"] == pytest.approx(4 * few.parts["activations"], rel=0.1)


def test_disk_by_hand(tiny_shape: ModelShape) -> None:
    """Three checkpoints of weights, best weights and two moments; merged weights in bf16 and the
    adapter in fp32."""
    asked = ("model.lora.rank=4", "model.dtype=bf16", "policy.ppo.critic=head")
    config = recipe(*asked, "checkpoint.keep_last=3")
    found = Budget(config, tiny_shape, rows(), machine()).disk(["sft", "policy", "evaluate"])
    assert found == {
        "stages/sft/checkpoints": 3 * 16 * ADAPTER,
        "models/sft": 2 * P + 4 * ADAPTER,
        "stages/policy/checkpoints": 3 * 12 * ADAPTER,
        "models/tuned": 2 * P + 4 * ADAPTER,
    }


def test_vllm_holds_weights_and_a_cache_of_its_own(tiny_shape: ModelShape) -> None:
    found = stages(tiny_shape, "policy.engine=vllm", "policy.vllm.cache_gb=0.5")["policy"].parts
    assert found["vLLM's cache"] == 0.5e9
    assert found["vLLM's weights"] == 4 * P
    assert "roll-out copy" not in found
