"""A checkpoint is whole or not there, what is damaged is never used, and the last few stay."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.conftest import said

from amenable.artifacts import StageContext
from amenable.config.checkpoint import CheckpointConfig
from amenable.train import checkpoints
from amenable.train.checkpoints import (
    Checkpoints,
    fault,
    load_checkpoint,
    newest_folder,
    save_checkpoint,
)

MakeContext = Callable[..., StageContext]


@pytest.fixture
def ctx(make_context: MakeContext) -> StageContext:
    return make_context("sft")


def kept(ctx: StageContext) -> list[str]:
    return sorted(path.name for path in (ctx.out / "checkpoints").iterdir())


def write(ctx: StageContext, *steps: int) -> Path:
    """Checkpoints of these steps; the folder of the last."""
    own = Checkpoints(ctx)
    for step in steps:
        own.write(step, {"weights": {"w": torch.full((3,), float(step))}}, {"step": step})
    return ctx.out / "checkpoints" / f"step-{steps[-1]:06d}"


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {
        "policy": {"a.b": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16)},
        "transposed": {"t": torch.arange(6.0).view(2, 3).T},
        "empty": {},
    }
    numbers = {"updates": 3, "kl_coef": 0.1, "history": [{"reward": 1.5}]}
    save_checkpoint(tmp_path / "one", tensors, numbers)
    found = load_checkpoint(tmp_path / "one", print)
    assert found is not None
    assert {key: found[1][key] for key in numbers} == numbers
    for name, group in tensors.items():
        assert found[0][name].keys() == group.keys()
        for key, tensor in group.items():
            assert torch.equal(found[0][name][key], tensor)
            assert found[0][name][key].dtype is tensor.dtype


def test_no_checkpoint_is_none(ctx: StageContext, tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", print) is None
    assert Checkpoints(ctx).step is None
    assert Checkpoints(ctx).read() is None
    assert newest_folder(ctx.out / "checkpoints") is None
    assert said(ctx) == ""


def test_a_failed_write_leaves_the_one_before(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(ctx, 1)

    def fail(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoints, "write_json", fail)
    with pytest.raises(RuntimeError, match="killed"):
        write(ctx, 2)
    assert kept(ctx) == ["step-000001"]
    assert Checkpoints(ctx).step == 1


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_stay(ctx: StageContext, keep: int) -> None:
    recipe = dataclasses.replace(ctx.recipe, checkpoint=CheckpointConfig(keep_last=keep))
    ctx = dataclasses.replace(ctx, recipe=recipe)
    write(ctx, 2, 4)
    write(ctx, 7, 11)
    assert kept(ctx) == [f"step-{step:06d}" for step in (2, 4, 7, 11)[-keep:]]


def test_numbers_of_more_digits_are_newer(ctx: StageContext) -> None:
    write(ctx, 999_999, 1_000_000)
    assert Checkpoints(ctx).step == 1_000_000
    assert newest_folder(ctx.out / "checkpoints") == ctx.out / "checkpoints" / "step-1000000"


def cut_short(path: Path) -> None:
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_the_hashes(path: Path) -> None:
    (path / "hashes.json").unlink()


def cut_the_hashes(path: Path) -> None:
    file = path / "hashes.json"
    file.write_text(file.read_text()[:40])


def empty_the_hashes(path: Path) -> None:
    (path / "hashes.json").write_text("{}")


def lose_the_weights(path: Path) -> None:
    (path / "weights.safetensors").unlink()


def change_a_number(path: Path) -> None:
    file = path / "numbers.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


DAMAGE: dict[Callable[[Path], None], str] = {
    cut_short: "weights.safetensors has another SHA-256 than when it was written",
    flip_a_bit: "weights.safetensors has another SHA-256 than when it was written",
    change_a_number: "numbers.json has another SHA-256 than when it was written",
    lose_the_hashes: "hashes.json is missing",
    lose_the_weights: "weights.safetensors is missing",
    cut_the_hashes: "it cannot be read",
    empty_the_hashes: "hashes.json is not what was written",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_one_falls_back_to_the_one_before(
    ctx: StageContext, damage: Callable[[Path], None]
) -> None:
    last = write(ctx, 1, 2)
    damage(last)
    assert DAMAGE[damage] in fault(last)
    own = Checkpoints(ctx)
    assert own.step == 1
    assert said(ctx).count("\n") == 1
    assert f"sft: checkpoint step-000002 is damaged and is not used: {DAMAGE[damage]}" in said(ctx)
    found = own.read()
    assert found is not None
    assert found[0]["weights"]["w"].tolist() == [1.0] * 3
    own.write(2, {"weights": {"w": torch.zeros(3)}}, {"step": 2})
    assert fault(last) == ""
    assert Checkpoints(ctx).step == 2


def test_where_none_is_whole_the_stage_starts_afresh_and_says_so(ctx: StageContext) -> None:
    cut_short(write(ctx, 1))
    cut_short(write(ctx, 2))
    shutil.copytree(
        ctx.out / "checkpoints" / "step-000002", ctx.out / "checkpoints" / "step-000009"
    )
    own = Checkpoints(ctx)
    assert own.step is None
    assert own.read() is None
    assert said(ctx).count("is damaged and is not used") == 3
    assert said(ctx).endswith("sft: no checkpoint is whole: starts afresh\n")
    own.write(1, {}, {})
    assert kept(ctx) == ["step-000001"], "what is damaged goes when a whole one is there"


def test_the_one_before_a_deleted_one_is_used(ctx: StageContext) -> None:
    shutil.rmtree(write(ctx, 3, 6))
    assert Checkpoints(ctx).step == 3
    assert said(ctx) == ""


def test_where_there_is_none_among_other_files_it_says_so(ctx: StageContext) -> None:
    """As the reference of pairs, which is kept beside the checkpoints before the first step."""
    save_checkpoint(ctx.out / "checkpoints" / "reference", {}, {})
    assert Checkpoints(ctx).step is None
    assert said(ctx) == "sft: no checkpoint was written yet: training starts afresh\n"
    assert kept(ctx) == ["reference"]


def test_one_that_a_kill_has_left_between_two_renames_is_there_again(ctx: StageContext) -> None:
    last = write(ctx, 1, 2)
    last.replace(last.with_name(f".{last.name}.old"))
    last.with_name(f".{last.name}.partial").mkdir()
    found = Checkpoints(ctx)
    assert found.step == 2
    assert kept(ctx) == ["step-000001", "step-000002"]


def test_what_a_kill_leaves_is_never_read_and_goes(ctx: StageContext) -> None:
    """Half of one that was being written, and half of one that was being removed."""
    last = write(ctx, 1, 2)
    for name in (".step-000003.partial", ".step-000001.removed"):
        shutil.copytree(last, last.with_name(name))
        (last.with_name(name) / "hashes.json").unlink()
    assert Checkpoints(ctx).step == 2
    assert kept(ctx) == ["step-000001", "step-000002"]
    assert said(ctx) == ""


def test_one_is_due_when_the_minutes_are_over(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def opened(minutes: float) -> Checkpoints:
        config: Any = CheckpointConfig(every_minutes=minutes)
        recipe = dataclasses.replace(ctx.recipe, checkpoint=config)
        return Checkpoints(dataclasses.replace(ctx, recipe=recipe))

    own, never = opened(2.0), opened(0.0)
    now[0] += 119
    assert not own.due()
    now[0] += 1
    assert own.due()
    assert not never.due()
    own.write(1, {}, {})
    assert not own.due()
